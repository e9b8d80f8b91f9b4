"""Lines of keys and values that nothing connects: how much a change of a model can hold."""

from __future__ import annotations

import numpy as np
import torch

from archzoo.tasks.counter_random import Bits, Integers, random_bits
from archzoo.tasks.digit_arrays import below
from archzoo.tasks.problems import SHARED
from archzoo.tasks.sequences import permuted
from archzoo.tasks.stream import IGNORED, Batch, Task
from archzoo.tasks.tokenizers import CharacterTokenizer

STREAMS = {"keys": 21, "values": 22, "order": 23}  # the others' are in problems.py, sequences.py
LONGEST = 15  # digits of a key, whose number fits into an int64


class KeyValues(Task):
    """Random numbers and the random numbers that belong to them, to be learnt by heart.

    A line of the table, `48213=9175`, is trained as::

        position  0  1  2  3  4  5  6  7  8
        token     4  8  2  1  3  =  9  1  7
        label     .  .  .  .  .  9  1  7  5

    Nothing says the value but the line itself, so there is nothing to generalise to: training,
    validation and test all ask the same lines, and what they measure is how much of the table was
    memorised. `token_accuracy` is the fraction of the values' characters, 0.1 by chance, given the
    right ones before; `exact_match` that of whole values. The end of a value is not asked for: all
    have as many digits.

    Lines are written with the vocabulary that all tasks of problems share, so that a model that has
    learnt to add can be adapted to them. Every pass over the table has an order of its own.

    Source: the memorising task of MoRA (Jiang et al., arXiv 2405.12130, section 3), there 10,000
    pairs of UUIDs.

    Args:
        pairs: Lines of the table.
        key_digits: Of each key; all keys differ.
        value_digits: Of each value.
        table_seed: Chooses the table, the same for every `seed`.
        batch_size: Lines in a batch, all ranks together.
        steps_per_epoch: Batches in what Lightning calls an epoch; the stream itself never ends.
        seed: Chooses the order of lines.

    Raises:
        ValueError: an argument is out of range.
    """

    metrics = ("token_accuracy", "exact_match")
    tokenizer: CharacterTokenizer
    other_vocabulary = "train both with --data.vocabulary shared, the only one that it has"

    def __init__(
        self,
        pairs: int = 1000,
        key_digits: int = 5,
        value_digits: int = 4,
        table_seed: int = 0,
        batch_size: int = 250,
        steps_per_epoch: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name in ("pairs", "value_digits", "steps_per_epoch"):
            if self.arguments[name] < 1:
                raise ValueError(f"{name} {self.arguments[name]} is not positive")
        if not 1 <= key_digits <= LONGEST:
            raise ValueError(f"key_digits {key_digits} is not between 1 and {LONGEST}")
        if pairs > 10**key_digits:
            raise ValueError(
                f"there are no {pairs:,} keys of {key_digits} digits: take more key_digits"
            )
        self.pairs, self.key_digits, self.seed = pairs, key_digits, seed
        self.steps_per_epoch = steps_per_epoch
        self.tokenizer = CharacterTokenizer(SHARED, special=True)
        self.context_length = key_digits + value_digits
        one = np.zeros(1, np.int64)
        keys = permuted(
            random_bits(table_seed, STREAMS["keys"], one, 1)[0],
            np.arange(pairs)[None],
            10**key_digits,
        )[0]
        places = 10 ** np.arange(key_digits - 1, -1, -1)
        numbers = np.arange(pairs)
        draws = random_bits(table_seed, STREAMS["values"], numbers, -(-value_digits // 2))
        values = below(draws, 10)[:value_digits].T  # two of each draw
        # Digits come first in the shared vocabulary, each as its own token.
        equals = np.full((pairs, 1), self.tokenizer.encode("=")[0])
        self._lines = np.concatenate([keys[:, None] // places % 10, equals, values], 1)
        self._lines = self._lines.astype(np.int64)

    def prepare(self) -> None:
        pass  # there is nothing to read or to learn

    def rows(self, split: str) -> int:
        return self.steps_per_epoch * self.batch_size if split == "train" else self.pairs

    def training_batch(self, number: int, rows: Integers) -> Batch:
        passes, places = np.divmod(number * self.batch_size + rows, self.pairs)
        bits: Bits = random_bits(self.seed, STREAMS["order"], passes, 1)[0]
        return self._batch(permuted(bits, places[:, None], self.pairs)[:, 0])

    def evaluation_batch(self, split: str, number: int, rows: Integers) -> Batch:
        return self._batch(number * self.batch_size + rows)

    def _batch(self, numbers: Integers) -> Batch:
        lines = self._lines[numbers]
        labels = lines[:, 1:].copy()
        labels[:, : self.key_digits] = IGNORED
        return {
            "tokens": torch.from_numpy(lines[:, :-1].copy()),
            "labels": torch.from_numpy(labels),
        }

    def text(self, number: int) -> str:
        """A line of the table as it is written."""
        return self.tokenizer.decode(self._lines[number].tolist())
