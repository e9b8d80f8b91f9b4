"""Sorting of numbers of any length."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from archzoo.tasks.counter_random import Bits, Integers
from archzoo.tasks.digit_arrays import below, from_bits, from_integers, hash_of, length, words
from archzoo.tasks.problems import LETTERS, Columns, Problems, SyntheticTask


class Sorting(SyntheticTask):
    """Numbers to sort, each with a key: `A:52,B:7,C:31=B,C,A`.

    2 and 7, least significant digit first, are trained as::

        position    0    1    2    3    4    5    6    7    8    9   10   11   12
        token       c    :    2    ,    d    :    7    =    c    ,    d stop  pad
        label       .    .    .    .    .    .    .    c    ,    d stop    .    .

    The answer names the keys by ascending value, ties in the order of the list. Keys run on
    through the alphabet from a random letter. The size of a problem is how many numbers there are
    and how many digits they have at most; both are uniform, and the digits of each number are
    uniform up to that.

    Problems with the same numbers are the same, whatever their order and their keys.

    Source: McLeish et al., arXiv 2405.17399.

    Args:
        numbers: How many to sort at most.
        digits: Of the longest number.
        reverse: Write numbers least significant digit first.
        hints: As for two numbers.
        held_out: One problem in this many is held out of training; at least 2.
        batch_size: Examples in a batch, all ranks together.
        steps_per_epoch: Batches in what Lightning calls an epoch; the stream itself never ends.
        validation_examples: Held-out problems to validate on.
        test_examples: Held-out problems to test on.
        ood_digits: Out-of-distribution sizes that every validation runs as well: 12 stands for 12
            numbers of up to 12 digits; see `Addition`.
        ood_examples: Problems of each of those sizes.
        seed: Chooses the training examples.
        vocabulary: As for two numbers.
        zero: The same.
        separate_test: The same.

    Raises:
        ValueError: an argument is out of range.
    """

    operators = ":,="
    axes = ("numbers", "digits of the longest")
    answer_parts = ("key", "the first")
    has_keys = True

    def __init__(
        self,
        numbers: int = 3,
        digits: int = 3,
        reverse: bool = True,
        hints: bool = False,
        held_out: int = 20,
        batch_size: int = 256,
        steps_per_epoch: int = 1000,
        validation_examples: int = 1000,
        test_examples: int = 5000,
        ood_digits: list[int] | None = None,
        ood_examples: int = 200,
        seed: int = 0,
        vocabulary: Literal["shared", "own"] = "shared",
        zero: bool = True,
        separate_test: bool = True,
    ) -> None:
        for name, value in (("numbers", numbers), ("digits", digits)):
            if value < 1:
                raise ValueError(f"{name} {value} is not positive")
        self.shape((numbers, digits))  # there must be keys for all
        super().__init__(((1, numbers), (1, digits)))

    def shape(self, extent: tuple[int, int]) -> tuple[int, int]:
        if extent[0] > len(LETTERS):
            raise ValueError(f"there are keys for {len(LETTERS)} numbers, not for {extent[0]}")
        return extent

    def answer_size(self, first: Any, second: Any) -> Any:
        return second  # the answer has none; this is what a line has

    def width(self, first: int, second: int) -> int:
        # A number has a key, a colon, a comma or =; its key is in the answer once more, with
        # a comma or stop.
        return first * (second * (1 + self.hints) + 5)

    def draws(self, extent: tuple[int, int]) -> int:
        pairs, digits = -(-extent[0] // 2), extent[1]  # two numbers share the bits
        return 1 + pairs * (1 + digits)

    def candidates(self, bits: Bits, sizes: Integers, extent: tuple[int, int]) -> Problems:
        numbers, pairs = np.arange(extent[0])[:, None], -(-extent[0] // 2)
        lengths = 1 + below(bits[1 : 1 + pairs], sizes[1]).astype(np.int64)
        lengths[: extent[0]][numbers >= sizes[0]] = 0
        lengths[extent[0] :] = 0
        operands = from_bits(bits[1 + pairs :], lengths, zero=self.zero)
        letters = below(bits[:1], len(LETTERS))[0].astype(np.int64)
        return Problems(operands[: extent[0]], lengths[: extent[0]], letters)

    def hashes(self, problems: Problems) -> Bits:
        numbers, digits, _ = problems.operands.shape
        flat = problems.operands.transpose(1, 0, 2).reshape(digits, -1)
        summed: Bits = hash_of(flat).reshape(numbers, -1).sum(axis=0)
        return summed

    def listed(self, first: int, second: int) -> Problems | None:
        if first * second > 4:  # 9,999 lists
            return None
        least = 0 if self.zero else 1
        values = np.indices((10**second - least,) * first).reshape(first, -1) + least
        operands = np.stack([from_integers(numbers, second) for numbers in values])
        lengths = np.stack([length(number) for number in operands])
        return self._chosen(Problems(operands, lengths, np.arange(values.shape[1]) % len(LETTERS)))

    def columns(self, problems: Problems) -> list[Columns]:
        operands, lengths, letters = problems
        numbers, digits, count = operands.shape
        there = lengths.T > 0  # (examples, numbers)
        keys = self.letters_from(letters, np.arange(numbers))
        written = self.number(  # every number as an example of its own, example by example
            operands.transpose(1, 2, 0).reshape(digits, -1),
            lengths.T.reshape(-1),
            np.repeat(letters, numbers),
        )
        comma, colon = (np.full_like(keys, self.sign(sign).symbols) for sign in ",:")
        follows = there & (np.arange(numbers) > 0)

        def side_by_side(*entries: Any) -> Any:
            """(examples, numbers[, columns]) each -> (examples, all columns of all numbers)."""
            whole = np.concatenate([e.reshape(count, numbers, width) for e, width in entries], 2)
            return whole.reshape(count, numbers * whole.shape[2])

        wide = written.symbols.shape[1]
        symbols = side_by_side((comma, 1), (keys, 1), (colon, 1), (written.symbols, wide))
        present = side_by_side((follows, 1), (there, 1), (there, 1), (written.present, wide))
        positions = np.tile(np.concatenate([[1, 0, 1], written.positions]), numbers)
        # The last sign has the say: numbers that are not there come last.
        words_of = [
            word.reshape(numbers, -1).T
            for word in words(operands.transpose(1, 0, 2).reshape(digits, -1))
        ]
        order = np.lexsort((*words_of, ~there), axis=-1)
        answer = side_by_side((comma, 1), (np.take_along_axis(keys, order, axis=1), 1))
        answered = side_by_side((follows, 1), (there, 1))
        ranks = np.stack([np.ones(numbers, np.int64), np.arange(numbers) + 2], axis=1).reshape(-1)
        return [
            Columns(symbols, present, positions, labelled=False),
            self.sign("="),
            Columns(answer, answered, ranks, labelled=True),
        ]
