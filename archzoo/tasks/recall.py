"""Associative recall: which value did a key have?"""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from archzoo.tasks.counter_random import Bits, Integers, mix, random_bits
from archzoo.tasks.digit_arrays import below, high
from archzoo.tasks.sequences import STREAMS, Sequences, SequenceTask, hash_rows, permuted
from archzoo.tasks.stream import IGNORED

FILLER = "_"
MOST_KEYS = 10**6  # of several tokens, which are listed

# Of zoology's recipe: pairs, length, and of training the weight.
TRAINED = ((4, 64, 5), (8, 128, 1), (16, 256, 1), (32, 256, 1), (64, 256, 1))
TESTED = ((4, 64), (8, 64), (16, 64), (32, 128), (64, 256), (128, 512), (256, 1024))


class Recall(SequenceTask):
    """Multi-query associative recall: pairs of a key and a value, then each key once more.

    Two pairs in a row of 12, with fillers that are not random, are trained as::

        position  0  1  2  3  4  5  6  7  8  9 10 11
        token    k6 v1 k4 v0 k6  _  _  _ k4  _  _  _
        label     .  .  .  . v1  .  .  . v0  .  .  .

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
        keys, values = np.split(problems[:, :-1], 2, axis=1)
        return hash_pairs(keys, values, np.True_)

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


class NoisyRecall(SequenceTask):
    """Keys that come again and again, each with its value, and noise between them.

    Three keys in a row of 14, with noise in a third of the places, are trained as::

        position  0  1  2  3  4  5  6  7  8  9 10 11 12
        token    n1 n1 k0 v0 k2 v3 k2 v3 k2 v3 k3 v2 k0
        label     .  .  .  .  .  . v3  . v3  .  .  . v0

    Every key but a first one asks for its value, which follows. The row ends with a key that came
    before. A problem is which key has which value.

    The defaults are MAD-lab's (athms/mad-lab, Poli et al., arXiv 2403.17844): 16 tokens of keys and
    values, 16 of noise, a fifth of the pairs noise, rows of 128. With `noise` 0 it is their
    in-context recall. They train on every next token, as `next_token` does, and test on values.

    Args:
        vocabulary: Tokens of keys and values, half of them each.
        noise_vocabulary: Tokens of noise.
        noise: The fraction of pairs that are two tokens of noise.
        next_token: Train on every next token; validation and test ask for values alone.
        sizes: Keys and length of training, each with a weight where it has a third number.
            None: 8 in 128.
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

    axes = ("keys", "length")

    def __init__(
        self,
        vocabulary: int = 16,
        noise_vocabulary: int = 16,
        noise: float = 0.2,
        next_token: bool = False,
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
        self.keys, self.values = _halves(vocabulary)
        if not 0 <= noise < 1:
            raise ValueError(f"noise {noise} is not a fraction from 0 to below 1")
        if noise_vocabulary < bool(noise):
            raise ValueError(f"noise {noise} needs tokens: noise_vocabulary is {noise_vocabulary}")
        self.noise, self.noise_tokens, self.next_token = noise, noise_vocabulary, next_token
        sizes = [[8, 128]] if sizes is None else sizes
        words = [
            *(f"k{key}" for key in range(self.keys)),
            *(f"v{value}" for value in range(self.values)),
            *(f"n{number}" for number in range(noise_vocabulary)),
        ]
        super().__init__(words, sizes, sizes if test_sizes is None else test_sizes)

    def check_size(self, first: int, second: int) -> None:
        if second < 4 or second % 2:
            raise ValueError(f"a length of {second} is not two pairs or more: take an even number")
        _check_keys(first, self.keys)

    def problem_draws(self, first: int, second: int) -> int:
        return 1 + -(-first // 2) + 2 * second

    def problems(self, bits: Bits, first: int, second: int) -> Integers:
        of_keys, of_values, bits = np.split(bits, [1, 1 + -(-first // 2)])
        which = np.broadcast_to(np.arange(first), (bits.shape[1], first))
        keys = permuted(of_keys[0], which, self.keys)
        values = below(of_values, self.values)[:first].T.astype(np.int64)  # several may share one
        slots, rows = second // 2, np.arange(len(keys))[:, None]
        of_slot, of_noise, coins, order = np.split(bits, 4)
        chosen = below(of_slot, first)[:slots].T.astype(np.int64)  # (rows, slots), which pair
        silent = np.less(coins.T / 2.0**64, self.noise)
        # At least one pair comes before the last, whose key is that of one before.
        spoken = np.where(silent, np.inf, order.T.astype(float))[:, :-1]
        earlier = np.where(
            np.isinf(spoken).all(axis=1), order[0] % np.uint64(slots - 1), spoken.argmin(axis=1)
        ).astype(np.int64)[:, None]
        silent[rows, earlier], silent[:, -1] = False, False
        chosen[:, -1:] = chosen[rows, earlier]
        tokens = np.empty((len(keys), slots, 2), np.int64)
        tokens[..., 0], tokens[..., 1] = keys[rows, chosen], self.keys + values[rows, chosen]
        made = hash_pairs(tokens[..., 0], tokens[..., 1], ~silent & ~_seen(chosen, silent, first))
        if self.noise:
            drawn = below(of_noise, self.noise_tokens)[:second].T.reshape(-1, slots, 2)
            tokens = np.where(silent[..., None], self.keys + self.values + drawn, tokens)
        labels = np.full(tokens.shape, IGNORED)
        labels[..., 0] = np.where(_seen(chosen, silent, first), tokens[..., 1], IGNORED)
        # The last value is only ever a label.
        return _rows(tokens.reshape(-1, second)[:, :-1], labels.reshape(-1, second)[:, :-1], made)

    def hashes(self, problems: Integers) -> Bits:
        return problems[:, -1].view(np.uint64)

    def write(self, problems: Integers, bits: Bits, first: int, second: int) -> Sequences:
        return _sequences(problems)

    def length(self, first: int, second: int) -> int:
        return second - 1

    def sequences(self, part: str, numbers: Integers, first: int, second: int) -> Sequences:
        found = super().sequences(part, numbers, first, second)
        if part == "train" and self.next_token:
            found.labels[:, :-1] = found.tokens[:, 1:]
        return found


class FuzzyRecall(SequenceTask):
    """Keys and values of several tokens: recall that must look at more than one of them.

    Two keys in a row of 20 are trained as::

        position  0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18
        token     _  _ k1 k2 v2 k3 k0 v3 v3 k3 k0 v3 v3 k1 k2 v2 k3 k0 v3
        label     .  .  .  .  .  .  .  .  .  . v3 v3  .  . v2  .  . v3 v3

    A key is `key_length` letters, no letter twice, and a value 1 to `value_length` digits or so;
    they follow each other without a sign between. A key that came before asks for its value,
    token by token, the right ones before it given. Padding (`_`) fills a row up from the left. A
    problem is which key has which value.

    The defaults are MAD-lab's (athms/mad-lab, Poli et al., arXiv 2403.17844): 16 tokens, 3 a key
    and up to 3 a value, rows of 128. Two things differ. A row has few keys, of which each comes
    several times; there, keys are drawn anew, and few come twice. And keys of fewer tokens, which
    there are in MAD-lab's training and not in its test, are omitted: one that another one begins
    with leaves open where it ends.

    Args:
        vocabulary: Tokens: padding, and those of keys and values, half of them each.
        key_length: Tokens of a key.
        value_length: Tokens of the longest values.
        next_token: Train on every next token; validation and test ask for values alone.
        sizes: Keys and length of training, each with a weight where it has a third number.
            None: 8 in 128.
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

    axes = ("keys", "length")

    def __init__(
        self,
        vocabulary: int = 16,
        key_length: int = 3,
        value_length: int = 3,
        next_token: bool = False,
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
        letters, self.digits = _halves(vocabulary - 1)
        for name, value in (("key_length", key_length), ("value_length", value_length)):
            if value < 1:
                raise ValueError(f"{name} {value} is not positive")
        if key_length > letters:
            raise ValueError(
                f"key_length {key_length} is more than the {letters} letters of the vocabulary"
            )
        self.key_length, self.value_length = key_length, value_length
        self.keys = math.perm(letters, key_length)
        if self.keys > MOST_KEYS:
            raise ValueError(f"there are {self.keys:,} keys: take a smaller vocabulary")
        # (keys, key_length), tokens after the padding.
        self._keys = 1 + np.array(list(permutations(range(letters), key_length)))
        self.next_token = next_token
        sizes = [[8, 128]] if sizes is None else sizes
        words = [
            FILLER,
            *(f"k{letter}" for letter in range(letters)),
            *(f"v{digit}" for digit in range(self.digits)),
        ]
        self._first_digit = 1 + letters
        super().__init__(words, sizes, sizes if test_sizes is None else test_sizes)

    def check_size(self, first: int, second: int) -> None:
        longest = self.key_length + self.value_length
        if second < 2 * longest:
            raise ValueError(f"a length of {second} is less than twice a pair: take {2 * longest}")
        _check_keys(first, self.keys)

    def length(self, first: int, second: int) -> int:
        return second - 1

    def problem_draws(self, first: int, second: int) -> int:
        return 1 + -(-first * (1 + self.value_length) // 2) + 1 + self._slots(second)

    def _slots(self, length: int) -> int:
        return length // (self.key_length + 1)

    def problems(self, bits: Bits, first: int, second: int) -> Integers:
        rows, slots = np.arange(bits.shape[1])[:, None], self._slots(second)
        of_keys, of_values, bits = np.split(bits, [1, len(bits) - 1 - slots])
        which = np.broadcast_to(np.arange(first), (bits.shape[1], first))
        keys = permuted(of_keys[0], which, self.keys)
        drawn = below(of_values, 2**32 - 1).astype(np.uint64)
        drawn = drawn[: first * (1 + self.value_length)].reshape(1 + self.value_length, first, -1)
        lengths = 1 + high(drawn[0] * np.uint64(self.value_length)).T.astype(np.int64)
        values = high(drawn[1:] * np.uint64(self.digits)).transpose(2, 1, 0).astype(np.int64)
        # (rows, slots), which pair, the last one first.
        chosen = below(bits, first).T.astype(np.int64)
        chosen, asked = chosen[:, :slots], chosen[:, slots]
        # The last key is one of those before that fit in any case.
        certain = second // (self.key_length + self.value_length)
        chosen[:, 0] = chosen[rows[:, 0], 1 + asked % (certain - 1)]
        widths = self.key_length + lengths[rows, chosen]
        fits = (np.cumsum(widths, axis=1) <= second)[:, ::-1]
        chosen, widths = chosen[:, ::-1], widths[:, ::-1]
        tokens = np.concatenate(
            [self._keys[keys[rows, chosen]], self._first_digit + values[rows, chosen]], axis=2
        )
        column = np.arange(tokens.shape[2])
        tokens[column >= widths[..., None]] = 0
        again = _seen(chosen, ~fits, first)
        hashed = hash_rows(tokens.reshape(-1, tokens.shape[2])).reshape(chosen.shape)
        made = hash_pairs(keys[rows, chosen], hashed, fits & ~again)
        labelled = again[..., None] & (column >= self.key_length)
        present = (column < widths[..., None]) & fits[..., None]
        # Row by row, `filled` holds as many columns as `present`, in the same order.
        filled = np.arange(second) >= second - present.sum(axis=(1, 2))[:, None]
        row = np.zeros(filled.shape, np.int64)
        wanted = np.zeros(filled.shape, np.bool_)
        row[filled], wanted[filled] = tokens[present], labelled[present]
        return _rows(row[:, :-1], np.where(wanted, row, IGNORED)[:, 1:], made)

    def hashes(self, problems: Integers) -> Bits:
        return problems[:, -1].view(np.uint64)

    def write(self, problems: Integers, bits: Bits, first: int, second: int) -> Sequences:
        return _sequences(problems)

    def sequences(self, part: str, numbers: Integers, first: int, second: int) -> Sequences:
        found = super().sequences(part, numbers, first, second)
        if part == "train" and self.next_token:
            follows = found.tokens[:, :-1] != 0
            found.labels[:, :-1] = np.where(follows, found.tokens[:, 1:], IGNORED)
        return found


class Memorisation(SequenceTask):
    """A table of keys and values that is the same in every row, and must be learnt by heart.

    Four keys of a table of seven, in a row of 8, are trained as::

        position  0  1  2  3  4  5  6  7
        token    k1  ? k1  ? k1  ? k5  ?
        label     . v5  . v5  . v5  . v6

    No row shows a value: `?` after a key asks for it. All three parts ask the same table, for there
    is no other way to know it; a problem is a row, a sequence of keys, and rows that are held out
    are never trained on. So they say how much of the table was learnt, and not how many rows were.

    The defaults are MAD-lab's (athms/mad-lab, Poli et al., arXiv 2403.17844): 256 tokens, so 127
    keys, in rows of 32.

    Args:
        vocabulary: Tokens: `?`, and keys and values, half of them each.
        table_seed: Chooses the table, the same for every `seed`.
        sizes: Keys that are asked for, from the first one on, and length of training, each with a
            weight where it has a third number. None: all, in 32.
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

    axes = ("keys", "length")

    def __init__(
        self,
        vocabulary: int = 256,
        table_seed: int = 0,
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
        self.keys, self.values = _halves(vocabulary - 1)
        sizes = [[self.keys, 32]] if sizes is None else sizes
        bits = random_bits(table_seed, STREAMS["table"], np.zeros(1, np.int64), 1)[0]
        self._table = permuted(bits, np.arange(self.keys)[None], self.values)[0]
        keys = [f"k{key}" for key in range(self.keys)]
        values = [f"v{value}" for value in range(self.values)]
        super().__init__(["?", *keys, *values], sizes, sizes if test_sizes is None else test_sizes)

    def check_size(self, first: int, second: int) -> None:
        if second % 2:
            raise ValueError(f"a length of {second} is not some pairs: take an even number")
        _check_keys(first, self.keys)

    def problem_draws(self, first: int, second: int) -> int:
        return -(-second // 4)

    def problems(self, bits: Bits, first: int, second: int) -> Integers:
        return below(bits, first)[: second // 2].T.astype(np.int64)

    def write(self, problems: Integers, bits: Bits, first: int, second: int) -> Sequences:
        tokens = np.zeros((len(problems), second), np.int64)
        tokens[:, ::2] = 1 + problems
        labels = np.full(tokens.shape, IGNORED)
        labels[:, 1::2] = 1 + self.keys + self._table[problems]
        return Sequences(tokens, labels)


def _halves(vocabulary: int) -> tuple[int, int]:
    """How many keys and values a vocabulary holds; the odd token is a value.

    Raises:
        ValueError: It holds less than two of each.
    """
    if vocabulary < 4:
        raise ValueError(f"a vocabulary with {vocabulary} tokens for keys and values needs 4")
    return vocabulary // 2, vocabulary - vocabulary // 2


def _check_keys(wanted: int, keys: int) -> None:
    if wanted > keys:
        raise ValueError(f"there are {keys} keys, not {wanted}: take a larger vocabulary")


def _rows(tokens: Integers, labels: Integers, made: Bits) -> Integers:
    """Rows that are written before their part is known, each with the hash of its problem."""
    return np.concatenate([tokens, labels, made[:, None].view(np.int64)], axis=1)


def _sequences(rows: Integers) -> Sequences:
    """The same apart."""
    tokens, labels = np.split(rows[:, :-1], 2, axis=1)
    return Sequences(np.ascontiguousarray(tokens), np.ascontiguousarray(labels))


def hash_pairs(
    keys: Integers, values: Integers | Bits, counted: NDArray[np.bool_] | np.bool_
) -> Bits:
    """A hash of which keys have which values, whatever their order.

    Args:
        keys: (rows, pairs).
        values: The same.
        counted: The same, or less: whether a pair is one of them.

    Returns:
        (rows,).
    """
    each = mix(mix(keys.astype(np.uint64) + np.uint64(1)) + values.astype(np.uint64))
    summed: Bits = (each * counted).sum(axis=1, dtype=np.uint64)
    return summed


def _seen(chosen: Integers, silent: NDArray[np.bool_], keys: int) -> NDArray[np.bool_]:
    """Where a key stands that came before in its row, (rows, slots).

    Args:
        chosen: (rows, slots) Which of the row's keys.
        silent: (rows, slots) Where no key stands.
        keys: How many there are.
    """
    first = np.full(chosen.shape, True)
    for key in range(keys):
        mine = (chosen == key) & ~silent
        first &= ~mine | (np.cumsum(mine, axis=1) == 1)
    return ~first & ~silent
