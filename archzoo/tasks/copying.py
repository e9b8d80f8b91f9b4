"""Copying, selective copying and induction: symbols that must be found again further on."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from archzoo.tasks.counter_random import Bits, Integers
from archzoo.tasks.digit_arrays import below
from archzoo.tasks.sequences import Sequences, SequenceTask, places
from archzoo.tasks.stream import IGNORED

BLANK, COPY = "_", "copy"
SYMBOLS = 2  # the token of the first symbol, after these


class Copying(SequenceTask):
    """Symbols, blanks, and then the symbols once more, each in its turn.

    Three symbols in a row of 12 are trained as::

        position    0    1    2    3    4    5    6    7    8    9   10   11
        token      s0   s5   s5    _    _    _    _    _ copy    _    _    _
        label       .    .    .    .    .    .    .    .    .   s0   s5   s5

    After `copy` each blank asks for the next symbol; none of them is shown again. A problem is what
    is copied: a sequence of symbols that is held out is never trained on.

    The defaults are MAD-lab's for selective copying (athms/mad-lab, Poli et al., arXiv 2403.17844):
    16 tokens, 16 symbols to copy in a row of 256.

    Args:
        vocabulary: Tokens: blank, `copy`, and the symbols.
        sizes: Symbols and length of training, each with a weight where it has a third number.
            None: 16 in 256.
        test_sizes: Those that the test reports one by one. None: those of `sizes`.
        held_out: One problem in this many is held out of training; at least 2.
        alike: Training examples in a row of one size. A batch of as many has no padding.
        batch_size: Examples in a batch, all ranks together.
        steps_per_epoch: Batches in what Lightning calls an epoch; the stream itself never ends.
        validation_examples: Held-out problems to validate on, of all `sizes` together.
        test_examples: Held-out problems to test on, and of each of `test_sizes` as many.
        seed: Chooses the training examples.

    Raises:
        ValueError: an argument is out of range.
    """

    axes = ("symbols", "length")
    scattered: ClassVar[bool] = False  # whether blanks are between the symbols

    def __init__(
        self,
        vocabulary: int = 16,
        sizes: list[list[int]] | None = None,
        test_sizes: list[list[int]] | None = None,
        held_out: int = 20,
        alike: int = 256,
        batch_size: int = 128,
        steps_per_epoch: int = 1000,
        validation_examples: int = 1000,
        test_examples: int = 1000,
        seed: int = 0,
    ) -> None:
        self.symbols = symbols_of(vocabulary, SYMBOLS)
        sizes = [[16, 256]] if sizes is None else sizes
        words = [BLANK, COPY, *(f"s{symbol}" for symbol in range(self.symbols))]
        super().__init__(words, sizes, sizes if test_sizes is None else test_sizes)

    def check_size(self, first: int, second: int) -> None:
        if second < 2 * first + 1:
            raise ValueError(
                f"{first} symbols do not fit in a length of {second}: each takes two tokens, and "
                f"{COPY} one"
            )

    def problem_draws(self, first: int, second: int) -> int:
        return -(-first // 2)

    def problems(self, bits: Bits, first: int, second: int) -> Integers:
        return below(bits, self.symbols)[:first].T.astype(np.int64)

    def rest_draws(self, first: int, second: int) -> int:
        return second - first - 1 if self.scattered else 0

    def write(self, problems: Integers, bits: Bits, first: int, second: int) -> Sequences:
        tokens = np.zeros((len(problems), second), np.int64)
        where = places(bits, first) if self.scattered else np.arange(first)[None]
        np.put_along_axis(tokens, np.broadcast_to(where, problems.shape), SYMBOLS + problems, 1)
        tokens[:, second - first - 1] = 1
        labels = np.full(tokens.shape, IGNORED)
        labels[:, second - first :] = SYMBOLS + problems
        return Sequences(tokens, labels)


class SelectiveCopying(Copying):
    """Symbols scattered among blanks, and then the symbols alone, each in its turn.

    Three symbols in a row of 12 are trained as::

        position    0    1    2    3    4    5    6    7    8    9   10   11
        token       _   s0    _   s5    _    _    _   s5 copy    _    _    _
        label       .    .    .    .    .    .    .    .    .   s0   s5   s5

    What must be kept is told from what must not by its content, and no longer by its place. All
    else is as in `Copying`; the task is that of Gu and Dao, arXiv 2312.00752, with MAD-lab's sizes.

    Args:
        vocabulary: Tokens: blank, `copy`, and the symbols.
        sizes: Symbols and length of training, each with a weight where it has a third number.
            None: 16 in 256.
        test_sizes: Those that the test reports one by one. None: those of `sizes`.
        held_out: One problem in this many is held out of training; at least 2.
        alike: Training examples in a row of one size. A batch of as many has no padding.
        batch_size: Examples in a batch, all ranks together.
        steps_per_epoch: Batches in what Lightning calls an epoch; the stream itself never ends.
        validation_examples: Held-out problems to validate on, of all `sizes` together.
        test_examples: Held-out problems to test on, and of each of `test_sizes` as many.
        seed: Chooses the training examples.

    Raises:
        ValueError: an argument is out of range.
    """

    scattered = True


class Induction(SequenceTask):
    """Random symbols with triggers among them: what came after this one?

    One trigger in a row of 12 is trained as::

        position  0  1  2  3  4  5  6  7  8  9 10 11
        token    s1 s4 s2 s0 s6 s6 s5 s4 t0 s6 s3 t0
        label     .  .  .  .  .  .  .  .  .  .  . s6

    Each trigger comes once, with a symbol after it; at the end one of them comes again. With one
    trigger this is the induction heads task of Gu and Dao, arXiv 2312.00752: 16 tokens in a row of
    256. Only the last position is labelled, as there: trained on every next token, which is noise,
    models that can learn it do not (state-spaces/mamba, issue 62).

    A problem is a whole row: one that is held out is never trained on.

    Args:
        vocabulary: Tokens: the triggers of the largest size, and the symbols.
        sizes: Triggers and length of training, each with a weight where it has a third number.
            None: 1 in 256.
        test_sizes: Those that the test reports one by one. None: those of `sizes`, and where these
            are left to their default 1 in 64, 128, 256, 512 and 1,024.
        held_out: One problem in this many is held out of training; at least 2.
        alike: Training examples in a row of one size. A batch of as many has no padding.
        batch_size: Examples in a batch, all ranks together.
        steps_per_epoch: Batches in what Lightning calls an epoch; the stream itself never ends.
        validation_examples: Held-out problems to validate on, of all `sizes` together.
        test_examples: Held-out problems to test on, and of each of `test_sizes` as many.
        seed: Chooses the training examples.

    Raises:
        ValueError: an argument is out of range.
    """

    axes = ("triggers", "length")

    def __init__(
        self,
        vocabulary: int = 16,
        sizes: list[list[int]] | None = None,
        test_sizes: list[list[int]] | None = None,
        held_out: int = 20,
        alike: int = 256,
        batch_size: int = 32,
        steps_per_epoch: int = 1000,
        validation_examples: int = 1000,
        test_examples: int = 1000,
        seed: int = 0,
    ) -> None:
        if test_sizes is None:
            test_sizes = sizes or [[1, 2**power] for power in range(6, 11)]
        sizes = [[1, 256]] if sizes is None else sizes
        self.triggers = max((size[0] for size in [*sizes, *test_sizes] if size), default=1)
        self.symbols = symbols_of(vocabulary, self.triggers)
        names = [*(f"t{n}" for n in range(self.triggers)), *(f"s{n}" for n in range(self.symbols))]
        super().__init__(names, sizes, test_sizes)

    def check_size(self, first: int, second: int) -> None:
        if first > self.triggers:  # of a grid
            raise ValueError(f"the vocabulary has {self.triggers} triggers, not {first}")
        if second < 2 * first + 1:
            raise ValueError(
                f"{first} triggers do not fit in a length of {second}: each takes two tokens, and "
                "the question one"
            )

    def problem_draws(self, first: int, second: int) -> int:
        return 1 + -(-second // 2) + (second - 1) // 2

    def problems(self, bits: Bits, first: int, second: int) -> Integers:
        # Whole rows: pairs of neighbours, of which some begin with a trigger.
        count = -(-second // 2)
        tokens = self.triggers + below(bits[1 : 1 + count], self.symbols)[:second].T.astype(
            np.int64
        )
        asked, odd = below(bits[:1], np.array([[first], [2]])).astype(np.int64)
        # An odd number of other places leaves one out, at the beginning or before the question.
        begin = odd * (1 - second % 2)
        where = begin[:, None] + 2 * places(bits[1 + count :], first, ordered=False)
        np.put_along_axis(tokens, where, np.broadcast_to(np.arange(first), where.shape), 1)
        tokens[:, -1] = asked
        return tokens

    def write(self, problems: Integers, bits: Bits, first: int, second: int) -> Sequences:
        labels = np.full(problems.shape, IGNORED)
        after = (problems[:, :-1] == problems[:, -1:]).argmax(axis=1) + 1
        labels[:, -1] = np.take_along_axis(problems, after[:, None], axis=1)[:, 0]
        return Sequences(problems, labels)


def symbols_of(vocabulary: int, others: int) -> int:
    """How many symbols a vocabulary has beside other tokens.

    Raises:
        ValueError: Fewer than two.
    """
    if vocabulary < others + 2:
        raise ValueError(
            f"vocabulary {vocabulary} has no two symbols beside {others} other tokens: take "
            f"{others + 2} or more"
        )
    return vocabulary - others
