"""Sums with answers of several kinds, ranked: what preferences are learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from archzoo.tasks.arithmetic import Addition
from archzoo.tasks.counter_random import Bits, Integers, random_bits
from archzoo.tasks.digit_arrays import length
from archzoo.tasks.problems import Lines, Problems
from archzoo.tasks.problems import batch_of as batch_of_lines
from archzoo.tasks.stream import IGNORED, Batch

DEMONSTRATIONS, RANKED = 24, 25  # streams of random numbers; the others' are in key_values.py
DRAWS = 4  # random numbers of an answer: whether it is wrong, where, by how much; its zeros
PARTS = {"train": 0, "validation": 1, "test": 2}

Criterion = Literal["right", "shorter"]


class RankedAddition(Addition):
    """Sums that people answer in several ways, and which answers they prefer.

    An answer may have zeros in front, and may be wrong by one digit. 47 + 5 = 52, least significant
    digit first, is answered, the best first where right comes before shorter::

        74+5=25        74+5=2500        74+5=27        74+5=270

    A batch holds one such answer to each sum, to be imitated (`mistakes` of them are wrong), and
    beside it `answers` more, ranked by `prefer`: for a reward model and for DPO. A policy takes the
    sums alone and is judged by what it writes. An answer is right where its number is, whatever
    zeros it has in front. Which sums are held out is `Addition`'s.

    Beside `Task`'s tensors a batch has `wanted` (batch, digits), the right answer, filled up with
    -100; and `ranked_tokens` and `ranked_documents` (batch, answers, time), whole rows with their
    stop token, `ranked_begins` (batch,), where an answer begins in them, and `ranks`
    (batch, answers), the lower the better.

    Args:
        answers: Ranked answers to each sum, at least 2.
        zeros: In front of an answer at most, each number of them equally often.
        mistakes: Of the answers to be imitated, the fraction that is wrong. Of the ranked ones half
            are.
        prefer: What makes an answer better, the most important first: right, shorter, or both.
            What is not named does not count, and answers that are equal by it are ties.
        **arguments: As for `Addition`; not zero_padded, hints, coupled or pack.

    Raises:
        ValueError: An argument is out of range.
    """

    metrics = ("token_accuracy",)  # there is no one answer to match: a policy's are judged

    def __init__(
        self,
        answers: int = 4,
        zeros: int = 3,
        mistakes: float = 0.2,
        prefer: list[Criterion] | None = None,
        **arguments: Any,
    ) -> None:
        if answers < 2:
            raise ValueError(f"answers {answers} must be at least 2, for one to be the better")
        if zeros < 0:
            raise ValueError(f"zeros {zeros} must be at least 0")
        if not 0 <= mistakes <= 1:
            raise ValueError(f"mistakes {mistakes} must lie in [0, 1]: a fraction")
        self.prefer: list[Criterion] = ["right", "shorter"] if prefer is None else prefer
        if not self.prefer or set(self.prefer) - {"right", "shorter"}:
            raise ValueError(f"prefer {self.prefer} must hold right, shorter or both")
        for name in ("zero_padded", "hints", "coupled"):
            if arguments.get(name):
                raise ValueError(
                    f"{name} says where each digit is, and answers here have zeros: omit it"
                )
        if arguments.get("pack", 1) != 1:
            raise ValueError(f"pack {arguments['pack']}: a row asks one question here: omit it")
        self.answers, self.zeros, self.mistakes = answers, zeros, mistakes
        super().__init__(**arguments)
        self.longest_run += zeros
        self.longest_tested += zeros

    def width(self, first: int, second: int) -> int:
        return super().width(first, second) + self.zeros

    def is_right(self, wanted: Sequence[int], written: Sequence[int]) -> bool:
        """The same number: zeros in front of either do not count.

        Args:
            wanted: The right answer's tokens, without the stop token.
            written: Those of the answer.
        """
        return bool(written) and self._number(written) == self._number(wanted)

    def _number(self, tokens: Sequence[int]) -> list[int]:
        """The tokens of a number without zeros in front, units first."""
        found = list(tokens if self.reverse_answer else tokens[::-1])
        (zero,) = self.tokenizer.encode("0")
        while len(found) > 1 and found[-1] == zero:
            found.pop()
        return found

    # Batches.

    def training_batch(self, number: int, rows: Integers) -> Batch:
        numbers = number * self.batch_size + rows
        return self._batch(self.problems("train", numbers), numbers, numbers, self.seed)

    def evaluation_batch(self, split: str, number: int, rows: Integers) -> Batch:
        numbers = number * self.batch_size + rows
        own = numbers + (PARTS[split] << 40)  # the same answers for every seed
        return self._batch(self.problems(split, numbers), numbers, own, 0)

    def _batch(self, problems: Problems, numbers: Integers, own: Integers, seed: int) -> Batch:
        bits = random_bits(seed, DEMONSTRATIONS, own, DRAWS)
        imitated, _, _ = self._answered(problems, bits, self.mistakes)
        batch = batch_of_lines(self.lines(imitated, self.context_length), numbers)
        right, lengths = self._right(problems)
        places = np.arange(len(right))
        places = places if self.reverse_answer else places[::-1]
        shown = places < lengths[:, None]
        tokens = np.array(self.tokenizer.encode("0123456789"))[right[places].T]
        filled = np.full(tokens.shape, IGNORED, np.int64)
        filled[np.arange(len(right)) < lengths[:, None]] = tokens[shown]
        batch["wanted"] = torch.from_numpy(filled)
        return batch | self._ranked(problems, own, seed)

    def _ranked(self, problems: Problems, numbers: Integers, seed: int) -> Batch:
        bits = random_bits(seed, RANKED, numbers, DRAWS * self.answers)
        tokens, documents, ranks = [], [], []
        lines: Lines
        for draws in bits.reshape(self.answers, DRAWS, -1):
            answered, wrong, zeros = self._answered(problems, draws, 0.5)
            lines = self.lines(answered, self.context_length)
            tokens.append(lines.tokens.astype(np.int64))
            padding = np.arange(lines.tokens.shape[1]) >= lines.lengths[:, None]
            documents.append(-padding.astype(np.int64))
            rank = np.zeros(len(wrong), np.int64)
            for criterion in self.prefer:
                worse = wrong.astype(np.int64) if criterion == "right" else zeros
                rank = rank * (self.zeros + 2) + worse
            ranks.append(rank)
        return {
            "ranked_tokens": torch.from_numpy(np.stack(tokens, axis=1)),
            "ranked_documents": torch.from_numpy(np.stack(documents, axis=1)),
            "ranked_begins": torch.from_numpy(lines.labelled.argmax(axis=1)),
            "ranks": torch.from_numpy(np.stack(ranks, axis=1)),
        }

    # Answers: a third number of a problem, with as many digits as are written.

    def _right(self, problems: Problems) -> tuple[Any, Integers]:
        """The right answers, (digits, examples), and how long they are."""
        (a, b), lengths, _ = problems
        answers, _ = self.solve(a, b, lengths)
        return answers, length(answers)

    def _answered(
        self, problems: Problems, bits: Bits, mistakes: float
    ) -> tuple[Problems, Any, Integers]:
        """Problems with an answer each, which of them are wrong, and how many zeros they have."""
        answers, lengths = self._right(problems)
        wrong = (bits[0] >> np.uint64(11)).astype(np.float64) * 2.0**-53 < mistakes
        place = (bits[1] % lengths.astype(np.uint64)).astype(np.int64)
        examples = np.arange(len(lengths))
        here = answers[place, examples].astype(np.int64)
        # Another digit; the first one of a number stays a digit from 1 on.
        first = (place == lengths - 1) & (lengths > 1)
        moved = 1 + (bits[2] % np.uint64(8)).astype(np.int64)
        other = np.where(first, (here - 1 + moved) % 9 + 1, (here + moved) % 10)
        zeros = (bits[3] % np.uint64(self.zeros + 1)).astype(np.int64)
        rows = max(len(answers) + self.zeros, problems.operands.shape[1])
        operands = np.zeros((3, rows, len(lengths)), np.uint8)
        operands[:2, : problems.operands.shape[1]] = problems.operands
        operands[2, : len(answers)] = answers
        operands[2, place, examples] = np.where(wrong, other, here)
        written = np.concatenate([problems.lengths, (lengths + zeros)[None]])
        return Problems(operands, written, problems.letters), wrong, zeros

    def columns(self, problems: Problems) -> list[Any]:
        if len(problems.operands) == 2:
            return super().columns(problems)
        (a, b, answers), lengths, letters = problems
        return [
            self.number(a, lengths[0], letters),
            self.sign(self.operators[0]),
            self.number(b, lengths[1], letters),
            self.sign("="),
            self.number(answers, lengths[2], letters, reverse=self.reverse_answer, labelled=True),
        ]
