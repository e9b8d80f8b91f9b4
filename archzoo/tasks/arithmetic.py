"""Addition, subtraction, multiplication and bitwise or of numbers of any length.

A new operation on two numbers is a class with `operators`, `answer_size` and `solve`, on arrays of
digits (digits, examples), least significant first::

    class Maximum(TwoNumbers):
        operators = "^="

        def answer_size(self, first, second):
            return np.maximum(first, second)

        def solve(self, a, b, lengths):
            return np.where(less(a, b), b, a), None
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from archzoo.tasks.counter_random import Bits, Integers, mix
from archzoo.tasks.digit_arrays import (
    Digits,
    Flags,
    add,
    below,
    from_bits,
    from_integers,
    hash_of,
    length,
    multiply,
    subtract,
    to_integers,
)
from archzoo.tasks.problems import LETTERS, Columns, Problems, SyntheticTask, are_held_out, shuffled
from archzoo.tasks.stream import IGNORED

_LISTED = 6  # digits of both operands together up to which all problems are listed


def exact_match(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether every answer token of a row is the most likely one, given the right ones before it.

    For a causal model without noise this is what greedy generation gives: the first token that is
    not the most likely one fails both. A row without labels is padding of the batch; ignore it.

    Args:
        logits: (batch, time, vocab_size).
        labels: (batch, time), -100 at unlabelled positions.

    Returns:
        (batch,) bool.
    """
    return ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(-1)


class TwoNumbers(SyntheticTask):
    """An operation on two numbers, `a+b=c`; a class of it has a `sign` and says how to `solve`.

    Both operands' lengths are uniform on min_digits..digits, so every pair of lengths comes equally
    often; then the digits are uniform, without leading zeros.

    Args:
        digits: Digits of the longest operand.
        min_digits: Digits of the shortest operand.
        reverse: Write numbers least significant digit first.
        reverse_answer: The same for the answer alone; null: as the operands.
        zero_padded: Write both operands with as many digits as the longer one has, and the answer
            with as many as it could have, zeros in front.
        hints: Put a letter before each digit that says which digit of its number it is, the same
            in all numbers of a problem, from a random letter on.
        coupled: Give the model position ids, for PositionCoupling: digits of equal significance
            have the same one. The answer must be reversed.
        held_out: One problem in this many is held out of training; at least 2.
        batch_size: Examples in a batch, all ranks together.
        steps_per_epoch: Batches in what Lightning calls an epoch; the stream itself never ends.
        validation_examples: Held-out problems to validate on.
        test_examples: Held-out problems to test on.
        ood_digits: Out-of-distribution lengths, longer than `digits`, that every validation runs
            as well: held-out problems of two numbers of that many digits each
            (`validation/exact_match/8`, ..., and their mean, `validation/exact_match/ood`, by
            which best.ckpt is then chosen).
        ood_examples: Problems of each of those lengths.
        seed: Chooses the training examples.
        vocabulary: shared gives the signs and letters of all tasks of problems a token each, so
            that a model that was trained on one can be adapted to another; own gives them only to
            those that this task writes.
        zero: Whether a number of one digit may be 0.
        separate_test: Whether validation and test each have half of the held-out problems; false:
            both ask all of them, as runs did before there was a choice.
        pack: Training problems in a row, each a document of its own: with 2 a batch of the same
            problems has some 23 % fewer tokens, most of them padding. What is learnt from it is
            the same. 1: each problem has a row.

    Raises:
        ValueError: an argument is out of range.
    """

    axes = ("digits of the first number", "digits of the second")
    ordered: ClassVar[bool] = False  # whether a and b may not be exchanged
    signed: ClassVar[bool] = False  # whether an answer may be negative
    vectors: ClassVar[bool] = False  # whether zeros at the end of an answer are written

    def __init__(
        self,
        digits: int = 3,
        min_digits: int = 1,
        reverse: bool = True,
        reverse_answer: bool | None = None,
        zero_padded: bool = False,
        hints: bool = False,
        coupled: bool = False,
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
        pack: int = 1,
    ) -> None:
        if not 1 <= min_digits <= digits:
            raise ValueError(f"min_digits {min_digits} is not between 1 and digits {digits}")
        self.digits = digits
        self.zero_padded = zero_padded
        self.reverse_answer = reverse if reverse_answer is None else reverse_answer
        if coupled and not self.reverse_answer:
            raise ValueError(
                "coupled counts an answer from its units, so it needs reverse_answer: true"
            )
        if coupled:
            self.coupling = "reversed" if reverse else "plain"
        super().__init__(((min_digits, digits), (min_digits, digits)))

    # What an operation says.

    def solve(self, a: Digits, b: Digits, lengths: Integers) -> tuple[Digits, Flags | None]:
        """The answers, (digits, examples), and which of them are negative (None: none).

        Args:
            a: (digits, examples).
            b: The same.
            lengths: (2, examples).
        """
        raise NotImplementedError

    # Which problems there are.

    def shape(self, extent: tuple[int, int]) -> tuple[int, int]:
        return 2, max(extent)

    def width(self, first: int, second: int) -> int:
        if self.zero_padded:
            first = second = max(first, second)
        digits = first + second + int(self.answer_size(first, second))
        return digits * (1 + self.hints) + self.signed + 3  # the operators, and stop

    def draws(self, extent: tuple[int, int]) -> int:
        return max(extent) + self.hints

    def candidates(self, bits: Bits, sizes: Integers, extent: tuple[int, int]) -> Problems:
        # Half of each draw makes a digit of a, the other half the same digit of b.
        size = max(extent)
        letters = below(bits[size:], len(LETTERS))[0] if self.hints else np.zeros(sizes.shape[1])
        operands = from_bits(bits[:size], sizes, zero=self.zero)
        return Problems(operands, sizes, letters.astype(np.int64))

    def hashes(self, problems: Problems) -> Bits:
        return _join(*map(hash_of, problems.operands), ordered=self.ordered)

    def listed(self, first: int, second: int) -> Problems | None:
        if first + second > _LISTED:
            return None
        found = _listed(first, second, self.held_out, self.ordered, self.zero)
        size = max(first, second)
        operands = np.stack([from_integers(numbers, size) for numbers in found])
        count = found.shape[1]
        return Problems(
            operands, np.repeat([[first], [second]], count, axis=1), np.arange(count) % len(LETTERS)
        )

    # Lines.

    def columns(self, problems: Problems) -> list[Columns]:
        (a, b), lengths, letters = problems
        answers, negative = self.solve(a, b, lengths)
        if self.zero_padded:
            lengths = np.broadcast_to(lengths.max(axis=0), lengths.shape)
        if self.zero_padded or self.vectors:
            answer_lengths = self.answer_size(*lengths)
        else:
            answer_lengths = length(answers)
        parts = [
            self.number(a, lengths[0], letters),
            self.sign(self.operators[0]),
            self.number(b, lengths[1], letters),
            self.sign("="),
            self.number(
                answers, answer_lengths, letters, reverse=self.reverse_answer, labelled=True
            ),
        ]
        if negative is not None:
            parts.insert(4, self.sign("-", labelled=True, present=negative))
        return parts

    # Text.

    def pairs(self, split: str, count: int) -> list[tuple[int, int]]:
        """The operands of the first `count` problems of a split."""
        a, b = self.problems(split, np.arange(count)).operands
        return list(zip(to_integers(a), to_integers(b), strict=True))

    def prompt(self, a: int, b: int) -> str:
        """The problem as it is written, up to and with `=`."""
        return self._line(a, b).partition("=")[0] + "="

    def answer(self, a: int, b: int) -> str:
        """What should follow the prompt, before the stop token."""
        return self._line(a, b).partition("=")[2]

    def parse(self, text: str) -> tuple[int, int, int]:
        """Reads a line `prompt + answer` back as (a, b, c).

        Raises:
            ValueError: the line is not of that form.
        """
        sign = self.operators[0]
        problem, equal, answer = text.partition("=")
        a, middle, b = problem.partition(sign)
        minus = "-" if answer.startswith("-") and sign == "-" else ""
        numbers = [a, b, answer.removeprefix(minus)]
        if self.hints:
            numbers = [re.sub("[A-Za-z]", "", number) for number in numbers]
        if not (equal and middle and all(number.isdecimal() for number in numbers)):
            raise ValueError(f"{text!r} is not of the form a{sign}b=c")
        orders = (self.reverse, self.reverse, self.reverse_answer)
        a, b, c = (n[::-1] if order else n for n, order in zip(numbers, orders, strict=True))
        return int(a), int(b), int(minus + c)

    def _line(self, *operands: int) -> str:
        lengths = np.array([[len(str(number))] for number in operands])
        digits = np.stack([from_integers([number], lengths.max()) for number in operands])
        return self.text(Problems(digits, lengths, np.zeros(1, np.int64)))[0]


def _join(first: Bits, second: Bits, *, ordered: bool) -> Bits:
    """The hash of a problem from those of its operands, whose order is lost in the sum."""
    return (mix(first) if ordered else first) + second


@lru_cache(maxsize=64)
def _listed(first: int, second: int, held_out: int, ordered: bool, zero: bool) -> Integers:
    """All held-out problems of two lengths, shuffled: (2, problems), the operands as integers."""
    least = (0 if zero and length == 1 else 10 ** (length - 1) for length in (first, second))
    a, b = (np.arange(low, 10**length) for low, length in zip(least, (first, second), strict=True))
    hashes = [hash_of(from_integers(a, first))[:, None], hash_of(from_integers(b, second))]
    found = np.stack(np.nonzero(are_held_out(_join(*hashes, ordered=ordered), held_out)))
    listed: Integers = found[:, shuffled(found.shape[1])] + np.array([[a[0]], [b[0]]])
    return listed


def _columns(least: int) -> list[list[tuple[int, int]]]:
    """Pairs of digits from `least` on that stop a carry, pass it on, or begin one."""
    pairs = [(a, b) for a in range(least, 10) for b in range(least, 10)]
    sums = [range(9), range(9, 10), range(10, 19)]
    return [[(a, b) for a, b in pairs if a + b in some] for some in sums]


_KINDS = _columns(0) + _columns(1)
_CHOICES = np.array([len(pairs) for pairs in _KINDS])
_COLUMNS = np.array([pairs + [(0, 0)] * (_CHOICES.max() - len(pairs)) for pairs in _KINDS])


class Addition(TwoNumbers):
    """Sums such as `12+345=357`: the model reads the problem and predicts the answer.

    With `reverse`, all three numbers are written least significant digit first, the order in which
    one adds: 814 + 6 = 820 becomes `418+6=028`. Each digit is one token, and so are `+`, `=`, the
    stop token after the answer and the pad token that fills rows up. 2 + 632 = 634 is trained as::

        position    0    1    2    3    4    5    6    7    8    9   10   11
        token       2    +    2    3    6    =    4    3    6 stop  pad  pad
        label       .    .    .    .    .    4    3    6 stop    .    .    .

    a + b and b + a are the same problem: both are held out, or neither.
    """

    operators = "+="
    carries = True

    def answer_size(self, first: Any, second: Any) -> Any:
        return np.maximum(first, second) + 1

    def solve(self, a: Digits, b: Digits, lengths: Integers) -> tuple[Digits, None]:
        return add(a, b), None

    def chained(self, digits: int, chain: int, count: int) -> Problems:
        if not 0 <= chain <= digits or digits < 3:  # of shorter sums there may be none held out
            raise ValueError(f"no sum of {digits} digits is made to carry through {chain} columns")
        numbers = (digits << 44) + (chain << 28) + np.arange(count)
        sizes = np.repeat([[digits], [digits], [chain]], count, axis=1)
        extent = (digits, digits)
        return self._draw(0, "chain", numbers, sizes, extent, "test", make=self._with_chain)

    def _with_chain(self, bits: Bits, sizes: Integers, extent: tuple[int, int]) -> Problems:
        """Random sums that carry through exactly sizes[2] columns in a row."""
        digits, chains = extent[0], sizes[2]
        # The first half of a draw makes a column, the second half of the first one says where the
        # chain begins.
        begins = below(bits, digits - chains + 1)[digits]
        column = np.arange(digits)[:, None] - begins.astype(np.int64)
        kinds = ((column >= 0) & (column < chains)) + 1 * ((column == 0) & (chains > 0))
        kinds[-1] += 3  # no leading zeros
        choices = below(bits[:digits], np.concatenate([_CHOICES[kinds]] * 2))[:digits]
        pairs = _COLUMNS[kinds, choices].astype(np.uint8)  # (digits, examples, 2)
        problems = Problems(pairs.transpose(2, 0, 1), sizes[:2], np.zeros(len(chains), np.int64))
        if self.hints:
            problems.letters[:] = below(bits[digits:], len(LETTERS))[0]
        return problems


class Subtraction(TwoNumbers):
    """Differences such as `345-12=333`, with a sign before the answer where it is negative.

    25 - 53 = -28, least significant digit first, is trained as::

        position    0    1    2    3    4    5    6    7    8    9   10   11
        token       5    2    -    3    5    =    -    8    2 stop  pad  pad
        label       .    .    .    .    .    -    8    2 stop    .    .    .

    a - b and b - a are two problems.
    """

    operators = "-="
    ordered = True
    signed = True

    def answer_size(self, first: Any, second: Any) -> Any:
        return np.maximum(first, second)

    def solve(self, a: Digits, b: Digits, lengths: Integers) -> tuple[Digits, Flags]:
        return subtract(a, b)


class Multiplication(TwoNumbers):
    """Products such as `12x34=408`.

    9 x 997 = 8973, least significant digit first, is trained as::

        position    0    1    2    3    4    5    6    7    8    9   10   11   12   13
        token       9    x    7    9    9    =    3    7    9    8 stop  pad  pad  pad
        label       .    .    .    .    .    3    7    9    8 stop    .    .    .    .
    """

    operators = "x="

    def answer_size(self, first: Any, second: Any) -> Any:
        return first + second

    def solve(self, a: Digits, b: Digits, lengths: Integers) -> tuple[Digits, None]:
        return multiply(a, b), None


class BitwiseOr(TwoNumbers):
    """The bitwise or of two vectors of zeros and ones of which one is all zeros.

    The other has a single one, and is the shorter one, so the task is to find a position and to
    copy a length. Vectors are aligned at their first position with `reverse`, as in the paper: in
    terms of numbers, the least significant bit comes first::

        position    0    1    2    3    4    5    6    7    8    9   10
        token       1    0    |    0    0    0    =    1    0    0 stop
        label       .    .    .    .    .    .    1    0    0 stop    .

    There are few such problems, min(i, j) of lengths i and j (twice as many where i = j), so one
    in 4 is held out, where it is one in 20 elsewhere. A one at the first position is never held
    out: every pair of lengths has something to train on.

    Source: McLeish et al., arXiv 2405.17399.

    Args:
        digits: Length of the longer vector.
        held_out: As for the other operations, and so are all others; zero means nothing here.
        **arguments: The same.
    """

    operators = "|="
    vectors = True

    def __init__(self, digits: int = 3, *, held_out: int = 4, **arguments: Any) -> None:
        super().__init__(digits, held_out=held_out, **arguments)

    def draws(self, extent: tuple[int, int]) -> int:
        return 1 + self.hints

    def candidates(self, bits: Bits, sizes: Integers, extent: tuple[int, int]) -> Problems:
        problems = self.blank(sizes.shape[1], extent)
        first = sizes[0] < sizes[1]
        position, coin = below(bits[:1], np.stack([sizes.min(axis=0), np.full(len(first), 2)]))
        owner = np.where(sizes[0] == sizes[1], coin, 1 - first)
        problems.operands[owner, position, np.arange(len(first))] = 1
        problems.lengths[:] = sizes
        if self.hints:
            problems.letters[:] = below(bits[1:], len(LETTERS))[0]
        return problems

    def hashes(self, problems: Problems) -> Bits:
        # Every position in a vector adds one, so that vectors of different lengths differ.
        positions = np.arange(problems.operands.shape[1])[:, None]
        marked = problems.operands + (positions < problems.lengths[:, None]).astype(np.uint8)
        return _join(*map(hash_of, marked), ordered=self.ordered)

    def is_held_out(self, problems: Problems) -> Flags:
        held: Flags = super().is_held_out(problems) & (problems.operands[:, 0] == 0).all(axis=0)
        return held

    def listed(self, first: int, second: int) -> Problems:
        owners = (0, 1) if first == second else (int(first > second),)
        every = [(owner, position) for owner in owners for position in range(min(first, second))]
        problems = self.blank(len(every), (first, second))
        problems.operands[*np.array(every).T, np.arange(len(every))] = 1
        problems.lengths[:] = [[first], [second]]
        return self._chosen(problems)

    def answer_size(self, first: Any, second: Any) -> Any:
        return np.maximum(first, second)

    def solve(self, a: Digits, b: Digits, lengths: Integers) -> tuple[Digits, None]:
        return a | b, None
