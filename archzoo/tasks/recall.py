"""Associative recall: which value did a key have?"""

from __future__ import annotations

import numpy as np

from archzoo.tasks.counter_random import Bits, Integers, mix
from archzoo.tasks.digit_arrays import below, high
from archzoo.tasks.sequences import Sequences, SequenceTask, permuted
from archzoo.tasks.stream import IGNORED

FILLER = "_"

# Of zoology's recipe: pairs, length, and of training the weight.
TRAINED = ((4, 64, 5), (8, 128, 1), (16, 256, 1), (32, 256, 1), (64, 256, 1))
TESTED = ((4, 64), (8, 64), (16, 64), (32, 128), (64, 256), (128, 512), (256, 1024))


class Recall(SequenceTask):
    """Multi-query associative recall: pairs of a key and a value, then each key once more.

    Two pairs in a row of 12, with fillers that are not random, are trained as::

        position  0  1  2  3  4  5  6  7  8  9 10 11
        token    k4 v2 k1 v5 k4  _  _  _ k1  _  _  _
        label     .  .  .  . v2  .  .  . v5  .  .  .

    The label of a key's second place is its value, which the row does not show there. A row has
    distinct keys and distinct values. The gaps follow a power law: of the places 1, 2, 3, ... after
    the pairs, every other position, place i is taken with a probability that goes as
    ``i ** (power - 1)``, the first key first.

    The defaults are zoology's recipe (HazyResearch/zoology, the configuration of figure 2 of Arora
    et al., arXiv 2402.18668): 8,192 tokens, training on 4 to 64 pairs, five ninths of it on 4, test
    on 4 to 256 pairs in 64 to 1,024 tokens. Its accuracy is `token_accuracy` here. One thing
    differs: the positions that ask nothing hold keys that the row does not have. There they hold
    any token, so that a key of the row may come with another value before it is asked for
    (issue 29); with `random_filler` off they hold one and the same token, as in Arora et al., arXiv
    2312.04927.

    A problem is which key has which value, whatever the order of the pairs: one that is held out is
    never trained on, with whatever gaps and fillers.

    Args:
        vocabulary: Tokens: the filler, then keys, then as many values or one more.
        sizes: Pairs and length of training, each with a weight where it has a third number.
            None: zoology's.
        test_sizes: Those that the test reports one by one. None: zoology's, or those of `sizes`.
        power: Of the gaps; 1 makes all places equally likely.
        random_filler: Fill the other positions with keys that the row does not have.
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

    axes = ("pairs", "length")

    def __init__(
        self,
        vocabulary: int = 8192,
        sizes: list[list[int]] | None = None,
        test_sizes: list[list[int]] | None = None,
        power: float = 0.01,
        random_filler: bool = True,
        held_out: int = 20,
        alike: int = 256,
        batch_size: int = 256,
        steps_per_epoch: int = 1000,
        validation_examples: int = 1000,
        test_examples: int = 1000,
        seed: int = 0,
    ) -> None:
        if vocabulary < 5:
            raise ValueError(
                f"vocabulary {vocabulary} has no two keys and two values: take 5 or more"
            )
        if not power > 0:
            raise ValueError(f"power {power} must be above 0; 1 makes all places equally likely")
        self.keys = (vocabulary - 1) // 2
        self.values = vocabulary - 1 - self.keys
        self.power, self.random_filler = power, random_filler
        if test_sizes is None:
            test_sizes = [list(size) for size in (TESTED if sizes is None else sizes)]
        keys = [f"k{key}" for key in range(self.keys)]
        values = [f"v{value}" for value in range(self.values)]
        trained = TRAINED if sizes is None else sizes
        super().__init__([FILLER, *keys, *values], trained, test_sizes)

    def check_size(self, first: int, second: int) -> None:
        if second < 4 * first:
            raise ValueError(
                f"{first} pairs do not fit in a length of {second}: each takes four tokens, two "
                "of its own and two where it is asked for"
            )
        if first > self.keys - self.random_filler:
            raise ValueError(
                f"there are {self.keys} keys, which are too few for {first} pairs"
                + (" and random fillers" if self.random_filler else "")
                + f": take a vocabulary of {2 * (first + self.random_filler) + 1} or more"
            )

    def problem_draws(self, first: int, second: int) -> int:
        return 2

    def problems(self, bits: Bits, first: int, second: int) -> Integers:
        # Keys, values, and which permutation of all keys begins with these.
        which = np.broadcast_to(np.arange(first), (bits.shape[1], first))
        keys = permuted(bits[0], which, self.keys)
        return np.concatenate(
            [keys, permuted(bits[1], which, self.values), bits[:1].T.view(np.int64)], axis=1
        )

    def hashes(self, problems: Integers) -> Bits:
        keys, values = np.split(problems[:, :-1].astype(np.uint64), 2, axis=1)
        summed: Bits = mix(mix(keys + np.uint64(1)) + values).sum(axis=1, dtype=np.uint64)
        return summed

    def rest_draws(self, first: int, second: int) -> int:
        return -(-(self._places(first, second) + second) // 2)  # a half each

    def _places(self, pairs: int, length: int) -> int:
        """Where a key can be asked for."""
        return (length - 2 * pairs) // 2

    def write(self, problems: Integers, bits: Bits, first: int, second: int) -> Sequences:
        pairs, length = first, second
        keys, values, made = np.split(problems, [pairs, 2 * pairs], axis=1)
        halves = below(bits, 2**32 - 1).T  # (rows, draws)
        places = self._places(pairs, length)
        # The smallest of exponential waiting times come in the order of drawing without
        # replacement (Efraimidis and Spirakis, 2006).
        weights = np.arange(1, places + 1) ** (self.power - 1)
        waiting = -np.log((halves[:, :places] + 1.0) / 2**32) / weights
        asked = 2 * pairs + 2 * np.argsort(waiting, axis=1, kind="stable")[:, :pairs]

        tokens = np.zeros((len(problems), length), np.int64)
        if self.random_filler:
            drawn = halves[:, places : places + length].astype(np.uint64)
            others = pairs + high(drawn * np.uint64(self.keys - pairs)).astype(np.int64)
            tokens[:] = 1 + permuted(made[:, 0].view(np.uint64), others, self.keys)
        tokens[:, 0 : 2 * pairs : 2] = 1 + keys
        tokens[:, 1 : 2 * pairs : 2] = 1 + self.keys + values
        np.put_along_axis(tokens, asked, 1 + keys, axis=1)
        labels = np.full(tokens.shape, IGNORED)
        np.put_along_axis(labels, asked, 1 + self.keys + values, axis=1)
        return Sequences(tokens, labels)
