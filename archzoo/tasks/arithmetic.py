"""Addition of numbers of any length, made as it is needed, with problems that are never trained on.

Digits are arrays, least significant first and shaped (digits, examples), so that 100 digits work
like 3 and every step runs over all examples at once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archzoo.positions.coupling import coupled_positions
from archzoo.tasks.stream import IGNORED, Batch, Bits, Integers, Loader, Task, mix, random_bits
from archzoo.tasks.tokenizers import CharacterTokenizer

Digits = NDArray[np.uint8]  # (digits, examples), least significant first, zeros beyond the number

PLUS, EQUAL, STOP, PAD = 10, 11, 12, 13  # the digits are tokens 0 to 9

_STREAMS = {"train": 0, "validation": 1, "test": 2, "cell": 4}
_ENUMERATED = 6  # digits of both operands together up to which all problems are listed


def exact_match(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether every answer token of a row is the most likely one, given the right ones before it.

    For a causal model without noise this is what greedy generation gives: the first token that is
    not the most likely one fails both. A row without labels fills a batch up; leave it out.

    Args:
        logits: (batch, time, vocab_size).
        labels: (batch, time), -100 where nothing is asked.

    Returns:
        (batch,) bool.
    """
    return ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(-1)


class Problems(NamedTuple):
    """Sums as digits.

    Attributes:
        a, b: (digits, examples) uint8, least significant first.
        lengths: (2, examples) int64, the digits of a and of b.
    """

    a: Digits
    b: Digits
    lengths: Integers


class Addition(Task):
    """Sums such as `12+345=357`: the model reads the problem and is asked for the answer.

    With `reverse`, all three numbers are written least significant digit first, the order in which
    one adds: 814 + 6 = 820 becomes `418+6=028`. Each digit is one token, and so are `+`, `=`, the
    stop token after the answer and the pad token that fills rows up. 3 + 632 = 635 is trained as::

        position    0    1    2    3    4    5    6    7    8    9   10   11
        token       3    +    2    3    6    =    5    3    6 stop  pad  pad
        label       .    .    .    .    .    5    3    6 stop    .    .    .

    Training example n is a function of (seed, n) alone. Both operands' lengths are uniform on
    min_digits..digits, so every pair of lengths comes equally often; then the digits are uniform,
    without leading zeros (nor the number 0).

    Held-out problems are chosen by a fixed hash of the two numbers, whatever their order: one in
    `held_out`, at every length, the same for every seed and every `digits`. Training never shows
    one, validation and test show nothing else. Both spread their examples evenly over the pairs of
    lengths, as far as there are enough: of the 81 sums of two 1-digit numbers few are held out.
    Pairs of up to 6 digits in all are drawn without replacement, and test takes other problems
    than validation while they last.

    Args:
        digits: digits of the longest operand.
        min_digits: digits of the shortest operand.
        reverse: write numbers least significant digit first.
        coupled: batches hold coupled positions, for PositionCoupling.
        held_out: one problem in this many is held out of training; at least 2.
        batch_size: examples in a batch, all ranks together.
        steps_per_epoch: batches in what Lightning calls an epoch; the stream itself never ends.
        validation_examples: held-out problems to validate on.
        test_examples: held-out problems to test on.
        ood_digits: lengths, beyond `digits`, that every validation asks as well: held-out sums of
            two numbers of so many digits each (`validation/exact_match/8`, ..., and their mean,
            `validation/exact_match/ood`, by which best.ckpt is then chosen).
        ood_examples: problems of each of those lengths.
        seed: chooses the training examples.

    Raises:
        ValueError: an argument is out of range.
    """

    metrics = ("token_accuracy", "exact_match")

    def __init__(
        self,
        digits: int = 3,
        min_digits: int = 1,
        reverse: bool = True,
        coupled: bool = False,
        held_out: int = 20,
        batch_size: int = 256,
        steps_per_epoch: int = 1000,
        validation_examples: int = 1000,
        test_examples: int = 5000,
        ood_digits: list[int] | None = None,
        ood_examples: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__(
            digits=digits,
            min_digits=min_digits,
            reverse=reverse,
            coupled=coupled,
            held_out=held_out,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            validation_examples=validation_examples,
            test_examples=test_examples,
            ood_digits=ood_digits,
            ood_examples=ood_examples,
            seed=seed,
        )
        if not 1 <= min_digits <= digits:
            raise ValueError(f"min_digits {min_digits} is not between 1 and digits {digits}")
        if coupled and not reverse:
            raise ValueError(
                "coupled positions count an answer from its first digit, which must be the least "
                "significant one: take reverse=True"
            )
        if held_out < 2:
            raise ValueError(
                f"held_out {held_out} leaves nothing to train on: it is one problem in how many, "
                "so take 2 or more"
            )
        for name in ("steps_per_epoch", "validation_examples", "test_examples", "ood_examples"):
            if self.arguments[name] < 1:
                raise ValueError(f"{name} {self.arguments[name]} is not positive")
        if min(ood_digits or [1]) < 1:
            raise ValueError(f"ood_digits {ood_digits} holds a length that is not positive")
        self.beyond = tuple(ood_digits or ())
        self.digits = digits
        self.min_digits = min_digits
        self.reverse = reverse
        self.held_out = held_out
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.tokenizer = CharacterTokenizer("0123456789+=", special=True)
        # Digits of both operands, of an answer with a carry, and +, =, stop; the last token is
        # only ever a label.
        self.context_length = 3 * digits + 3
        self.longest_run = digits + 1
        self.coupling = "reversed" if coupled else None
        self._evaluation: dict[str, Problems] = {}

    def prepare(self) -> None:
        pass  # there is nothing to read or to learn

    # Batches.

    def rows(self, split: str) -> int:
        if split == "train":
            return self.steps_per_epoch * self.batch_size
        return self._held_out_problems(split).lengths.shape[1]

    def training_batch(self, number: int, rows: Integers) -> Batch:
        numbers = number * self.batch_size + rows
        return self._batch(self.problems("train", numbers), numbers)

    def evaluation_batch(self, split: str, number: int, rows: Integers) -> Batch:
        numbers = number * self.batch_size + rows
        return self._batch(self.problems(split, numbers), numbers)

    def beyond_loader(self, length: int) -> Loader:
        problems = self.cell(length, length, self.arguments["ood_examples"])

        def make(number: int, rows: Integers) -> Batch:
            numbers = number * self.batch_size + rows
            a, b, lengths = problems
            some = Problems(a[:, numbers], b[:, numbers], lengths[:, numbers])
            return self._batch(some, numbers, 3 * length + 3)

        rows = problems.lengths.shape[1]
        return Loader(make, self.batch_size, rows, self, training=False)

    def cell(self, first: int, second: int, count: int) -> Problems:
        """Held-out sums of two lengths, `count` or as many as there are of short ones."""
        size = max(first, second)
        if first + second <= _ENUMERATED:
            found = _listed(first, second, self.held_out)[:, :count]
            lengths = np.repeat([[first], [second]], found.shape[1], axis=1)
            return Problems(_digits(found[0], size), _digits(found[1], size), lengths)
        numbers = (first << 44) + (second << 28) + np.arange(count)
        lengths = np.repeat([[first], [second]], count, axis=1)
        return _draw(0, _STREAMS["cell"], numbers, lengths, size, self.held_out, wanted=True)

    def problems(self, split: str, numbers: Integers) -> Problems:
        """The sums of the given example numbers in "train", "validation" or "test"."""
        if split != "train":
            a, b, lengths = self._held_out_problems(split)
            return Problems(a[:, numbers], b[:, numbers], lengths[:, numbers])
        # The lengths are drawn once and kept when a problem turns out to be held out, so that
        # pairs with few problems come as often as the others.
        bits = random_bits(self.seed, _STREAMS[split], numbers, 1)
        choices = self.digits - self.min_digits + 1
        lengths = self.min_digits + _below(bits, choices).astype(np.int64)
        return _draw(
            self.seed,
            _STREAMS[split],
            numbers,
            lengths,
            self.digits,
            self.held_out,
            wanted=False,
        )

    def pairs(self, split: str, count: int) -> list[tuple[int, int]]:
        """The first `count` sums of a split as pairs of integers (a, b)."""
        problems = self.problems(split, np.arange(count))
        return list(zip(_integers(problems.a), _integers(problems.b), strict=True))

    def counts(self, split: str) -> dict[tuple[int, int], int]:
        """How many sums "validation" or "test" has of each pair of operand lengths."""
        pairs, counts = np.unique(
            self._held_out_problems(split).lengths, axis=1, return_counts=True
        )
        return {(int(i), int(j)): int(n) for i, j, n in zip(*pairs, counts, strict=True)}

    # Text.

    def prompt(self, a: int, b: int) -> str:
        """The problem as text, up to and with `=`."""
        return f"{self._written(a)}+{self._written(b)}="

    def answer(self, a: int, b: int) -> str:
        """What should follow the prompt, before the stop token."""
        return self._written(a + b)

    def parse(self, text: str) -> tuple[int, int, int]:
        """Reads a line `prompt + answer` back as (a, b, c).

        Raises:
            ValueError: the line is not of that form.
        """
        problem, equal, answer = text.partition("=")
        a, plus, b = problem.partition("+")
        if not (equal and plus and all(part.isdecimal() for part in (a, b, answer))):
            raise ValueError(f"{text!r} is not of the form a+b=c")
        order = -1 if self.reverse else 1
        return int(a[::order]), int(b[::order]), int(answer[::order])

    def _written(self, number: int) -> str:
        return str(number)[::-1] if self.reverse else str(number)

    # Inside.

    def _batch(self, problems: Problems, numbers: Integers, width: int | None = None) -> Batch:
        width = width or self.context_length
        lines, lengths, asked = self._lines(problems, width)
        labels = np.where(asked[:, 1:], lines[:, 1:].astype(np.int64), IGNORED)
        padding = np.arange(width) >= lengths[:, None]
        batch = {
            "tokens": torch.from_numpy(lines[:, :-1].astype(np.int64)),
            "labels": torch.from_numpy(labels),
            "documents": torch.from_numpy(-padding.astype(np.int64)),
            "examples": torch.from_numpy(np.repeat(numbers[:, None], width, 1)),
        }
        if self.coupling:
            batch["positions"] = coupled_positions(
                batch["tokens"],
                range(10),
                (PLUS, EQUAL),
                documents=batch["documents"],
                prompt=self.coupling,
            )
        return batch

    def _lines(self, problems: Problems, width: int) -> tuple[Digits, Integers, NDArray[np.bool_]]:
        """Writes sums as rows of `width` tokens and one more.

        Returns:
            tokens (examples, time + 1) uint8, their lengths (examples,), and which tokens are
            answer or stop (examples, time + 1).
        """
        total = _add(problems.a, problems.b)
        size = np.maximum(*problems.lengths)
        carried = np.take_along_axis(total, size[None], 0)[0]
        lengths = np.stack([*problems.lengths, size + carried])

        columns = np.arange(width + 1)
        lines = np.full((len(size), len(columns)), PAD, np.uint8)
        start = np.zeros(len(size), np.int64)
        begin_answer = start
        for number, length, sign in zip(
            (problems.a, problems.b, total), lengths, (PLUS, EQUAL, STOP), strict=True
        ):
            # Row by row, both masks hold as many places as the number has digits.
            digits, present = number.T, np.arange(len(number)) < length[:, None]
            if not self.reverse:
                digits, present = digits[:, ::-1], present[:, ::-1]
            begin_answer, end = start, start + length
            place = (columns >= start[:, None]) & (columns < end[:, None])
            lines[place] = digits[present]
            lines[np.arange(len(size)), end] = sign
            start = end + 1
        asked = (columns >= begin_answer[:, None]) & (columns < start[:, None])
        return lines, start, asked

    def _held_out_problems(self, split: str) -> Problems:
        """All problems of "validation" or "test", spread over the pairs of lengths in turn."""
        if split not in self._evaluation:
            wanted = self.arguments[f"{split}_examples"]
            span = range(self.min_digits, self.digits + 1)
            cells = [(i, j) for i in span for j in span]
            listed = {
                cell: _listed(*cell, self.held_out) for cell in cells if sum(cell) <= _ENUMERATED
            }
            sizes = np.array([listed[c].shape[1] if c in listed else wanted for c in cells])
            # Round r takes problem r of every pair that still has one.
            rounds, turn = np.nonzero(np.arange(sizes.max())[:, None] < sizes)
            rounds, turn = rounds[:wanted], turn[:wanted]
            lengths = np.array(cells).T[:, turn]
            # No seed: models that saw different training data are compared on the same sums.
            problems = _draw(
                0,
                _STREAMS[split],
                np.arange(len(turn)),
                lengths,
                self.digits,
                self.held_out,
                wanted=True,
            )
            for index, cell in enumerate(cells):
                if cell in listed:
                    here = np.flatnonzero(turn == index)
                    order = listed[cell] if split == "validation" else listed[cell][:, ::-1]
                    numbers = order[:, rounds[here]]
                    problems.a[:, here] = _digits(numbers[0], len(problems.a))
                    problems.b[:, here] = _digits(numbers[1], len(problems.b))
            self._evaluation[split] = problems
        return self._evaluation[split]


# ---------------------------------------------------------------------------- sums


def _add(a: Digits, b: Digits) -> Digits:
    """(digits, examples) and the same -> (digits + 1, examples)."""
    total = np.zeros((len(a) + 1, a.shape[1]), np.uint8)
    np.add(a, b, out=total[:-1])
    for column in range(len(a)):
        carry = total[column] > 9
        total[column + 1] += carry
        total[column] -= carry * np.uint8(10)
    return total


def _below(bits: Bits, bound: int) -> NDArray[np.uint32]:
    """(draws, examples) 64 bits -> (2 * draws, examples) integers from 0 to bound - 1.

    Half of the bits times the bound, shifted: uniform to bound / 2^32.
    """
    halves = np.concatenate([bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)])
    return ((halves * np.uint64(bound)) >> np.uint64(32)).astype(np.uint32)


def _draw(
    seed: int,
    stream: int,
    numbers: Integers,
    lengths: Integers,
    size: int,
    held_out: int,
    *,
    wanted: bool,
) -> Problems:
    """Draws sums of given lengths, in `size` digits, that are held out, or are not.

    Problem n is the first of its own sequence of candidates that is wanted, so it depends on n
    alone; only the examples still without one go into the next round.
    """
    places = np.arange(size)[:, None]
    operands = np.empty((2, size, len(numbers)), np.uint8)
    missing = np.arange(len(numbers))
    start = 1  # the first draw served the lengths
    while len(missing):
        # Half of each draw makes a digit of a, the other half the same digit of b.
        bits = random_bits(seed, stream, numbers[missing], size, start)
        digits = _below(bits, 10).astype(np.uint8).reshape(2, size, -1)
        first = 1 + _below(bits, 9).astype(np.uint8).reshape(2, size, -1)
        last = lengths[:, None, missing] - 1
        digits = np.where(places < last, digits, np.where(places == last, first, 0))
        operands[:, :, missing] = digits
        hashes = _hash(operands[0][:, missing]) + _hash(operands[1][:, missing])
        missing = missing[_is_held_out(hashes, held_out) != wanted]
        start += size
    return Problems(operands[0], operands[1], lengths)


# ---------------------------------------------------------------------------- held-out problems


def _hash(number: Digits) -> Bits:
    """A hash of each number (digits, examples) -> (examples,), the same with leading zeros.

    Sixteen digits go into a word of 64 bits, the most significant word is mixed in first; leading
    words of zeros change nothing, for mix(0) = 0.
    """
    result = np.zeros(number.shape[1], np.uint64)
    for start in reversed(range(0, len(number), 16)):
        word = np.zeros_like(result)
        for digit in reversed(number[start : start + 16]):
            word = (word << np.uint64(4)) | digit
        result = mix(result + word)
    return result


def _is_held_out(hashes: Bits, held_out: int) -> NDArray[np.bool_]:
    """Whether a problem is held out, from the sum of its operands' hashes: their order is lost."""
    return mix(hashes) % np.uint64(held_out) == 0


@lru_cache(maxsize=64)
def _listed(first: int, second: int, held_out: int) -> Integers:
    """All held-out problems of two lengths, shuffled: (2, problems), the operands as integers."""
    a, b = (np.arange(10 ** (length - 1), 10**length) for length in (first, second))
    hashes = _hash(_digits(a, first))[:, None] + _hash(_digits(b, second))
    found = np.stack(np.nonzero(_is_held_out(hashes, held_out)))
    order = np.argsort(random_bits(0, 3, np.arange(found.shape[1]), 1)[0], kind="stable")
    return found[:, order] + np.array([[a[0]], [b[0]]])


def _digits(numbers: Integers, size: int) -> Digits:
    """Integers -> (size, numbers) digits."""
    return (numbers // 10 ** np.arange(size)[:, None] % 10).astype(np.uint8)


def _integers(number: Digits) -> list[int]:
    """Digits -> Python integers of any length."""
    return [int("".join(map(str, digits[::-1]))) for digits in number.T.tolist()]
