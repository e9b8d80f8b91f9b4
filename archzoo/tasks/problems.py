"""Synthetic tasks: problems with an answer, generated as they are needed, some of them held out.

`SyntheticTask` is the stream, the split and the writing of lines; which problems there are is said
by its classes, in arithmetic.py and sorting.py. Nothing runs over the examples one by one. All
random numbers are counter-based, so that example n is a function of the seed and n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from archzoo.tasks.counter_random import Bits, Integers, mix, random_bits
from archzoo.tasks.digit_arrays import Digits, Flags, below
from archzoo.tasks.stream import IGNORED, Batch, Loader, Task
from archzoo.tasks.tokenizers import CharacterTokenizer, Tokenizer
from archzoo.tasks.writing import LETTERS as LETTERS

BLOCK = 2048  # training examples made at once, at least
SHARED = "0123456789" + "".join(
    letter for letter in map(chr, range(ord("!"), ord("~") + 1)) if not letter.isdecimal()
)  # what tasks write with that have a vocabulary in common: all that ASCII shows, digits first
VOCABULARIES = ("shared", "own")
# Of the hash that parts validation from test: one with which both have problems wherever two or
# more are held out, also of one digit (but for held_out 22).
_HALVES = np.uint64(5079)
STREAMS = {"train": 0, "validation": 1, "test": 2, "shuffle": 3, "cell": 4, "chain": 5}


class Problems(NamedTuple):
    """Problems as digits.

    Attributes:
        operands: (operands, digits, examples) uint8, least significant first.
        lengths: (operands, examples) int64, the digits of each; 0 where there is no such operand.
        letters: (examples,) int64, with which of `LETTERS` hints and keys begin.
    """

    operands: Digits
    lengths: Integers
    letters: Integers

    def take(self, rows: Integers) -> Problems:
        """Some of them."""
        operands, lengths, letters = self
        return Problems(operands[..., rows], lengths[..., rows], letters[rows])

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.letters)


class Columns(NamedTuple):
    """Columns that all lines have in common; where one has nothing, its line closes up.

    Attributes:
        symbols: (examples or 1, columns) uint8, tokens of the task's own tokenizer.
        present: (examples or 1, columns) bool.
        positions: (columns,) int64, as `Task` describes those of a batch.
        labelled: Whether they belong to the answer.
    """

    symbols: Digits
    present: Flags
    positions: Integers
    labelled: bool


class Lines(NamedTuple):
    """Problems and their answers as rows of tokens.

    Attributes:
        tokens: (examples, columns) uint8, filled up with pad.
        lengths: (examples,) int64, tokens before that.
        labelled: (examples, columns) bool, the answer and the stop token.
        positions: (examples, columns) int64, or None where they were not wanted.
    """

    tokens: Digits
    lengths: Integers
    labelled: Flags
    positions: Integers | None

    def take(self, rows: slice | Integers) -> Lines:
        """Some of them."""
        positions = None if self.positions is None else self.positions[rows]
        return Lines(self.tokens[rows], self.lengths[rows], self.labelled[rows], positions)


def batch_of(lines: Lines, numbers: Integers) -> Batch:
    """A batch of lines, of the given example numbers."""
    tokens = lines.tokens.astype(np.int64)
    width = tokens.shape[1] - 1
    padding = np.arange(width) >= lines.lengths[:, None]
    batch = {
        "tokens": torch.from_numpy(tokens[:, :-1].copy()),
        "labels": torch.from_numpy(np.where(lines.labelled[:, 1:], tokens[:, 1:], IGNORED)),
        "documents": torch.from_numpy(-padding.astype(np.int64)),
        "examples": torch.from_numpy(np.repeat(numbers[:, None], width, 1)),
    }
    if lines.positions is not None:
        batch["positions"] = torch.from_numpy(lines.positions[:, :-1].copy())
    return batch


def pack_rows(batch: Batch, problems: int, pad: int) -> Batch:
    """The same problems with several in a row, as documents of their own: fewer pad tokens.

    Each keeps its tokens up to the last that has a label. The longest come first, from the first
    row to the last and back again, so that all rows are about equally long.

    Args:
        batch: A problem a row, as `batch_of` makes it.
        problems: Of a row, at most.
        pad: The token that fills rows up.
    """
    labels = batch["labels"].numpy()
    lengths = np.where(labels != IGNORED, np.arange(1, labels.shape[1] + 1), 0).max(axis=1)
    count = -(-len(lengths) // problems)
    order, totals = np.argsort(-lengths, kind="stable"), np.zeros(count, np.int64)
    rows, begins, turns = (np.empty_like(lengths) for _ in range(3))
    for turn in range(problems):
        some = order[turn * count : (turn + 1) * count]
        row = np.arange(len(some)) if turn % 2 == 0 else count - 1 - np.arange(len(some))
        rows[some], begins[some], turns[some] = row, totals[row], turn
        totals[row] += lengths[some]
    columns = np.arange(labels.shape[1])
    kept = columns < lengths[:, None]
    target = (rows[:, None] * totals.max() + begins[:, None] + columns)[kept]
    documents = np.broadcast_to(turns[:, None], labels.shape)
    entries = {name: entry.numpy() for name, entry in batch.items()} | {"documents": documents}
    fill = {"tokens": pad, "labels": IGNORED, "documents": -1}
    packed = {}
    for name, entry in entries.items():
        whole = np.full(count * totals.max(), fill.get(name, 0), np.int64)
        whole[target] = entry[kept]
        packed[name] = torch.from_numpy(whole.reshape(count, -1))
    return packed


class Blocks:
    """Training lines by batch, several small batches made at once.

    A call of numpy's costs more than its work.

    Args:
        make: Of example numbers, a pure function.
        batch_size: Rows of a batch.
    """

    def __init__(self, make: Callable[[Integers], Lines], batch_size: int) -> None:
        self.make, self.batch_size = make, batch_size
        self._last: tuple[tuple[int, bytes], Lines] | None = None

    def __call__(self, number: int, rows: Integers) -> Lines:
        """The given rows of batch `number`."""
        several = max(BLOCK // len(rows), 1)
        block, index = divmod(number, several)
        key = (block, rows.tobytes())
        if self._last is None or self._last[0] != key:
            batches = block * several + np.arange(several)[:, None]
            self._last = key, self.make((batches * self.batch_size + rows).reshape(-1))
        return self._last[1].take(slice(index * len(rows), (index + 1) * len(rows)))


class SyntheticTask(Task):
    """Synthetic problems that end with `=`; the labels are the answer.

    A problem has a size, two integers: the digits of its two operands, say. Training example
    n is a function of (seed, n) alone; both parts of its size are uniform, so every size comes
    equally often.

    Held-out problems are chosen by a fixed hash of the operands: one in `held_out`, at every size,
    the same for every seed and every largest size. Training never shows one. Another bit of the
    hash says which of them validation asks and which test does: no problem is asked by both.

    Checkpoints that are older than this have `separate_test` false: their validation and their
    test ask any problem that is held out, and keep doing so.

    A class says which problems there are by `operators`, `shape`, `draws`, `candidates`, `hashes`,
    `listed` and `columns`.

    Attributes:
        operators: The signs of its problems, the last one followed by the answer.
        coupling: How a task whose batches hold coupled positions (`positions`) writes the numbers
            of a problem, "reversed" or "plain"; None: it gives no positions.
        longest_run: Digits of the longest number in training, answers included.
        longest_tested: The same over everything that is validated on.
        synthetic_tasks: By name, the tasks that generate its problems: itself.

    Args:
        spans: Of both parts of the size, first and last value. All else is read off what the class
            was made with, which are the arguments of `Sorting` at least.
        **arguments: Of those, what its constructor does not take.
    """

    metrics: tuple[str, ...] = ("token_accuracy", "exact_match")
    tokenizer: CharacterTokenizer
    operators: str
    coupling: Literal["reversed", "plain"] | None = None
    # Before there was a common vocabulary every task had its own, and no number was 0.
    # Validation and test read the same problems, and each problem had a row to itself.
    added: ClassVar[dict[str, Any]] = {
        "vocabulary": "own",
        "zero": False,
        "separate_test": False,
        "pack": 1,
    }
    axes: ClassVar[tuple[str, str]]  # what the two parts of a size are
    answer_parts: ClassVar[tuple[str, str]] = ("digit", "the units")  # and which of them is 0
    has_keys: ClassVar[bool] = False  # whether lines hold letters without hints
    carries: ClassVar[bool] = False  # whether `chained` gives problems

    def __init__(
        self,
        spans: tuple[tuple[int, int], tuple[int, int]],
        /,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        arguments = self.arguments
        held_out, ood_digits = arguments["held_out"], arguments["ood_digits"] or []
        if held_out < 2:
            raise ValueError(
                f"held_out {held_out} leaves nothing to train on: one problem in held_out is kept "
                "out of training, so take 2 or more"
            )
        for name in ("steps_per_epoch", "validation_examples", "test_examples", "ood_examples"):
            if arguments[name] < 1:
                raise ValueError(f"{name} {arguments[name]} is not positive")
        if arguments.get("pack", 1) < 1:
            raise ValueError(
                f"pack {arguments['pack']} is not positive: 1 gives each problem a row"
            )
        if min(ood_digits, default=1) < 1:
            raise ValueError(f"ood_digits {ood_digits} holds a length that is not positive")
        self.synthetic_tasks = {type(self).__name__: self}
        self.extra_validation = tuple(ood_digits)
        self.spans = spans
        self.extent = (spans[0][1], spans[1][1])
        self.reverse: bool = arguments["reverse"]
        self.hints: bool = arguments["hints"]
        self.held_out: int = held_out
        self.steps_per_epoch: int = arguments["steps_per_epoch"]
        self.seed: int = arguments["seed"]
        self.zero: bool = arguments["zero"]
        self.separate_test: bool = arguments.get("separate_test", True)  # came after own tasks
        self.pack: int = arguments.get("pack", 1)  # so did this
        letters = LETTERS if self.hints or self.has_keys else ""
        self.written = "0123456789" + self.operators + letters
        self.tokenizer = CharacterTokenizer(self._vocabulary(), special=True)
        stop, pad = self.tokenizer.stop_token, self.tokenizer.pad_token
        assert stop is not None and pad is not None  # they are special tokens
        self.stop, self.pad = stop, pad
        self.letter_tokens = np.array(self.tokenizer.encode(letters), np.uint8)
        self.context_length = self.width(*self.extent) - 1  # the last token is only ever a label
        # There are letters between the digits of hinted numbers.
        sizes = [self.extent, *zip(self.extra_validation, self.extra_validation, strict=True)]
        runs = [1 if self.hints else int(self.answer_size(*size)) for size in sizes]
        self.longest_run, self.longest_tested = runs[0], max(runs)
        self._few = False  # whether all held-out problems can be listed
        self._evaluation: dict[str, Problems] = {}
        self._sizes: dict[str, Integers] = {}
        self._blocks = Blocks(self._training_lines, self.batch_size)

    other_vocabulary = (
        "own differs from task to task, so both must be trained with --data.vocabulary shared, or "
        "both be the same task"
    )

    def _vocabulary(self) -> str:
        """The characters that have tokens."""
        vocabulary = self.arguments["vocabulary"]
        if vocabulary not in VOCABULARIES:
            raise ValueError(f"vocabulary {vocabulary!r} is not one of {', '.join(VOCABULARIES)}")
        if vocabulary == "own":
            return self.written
        if missing := set(self.written) - set(SHARED):
            raise ValueError(
                f"the shared vocabulary has no {min(missing)!r}, only what ASCII shows: take "
                "vocabulary own, or another sign"
            )
        return SHARED

    # What a class says.

    def shape(self, extent: tuple[int, int]) -> tuple[int, int]:
        """How many operands, and of how many digits, problems up to a size have."""
        raise NotImplementedError

    def draws(self, extent: tuple[int, int]) -> int:
        """How many random numbers of 64 bits make a problem up to a size."""
        raise NotImplementedError

    def answer_size(self, first: Any, second: Any) -> Any:
        """Digits of the longest number in a problem of a size or its answer; integers or arrays."""
        raise NotImplementedError

    def width(self, first: int, second: int) -> int:
        """Tokens of the longest line of a problem of a size, the stop token included."""
        raise NotImplementedError

    def candidates(self, bits: Bits, sizes: Integers, extent: tuple[int, int]) -> Problems:
        """Random problems, held out or not.

        Args:
            bits: (draws, examples).
            sizes: (2, examples).
            extent: The largest size, which the shape of the result follows.
        """
        raise NotImplementedError

    def hashes(self, problems: Problems) -> Bits:
        """(examples,): equal for problems that are the same, whatever they are written like."""
        raise NotImplementedError

    def listed(self, first: int, second: int) -> Problems | None:
        """All held-out problems of a size, shuffled; None: there are too many."""
        raise NotImplementedError

    def columns(self, problems: Problems) -> list[Columns]:
        """The lines' columns, up to the stop token."""
        raise NotImplementedError

    @property
    def test_part(self) -> str:
        return "test" if self.separate_test else "validation"

    def split_settings(self) -> dict[str, Any]:
        return {"separate_test": self.separate_test}

    def take_up_split(self, settings: dict[str, Any]) -> None:
        super().take_up_split(settings)
        self.ask_separately(settings["separate_test"])

    def ask_separately(self, separate_test: bool) -> None:
        """Give validation and test problems of their own, or all held-out ones to both."""
        self.separate_test = separate_test
        self._evaluation.clear()
        self._sizes.clear()

    def config(self) -> dict[str, Any]:
        # More characters have tokens than a model of this task was shown.
        return super().config() | {"characters": self.written}

    # Batches.

    def prepare(self) -> None:
        # There is nothing to read or to learn; but that nothing is held out is said at once, and
        # not at the first validation, or at the test after all training.
        self._held_out_problems("validation")
        if self._few:
            self._held_out_problems("test")

    def rows(self, split: str) -> int:
        if split == "train":
            return self.steps_per_epoch * self.batch_size
        return self._held_out_problems(split).examples

    def training_batch(self, number: int, rows: Integers) -> Batch:
        batch = batch_of(self._blocks(number, rows), number * self.batch_size + rows)
        return batch if self.pack == 1 else pack_rows(batch, self.pack, self.pad)

    def _training_lines(self, numbers: Integers) -> Lines:
        problems = self.problems("train", numbers)
        return self.lines(problems, self.context_length, positions=self.coupling is not None)

    def evaluation_batch(self, split: str, number: int, rows: Integers) -> Batch:
        numbers = number * self.batch_size + rows
        return self.batch(self.problems(split, numbers), numbers, self.context_length)

    def extra_validation_loader(self, length: Any) -> Loader:
        problems = self.cell(length, length, self.arguments["ood_examples"], "validation")
        if not problems.examples:
            raise ValueError(
                f"ood_digits {length}: none of the few problems of that size is held out for "
                f"validation; take a smaller held_out than {self.held_out}, or another length"
            )
        width = int(self.lines(problems).lengths.max()) - 1

        def make(number: int, rows: Integers) -> Batch:
            numbers = number * self.batch_size + rows
            return self.batch(problems.take(numbers), numbers, width)

        return Loader(make, self.batch_size, problems.examples, self, training=False)

    def batch(
        self, problems: Problems, numbers: Integers | None = None, width: int | None = None
    ) -> Batch:
        """A batch of problems, of the given example numbers, `width` or as few columns as fit.

        Args:
            problems: To write, a row each.
            numbers: Their example numbers. None: 0, 1, 2, ...
            width: Columns. None: as few as fit.
        """
        lines = self.lines(problems, width, positions=self.coupling is not None)
        return batch_of(lines, np.arange(problems.examples) if numbers is None else numbers)

    def tokens_of(self, tokenizer: Tokenizer) -> Integers:
        """Which token of another tokenizer stands for each of this task's own.

        A line end stands for the stop token where the other has none; padding is never looked at.

        Raises:
            ValueError: a digit or a sign is not one token there.
        """
        symbols = {
            token: tokenizer.encode(character)
            for token, character in enumerate(self.tokenizer.characters)
            if character in self.written
        }
        stop = tokenizer.stop_token
        symbols[self.stop] = tokenizer.encode("\n") if stop is None else [stop]
        if any(len(tokens) != 1 for tokens in symbols.values()):
            raise ValueError(
                f"the tokenizer does not write each of {self.written!r} and the line end as one "
                "token: take one of characters, bpe or unigram"
            )
        pad = symbols[self.stop][0] if tokenizer.pad_token is None else tokenizer.pad_token
        table = np.full(self.tokenizer.vocab_size, pad, np.int64)
        table[list(symbols)] = [token for (token,) in symbols.values()]
        return table

    # Problems.

    def problems(self, split: str, numbers: Integers) -> Problems:
        """Those of the given example numbers in "train", "validation" or "test"."""
        if split != "train":
            return self._held_out_problems(split).take(numbers)
        # Sizes are drawn once and kept when a problem turns out to be held out, so that sizes with
        # few problems come as often as the others.
        bits = random_bits(self.seed, STREAMS[split], numbers, 1)
        first = np.array([[first] for first, _ in self.spans])
        choices = np.array([[last - first + 1] for first, last in self.spans])
        sizes = first + below(bits, choices).astype(np.int64)
        return self._draw(self.seed, split, numbers, sizes, self.extent, split)

    def cell(self, first: int, second: int, count: int, split: str = "test") -> Problems:
        """Held-out problems of one size: `count`, or as many as there are where they are few.

        Problem n is a function of the size, the split and n alone.

        Args:
            first: Digits of the first operand.
            second: Digits of the second one.
            count: How many are wanted.
            split: Whose: "validation" or "test".
        """
        if (found := self._listed(first, second, split)) is not None:
            return found.take(np.arange(min(count, found.examples)))
        numbers = (first << 44) + (second << 28) + np.arange(count)
        sizes = np.repeat([[first], [second]], count, axis=1)
        return self._draw(0, "cell", numbers, sizes, (first, second), split)

    def counts(self, split: str) -> dict[tuple[int, int], int]:
        """How many problems "validation" or "test" has of each size."""
        self._held_out_problems(split)
        pairs, counts = np.unique(self._sizes[split], axis=1, return_counts=True)
        return {(int(i), int(j)): int(n) for i, j, n in zip(*pairs, counts, strict=True)}

    def chained(self, digits: int, chain: int, count: int) -> Problems:
        """Test's problems of one size in which something is carried through `chain` columns.

        Only where `carries`; random problems hardly hold chains of four.

        Args:
            digits: Of both operands.
            chain: Columns that something is carried through.
            count: How many are wanted.
        """
        raise NotImplementedError

    def is_held_out(self, problems: Problems) -> Flags:
        """Which of the problems are never trained on, (examples,)."""
        return are_held_out(self.hashes(problems), self.held_out)

    def is_for_test(self, problems: Problems) -> Flags:
        """Which problems test asks where they are held out, (examples,); validation: the others."""
        return are_for_test(self.hashes(problems))

    def belongs_to(self, problems: Problems, split: str) -> Flags:
        """Which of the problems "train", "validation" or "test" may show, (examples,)."""
        held_out = self.is_held_out(problems)
        if split == "train":
            return ~held_out
        if not self.separate_test:
            return held_out
        wanted: Flags = held_out & (self.is_for_test(problems) == (split == "test"))
        return wanted

    # Lines.

    def lines(
        self, problems: Problems, width: int | None = None, *, positions: bool = False
    ) -> Lines:
        """Problems as rows of tokens, each with its answer.

        Args:
            problems: To write.
            width: Columns, less the last one, which is only ever a label. None: as few as fit.
            positions: Whether they are wanted too.
        """
        parts = self._parts(problems)
        shapes = [(problems.examples, part.symbols.shape[1]) for part in parts]

        def side_by_side(entries: list[Any]) -> Any:
            pairs = zip(entries, shapes, strict=True)
            return np.concatenate([np.broadcast_to(*pair) for pair in pairs], axis=1)

        # Row by row, `filled` holds as many columns as `present`, in the same order.
        present = side_by_side([part.present for part in parts])
        lengths = np.count_nonzero(present, axis=1)
        columns = np.arange(int(lengths.max(initial=1)) if width is None else width + 1)
        filled = columns < lengths[:, None]
        tokens = np.full(filled.shape, self.pad, np.uint8)
        tokens[filled] = side_by_side([part.symbols for part in parts])[present]
        answer_from = sum(
            shape[1] for part, shape in zip(parts, shapes, strict=True) if not part.labelled
        )
        begin = np.count_nonzero(present[:, :answer_from], axis=1)
        ids = None
        if positions:
            ids = np.zeros(filled.shape, np.int64)
            ids[filled] = side_by_side([part.positions for part in parts])[present]
        return Lines(tokens, lengths, filled & (columns >= begin[:, None]), ids)

    def text(self, problems: Problems) -> list[str]:
        """Problems and answers as they are written."""
        lines = self.lines(problems)
        rows = zip(lines.tokens.tolist(), lines.lengths.tolist(), strict=True)
        return [self.tokenizer.decode(row[:count]) for row, count in rows]

    def _parts(self, problems: Problems) -> list[Columns]:
        return [*self.columns(problems), self.sign(self.stop, labelled=True)]

    def sign(self, sign: str | int, *, labelled: bool = False, present: Any = True) -> Columns:
        """One column that is a sign or a token, in all lines or in those of `present`.

        Args:
            sign: A character, or a token.
            labelled: Whether it belongs to the answer.
            present: (examples,) bool, or one for all.
        """
        token = sign if isinstance(sign, int) else self.tokenizer.encode(sign)[0]
        one = np.full((1, 1), token, np.uint8)
        operator = isinstance(sign, str) and sign in self.operators
        return Columns(one, np.reshape(present, (-1, 1)), np.full(1, int(operator)), labelled)

    def number(
        self,
        digits: Digits,
        lengths: Integers,
        letters: Integers,
        *,
        reverse: bool | None = None,
        labelled: bool = False,
    ) -> Columns:
        """The columns of a number.

        Args:
            digits: (digits, examples).
            lengths: (examples,).
            letters: (examples,), the hint of the units.
            reverse: Least significant digit first; None: as all numbers.
            labelled: Whether it belongs to the answer.
        """
        places = np.arange(len(digits))
        if not (self.reverse if reverse is None else reverse):
            places, digits = places[::-1], digits[::-1]
        symbols, present, positions = digits.T, places < lengths[:, None], places + 2
        if self.hints:
            hints = self.letters_from(letters, places)
            symbols = np.stack([hints, symbols], axis=2).reshape(len(symbols), -1)
            present, positions = np.repeat(present, 2, axis=1), np.repeat(positions, 2)
            positions[::2] = 0
        return Columns(symbols, present, positions, labelled)

    def letters_from(self, letters: Integers, places: Integers) -> Digits:
        """Tokens of the letters `places` after the first: (examples,), (columns,) -> both."""
        tokens: Digits = self.letter_tokens[(letters[:, None] + places) % len(LETTERS)]
        return tokens

    # Inside.

    def blank(self, count: int, extent: tuple[int, int] | None = None) -> Problems:
        """Empty arrays for problems up to a size."""
        operands, digits = self.shape(extent or self.extent)
        return Problems(
            np.zeros((operands, digits, count), np.uint8),
            np.zeros((operands, count), np.int64),
            np.zeros(count, np.int64),
        )

    def _draw(
        self,
        seed: int,
        stream: str,
        numbers: Integers,
        sizes: Integers,
        extent: tuple[int, int],
        split: str,
        make: Callable[[Bits, Integers, tuple[int, int]], Problems] | None = None,
    ) -> Problems:
        """Draws problems of given sizes that belong to a split.

        Problem n is the first of its own sequence of candidates that does, so it depends on n
        alone; only the examples still without one go into the next round. `make` replaces
        `candidates`.
        """
        draws = self.draws(extent)
        # At once: as many as it takes on average.
        tries = 1 if split == "train" else self.held_out * (1 + self.separate_test)
        problems = self.blank(0, extent)
        candidates = make or self.candidates
        missing = np.arange(len(numbers))
        start = 1  # the first draw served the sizes
        while len(missing):
            bits = random_bits(seed, STREAMS[stream], numbers[missing], draws * tries, start)
            bits = bits.reshape(tries, draws, -1).swapaxes(0, 1).reshape(draws, -1)
            found = candidates(bits, np.tile(sizes[:, missing], tries), extent)
            fits = self.belongs_to(found, split).reshape(tries, -1)
            if tries > 1:
                found = found.take(fits.argmax(axis=0) * len(missing) + np.arange(len(missing)))
            if problems.examples:
                _put(problems, missing, found)
            else:
                problems = found
            missing = missing[~fits.any(axis=0)]
            start += draws * tries
        return problems

    def _chosen(self, problems: Problems) -> Problems:
        """Those that are held out, shuffled."""
        found = problems.take(np.flatnonzero(self.is_held_out(problems)))
        return found.take(shuffled(found.examples))

    def _listed(self, first: int, second: int, split: str) -> Problems | None:
        """Those of `listed` that belong to "validation" or "test"."""
        found = self.listed(first, second)
        if found is None or not self.separate_test:
            return found
        return found.take(np.flatnonzero(self.belongs_to(found, split)))

    def _held_out_problems(self, split: str) -> Problems:
        """All problems of "validation" or "test", spread over the sizes in turn."""
        if split not in self._evaluation:
            wanted = self.arguments[f"{split}_examples"]
            (low, high), (lowest, highest) = self.spans
            cells = [(i, j) for i in range(low, high + 1) for j in range(lowest, highest + 1)]
            listed = [self._listed(*cell, split) for cell in cells]
            self._few = all(found is not None for found in listed)
            counts = np.array([wanted if found is None else found.examples for found in listed])
            # Round r takes problem r of every size that still has one.
            rounds, turn = np.nonzero(np.arange(counts.max())[:, None] < counts)
            rounds, turn = rounds[:wanted], turn[:wanted]
            if not len(turn):
                others = ", or separate_test: false" if self.separate_test else ""
                raise ValueError(
                    f"none of the few problems is held out for {split}: take a smaller held_out "
                    f"than {self.held_out}, or larger problems{others}"
                )
            sizes = np.array(cells).T[:, turn]
            problems = self.blank(len(turn))
            drawn = np.flatnonzero(np.array([found is None for found in listed])[turn])
            # No seed: models that saw different training data are compared on the same problems.
            found = self._draw(0, split, drawn, sizes[:, drawn], self.extent, split)
            _put(problems, drawn, found)
            for index, here in enumerate(listed):
                if here is not None:
                    rows = np.flatnonzero(turn == index)
                    order = rounds[rows] if split == "validation" else -1 - rounds[rows]
                    _put(problems, rows, here.take(order))
            self._evaluation[split], self._sizes[split] = problems, sizes
        return self._evaluation[split]


def are_held_out(hashes: Bits, held_out: int) -> Flags:
    """The split: which problems, by their hashes, are never trained on; one in `held_out`.

    The hash 0, that of zeros alone, would be held out by every number, and is by none.
    """
    held: Flags = (mix(hashes) % np.uint64(held_out) == 0) & (hashes != 0)
    return held


def are_for_test(hashes: Bits) -> Flags:
    """Which held-out problems, by their hashes, test asks: half of them, whatever `held_out` is."""
    # A bit that says nothing of the remainder that `are_held_out` looks at.
    halves: Flags = mix(mix(hashes) + _HALVES) >> np.uint64(63) == 1
    return halves


def shuffled(count: int) -> Integers:
    """The order in which all held-out problems of a size come, (count,)."""
    bits = random_bits(0, STREAMS["shuffle"], np.arange(count), 1)[0]
    return np.argsort(bits, kind="stable")


def together(parts: list[Problems]) -> Problems:
    """Problems of several sizes as one."""
    operands = max(part.operands.shape[0] for part in parts)
    digits = max(part.operands.shape[1] for part in parts)
    counts = [part.examples for part in parts]
    result = Problems(
        np.zeros((operands, digits, sum(counts)), np.uint8),
        np.zeros((operands, sum(counts)), np.int64),
        np.zeros(sum(counts), np.int64),
    )
    begin = 0
    for part, count in zip(parts, counts, strict=True):
        _put(result, np.arange(begin, begin + count), part)
        begin += count
    return result


def _put(problems: Problems, rows: Integers, others: Problems) -> None:
    """Overwrites some problems with others, which may have fewer operands or digits."""
    operands, digits, _ = others.operands.shape
    problems.operands[:operands, :digits, rows] = others.operands
    problems.operands[:operands, digits:, rows] = 0
    problems.lengths[:operands, rows] = others.lengths
    problems.letters[rows] = others.letters
