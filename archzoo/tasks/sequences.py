"""Synthetic sequences of a size: what recall, copying and state tracking are built on.

Nothing runs over the examples one by one, and nothing remembers what it drew: example n is a
function of the seed and n. Which of the three parts a problem belongs to is read off a hash of what
decides its labels, so that no problem of one part is ever in another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from archzoo.tasks.counter_random import Bits, Integers, mix, random_bits
from archzoo.tasks.digit_arrays import below
from archzoo.tasks.stream import IGNORED, Batch, Loader, Task
from archzoo.tasks.tokenizers import WordTokenizer

PARTS = ("train", "validation", "test")
STREAMS = {"problem": 16, "size": 17, "rest": 18, "table": 19}  # the others' are in problems.py
FEW = 64  # numbers that are sorted to permute them; a network is not uniform over fewer
ROUNDS = 4  # of that network
AT_ONCE = 2**22  # tokens of candidates that are held at once
TRIES = 100  # rounds of looking for problems of one part before there are none


class Sequences(NamedTuple):
    """Rows of one length.

    Attributes:
        tokens: (rows, length) int64.
        labels: (rows, length) int64, as those of a batch.
    """

    tokens: Integers
    labels: Integers


class SequenceTask(Task):
    """Sequences of some sizes, labelled where the answer can be known.

    A size is two integers, of which `axes` says what they are. Training draws the sizes of `sizes`
    in their proportions, `alike` examples in a row of one size; validation and test ask all of them
    equally often. The test also reports each of `test_sizes` by itself, as
    `test/token_accuracy/64x256` and `test/exact_match/64x256`.

    `token_accuracy` is the fraction of labels that are predicted, `exact_match` that of rows
    without a mistake.

    One problem in `held_out` is never trained on, the same for every seed; half of them are the
    validation part, the others the test part.

    A class says what its problems are by `check_size`, `length`, `problem_draws`, `problems`,
    `hashes`, `rest_draws` and `write`.

    Attributes:
        axes: What the two integers of a size are.
        sizes: Those of training.
        test_sizes: Those that the test reports one by one.

    Args:
        words: What the tokens are called, in their order.
        sizes: Of training, each with a weight where it has a third number.
        test_sizes: Of the test.
        **arguments: What the constructor of the class does not take of `Recall`'s arguments.
    """

    metrics = ("token_accuracy", "exact_match")
    extra_metrics = ("token_accuracy", "exact_match")
    tokenizer: WordTokenizer
    axes: ClassVar[tuple[str, str]]
    other_vocabulary = "give both tasks the same sizes of the vocabulary"

    def __init__(
        self,
        words: Sequence[str],
        sizes: Sequence[Sequence[int]],
        test_sizes: Sequence[Sequence[int]],
        /,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        arguments = self.arguments
        self.held_out: int = arguments["held_out"]
        if self.held_out < 2:
            raise ValueError(
                f"held_out {self.held_out} leaves nothing to train on: one problem in held_out is "
                "kept out of training, so take 2 or more"
            )
        for name in ("alike", "steps_per_epoch", "validation_examples", "test_examples"):
            if arguments[name] < 1:
                raise ValueError(f"{name} {arguments[name]} is not positive")
        if not sizes:
            raise ValueError(f"sizes is empty: give one at least, {self._example()}")
        self.sizes = [self._checked(size) for size in sizes]
        self.test_sizes = [self._checked(size) for size in test_sizes]
        weights = [size[2] if len(size) > 2 else 1 for size in sizes]
        if min(weights) < 1:
            raise ValueError(f"sizes {list(map(list, sizes))} holds a weight that is not positive")
        self._ends = np.cumsum(weights)  # of each size's share
        self.seed: int = arguments["seed"]
        self.tokenizer = WordTokenizer(words)
        self.context_length = max(self.length(*size) for size in self.sizes + self.test_sizes)
        alone = self.test_sizes == self.sizes and len(self.sizes) == 1
        self._by_name = {} if alone else {f"{a}x{b}": (a, b) for a, b in self.test_sizes}

    def _checked(self, size: Sequence[int]) -> tuple[int, int]:
        if len(size) not in (2, 3) or any(type(part) is not int for part in size):
            raise ValueError(f"size {list(size)} is not two integers, {self._example()}")
        if min(size[:2]) < 1:
            raise ValueError(f"size {list(size)} holds a number that is not positive")
        self.check_size(size[0], size[1])
        return size[0], size[1]

    def _example(self) -> str:
        return f"[{self.axes[0]}, {self.axes[1]}]"

    # What a class says.

    def check_size(self, first: int, second: int) -> None:
        """Refuses a size that no problem has.

        Raises:
            ValueError: The message says what there is.
        """

    def length(self, first: int, second: int) -> int:
        """Tokens of a row of a size."""
        return second

    def problem_draws(self, first: int, second: int) -> int:
        """How many random numbers of 64 bits make a problem."""
        raise NotImplementedError

    def problems(self, bits: Bits, first: int, second: int) -> Integers:
        """What decides the labels of each row.

        Args:
            bits: (draws, rows).
            first: Of the size.
            second: The same.

        Returns:
            (rows, numbers).
        """
        raise NotImplementedError

    def hashes(self, problems: Integers) -> Bits:
        """(rows,): equal for problems that are the same."""
        return hash_rows(problems)

    def rest_draws(self, first: int, second: int) -> int:
        """How many random numbers make the rest of a row, that decides no label."""
        return 0

    def write(self, problems: Integers, bits: Bits, first: int, second: int) -> Sequences:
        """Problems as rows of tokens.

        Args:
            problems: (rows, numbers).
            bits: (draws, rows), of the rest.
            first: Of the size.
            second: The same.
        """
        raise NotImplementedError

    # Batches.

    def prepare(self) -> None:
        pass  # there is nothing to read or to learn

    def rows(self, split: str) -> int:
        if split == "train":
            return int(self.arguments["steps_per_epoch"]) * self.batch_size
        return int(self.arguments[f"{split}_examples"])

    def training_batch(self, number: int, rows: Integers) -> Batch:
        numbers = number * self.batch_size + rows
        groups = numbers // self.arguments["alike"]
        bits = random_bits(self.seed, STREAMS["size"], groups, 1)
        shares = below(bits, int(self._ends[-1]))[0]
        return self._batch("train", numbers, np.searchsorted(self._ends, shares, "right"))

    def evaluation_batch(self, split: str, number: int, rows: Integers) -> Batch:
        # The sizes one after the other, so that most batches have no padding.
        share = -(-self.rows(split) // len(self.sizes))
        size, numbers = np.divmod(number * self.batch_size + rows, share)
        return self._batch(split, numbers, size)

    def extra_evaluations(self, split: str) -> tuple[int | str, ...]:
        return tuple(self._by_name) if split == "test" else ()

    def extra_evaluation_loader(self, split: str, name: Any) -> Loader:
        size = self._by_name[name]

        def make(number: int, rows: Integers) -> Batch:
            return batch_of(self.sequences(split, number * self.batch_size + rows, *size))

        return Loader(make, self.batch_size, self.rows(split), self, training=False)

    def _batch(self, part: str, numbers: Integers, which: Integers) -> Batch:
        """Examples of one part, each of the size whose index `which` says."""
        present = np.unique(which).tolist()
        if len(present) == 1:
            return batch_of(self.sequences(part, numbers, *self.sizes[present[0]]))
        width = max(self.length(*self.sizes[index]) for index in present)
        whole = Sequences(
            np.zeros((len(numbers), width), np.int64), np.full((len(numbers), width), IGNORED)
        )
        lengths = np.zeros(len(numbers), np.int64)
        for index in present:
            mine = np.flatnonzero(which == index)
            found = self.sequences(part, numbers[mine], *self.sizes[index])
            lengths[mine] = columns = found.tokens.shape[1]
            whole.tokens[mine, :columns], whole.labels[mine, :columns] = found
        padding = np.arange(width) >= lengths[:, None]
        return batch_of(whole) | {"documents": torch.from_numpy(-padding.astype(np.int64))}

    # Examples.

    def sequences(self, part: str, numbers: Integers, first: int, second: int) -> Sequences:
        """Examples of one size.

        Those of validation and test are the same for every seed.

        Args:
            part: "train", "validation" or "test".
            numbers: (rows,) Of the examples.
            first: Of the size.
            second: The same.
        """
        seed = self.seed if part == "train" else 0
        if part != "train":  # a sequence of numbers for each size and part
            numbers = (first << 44) + (second << 30) + (PARTS.index(part) << 28) + numbers
        problems = self._draw(seed, part, numbers, first, second)
        bits = random_bits(seed, STREAMS["rest"], numbers, self.rest_draws(first, second))
        return self.write(problems, bits, first, second)

    def part_of(self, problems: Integers) -> Integers:
        """Which of `PARTS` problems belong to, (rows,)."""
        bits = mix(self.hashes(problems) + np.uint64(1))  # no hash, 0 either, is an exception
        held, half = bits % np.uint64(self.held_out) == 0, bits // np.uint64(self.held_out)
        return np.where(held, 1 + (half % np.uint64(2)).astype(np.int64), 0)

    def _draw(self, seed: int, part: str, numbers: Integers, first: int, second: int) -> Integers:
        """Problems of one part.

        Problem n is the first of its own sequence of candidates that belongs to the part, so it
        depends on n alone.
        """
        draws, wanted = self.problem_draws(first, second), PARTS.index(part)
        tries = 1 + self.held_out // 2 if wanted else 1  # four times as many on average
        rows = max(AT_ONCE // (tries * self.length(first, second)), 1)
        if len(numbers) > rows:
            parts = [numbers[i : i + rows] for i in range(0, len(numbers), rows)]
            return np.concatenate([self._draw(seed, part, p, first, second) for p in parts])
        missing, found = np.arange(len(numbers)), np.zeros((0, 0), np.int64)
        for start in range(0, draws * tries * TRIES, draws * tries):
            bits = random_bits(seed, STREAMS["problem"], numbers[missing], draws * tries, start)
            bits = bits.reshape(tries, draws, -1).swapaxes(0, 1).reshape(draws, -1)
            candidates = self.problems(bits, first, second)
            fits = (self.part_of(candidates) == wanted).reshape(tries, -1)
            chosen = candidates[fits.argmax(axis=0) * len(missing) + np.arange(len(missing))]
            if len(found):
                found[missing] = chosen
            else:
                found = chosen
            missing = missing[~fits.any(axis=0)]
            if not len(missing):
                return found
        raise ValueError(
            f"{self.axes[0]} {first}, {self.axes[1]} {second}: none of the few problems of that "
            f"size is in the {part} part; take another held_out than {self.held_out}, or a larger "
            "size"
        )

    def text(self, sequences: Sequences) -> list[str]:
        """Rows as they are written."""
        return [self.tokenizer.decode(row) for row in sequences.tokens.tolist()]


def batch_of(sequences: Sequences) -> Batch:
    """A batch of rows of one length."""
    tokens, labels = sequences
    return {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def hash_rows(numbers: Integers) -> Bits:
    """(rows, numbers) -> (rows,), a hash of each row, in which the order counts."""
    result = np.full(len(numbers), numbers.shape[1], np.uint64)
    for column in numbers.T.astype(np.uint64):
        result = mix(result + column + np.uint64(1))
    return result


def places(bits: Bits, count: int, *, ordered: bool = True) -> Integers:
    """Some of several places for each row, all choices equally likely.

    Args:
        bits: (places, rows).
        count: How many are chosen.
        ordered: Whether they are sorted.

    Returns:
        (rows, count).
    """
    chosen = np.argsort(bits.T, axis=1)[:, :count]
    return np.sort(chosen, axis=1) if ordered else chosen


def permuted(keys: Bits, numbers: Integers, count: int) -> Integers:
    """A random permutation of 0 .. count - 1 for each row, of which only `numbers` are looked at.

    A few numbers are sorted by random bits. For many this is a Feistel network of `ROUNDS` rounds
    (Luby and Rackoff, 1988) over the next larger square, run again where it leads out of the range:
    distinct numbers give distinct ones, and no row lists all of them.

    Args:
        keys: (rows,) 64 random bits each, which choose the permutation.
        numbers: (rows, columns), from 0 to count - 1.
        count: How many there are.
    """
    if count <= FEW:
        offsets: Bits = np.arange(1, count + 1).astype(np.uint64)
        return np.take_along_axis(np.argsort(mix(keys[:, None] + offsets), axis=1), numbers, axis=1)
    half = math.ceil(math.log2(count) / 2)  # bits
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    schedule = [mix(keys + np.uint64(index + 1)) for index in range(ROUNDS)]

    def encrypt(values: Bits, rows: Integers) -> Bits:
        left, right = values >> shift, values & mask
        for key in schedule:
            left, right = right, left ^ (mix(key[rows] + right) & mask)
        return (left << shift) | right

    rows = np.repeat(np.arange(len(numbers)), numbers.shape[1])
    result = numbers.reshape(-1).astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        result[outside] = encrypt(result[outside], rows[outside])
        outside = outside[result[outside] >= count]
    return result.reshape(numbers.shape).astype(np.int64)
