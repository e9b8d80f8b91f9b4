"""Problems inside real text: one tokenizer and one stream for both."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch

from archzoo.tasks import tokenizers
from archzoo.tasks.counter_random import Integers, random_bits
from archzoo.tasks.digit_arrays import Flags
from archzoo.tasks.problems import Exercise
from archzoo.tasks.stream import IGNORED, Batch, Loader, build
from archzoo.tasks.text import Corpus, Text
from archzoo.tasks.tokenizers import Tokenizer

_LINES = 6  # the stream of random bits that chooses lines of text


class Mixed(Text):
    r"""Text with problems in it, each a line of its own between two lines of the text.

    How a window of Shakespeare begins in which 14 + 4 = 18 stands before the first line::

        position  0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
        token     4  1  +  4  =  8  1 \n  m  b  l  y  ␣  t  h  a
        label     .  .  .  .  8  1 \n  m  b  l  y  ␣  t  h  a  n

    The loss is that of the text and of the answers; a problem itself cannot be foreseen, so it is
    not asked for. A line end takes the place of the stop token.

    Training windows hold `lines` problems, at lines of the text that are a function of (seed,
    window); what the text has to give way for falls off the window's end. Validation measures the
    text as it is (`validation/loss`, `validation/perplexity`), and held-out problems within it
    (`validation/exact_match/problems`, and those of `ood_digits`).

    Args:
        problems: the task that they come from, such as Addition.
        problem_arguments: of that task; its batch_size, steps_per_epoch, test_examples and seed
            mean nothing here, and what is not named is as it was before there were `vocabulary`
            (own) and `zero` (false). With vocabulary shared, a tokenizer of characters knows the
            signs of all tasks.
        lines: problems in a window.
        path: as for Text, and so are all that follow.
        tokenizer: the same; digits and signs must be tokens of their own, as in all that are
            learned here.
        vocab_size: the same.
        context_length: the same.
        batch_size: the same.
        validation_fraction: the same.
        cache_dir: the same.
        seed: of the windows' order, the training problems, and where they stand.

    Raises:
        FileNotFoundError: there is no such text or tokenizer.
        ValueError: as Text; or the problems are too long for a window, or cannot be written in
            the tokenizer's tokens.
    """

    exercise: Exercise

    def __init__(
        self,
        problems: str = "Addition",
        problem_arguments: dict[str, Any] | None = None,
        lines: int = 2,
        path: str = "data/shakespeare.txt",
        tokenizer: str = "characters",
        vocab_size: int | None = None,
        context_length: int = 256,
        batch_size: int = 16,
        validation_fraction: float = 0.1,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path=path,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            context_length=context_length,
            batch_size=batch_size,
            validation_fraction=validation_fraction,
            cache_dir=cache_dir,
            seed=seed,
        )
        name = problems if "." in problems else f"archzoo.tasks.{problems}"
        settings = (problem_arguments or {}) | {"seed": seed}
        exercise = build({"class_path": name, "init_args": settings})
        if not isinstance(exercise, Exercise) or exercise.coupling:
            raise ValueError(
                f"problems: {problems} cannot stand in a text; take Addition or another task of "
                "problems, not coupled"
            )
        if lines < 1:
            raise ValueError(f"lines {lines} is not positive")
        self.exercise, self.lines = exercise, lines
        self.exercises = exercise.exercises
        self.characters = "\n" + exercise.tokenizer.characters
        self.longest_run, self.longest_asked = exercise.longest_run, exercise.longest_asked
        self.operators = exercise.operators
        self.beyond = ("problems", *exercise.beyond)
        longest = exercise.context_length + 1
        if context_length < lines * longest:
            raise ValueError(
                f"context_length {context_length} has no room for {lines} problems of up to "
                f"{longest} tokens: take {lines * longest} or more, or fewer lines"
            )

    # Preparing.

    def prepare(self) -> None:
        super().prepare()
        self._table = self.exercise.tokens_of(self.tokenizer)

    def _learn(self, corpus: Corpus, train: Any) -> Tokenizer:
        if self.arguments["tokenizer"] != "characters":
            return super()._learn(corpus, train)
        texts: Iterator[str] = chain([self.characters], corpus.texts((0, corpus.size)))
        return tokenizers.learn_characters(texts, self.arguments["vocab_size"])

    # Batches.

    def training_batch(self, number: int, rows: Integers) -> Batch:
        batch = super().training_batch(number, rows)
        windows = batch["examples"][:, 0].numpy()
        numbers = windows[:, None] * self.lines + np.arange(self.lines)
        problems = self.exercise.batch(self.exercise.problems("train", numbers.reshape(-1)))
        return self._insert(batch, problems, text=True)

    def beyond_loader(self, length: Any) -> Loader:
        self.prepare()
        exercise = self.exercise
        if length == "problems":
            found = exercise.problems("validation", np.arange(exercise.rows("validation")))
        else:
            found = exercise.cell(length, length, exercise.arguments["ood_examples"])
        windows = (self._tokens("validation") - 1) // self.context_length
        longest = exercise.batch(found)["tokens"].shape[1] + 1
        if not windows or longest > self.context_length:
            raise ValueError(
                f"problems of up to {longest} tokens are asked within the text that is kept for "
                f"validation, {self._tokens('validation')} tokens, in windows of context_length "
                f"{self.context_length}: take a longer text, or other windows"
            )

        def make(number: int, rows: Integers) -> Batch:
            numbers = number * self.batch_size + rows
            batch = self._read("validation", numbers % windows * self.context_length, numbers)
            return self._insert(batch, exercise.batch(found.take(numbers)), text=False)

        return Loader(make, self.batch_size, found.examples, self, training=False)

    def _insert(self, batch: Batch, problems: Batch, *, text: bool) -> Batch:
        """Put problems into windows of text.

        Args:
            batch: (windows, time), without padding.
            problems: (windows * k, time of their own): k for each window.
            text: whether the text is asked for too.
        """
        # Each problem with its last token, a line end, in (windows, k, columns).
        windows, width = len(batch["tokens"]), self.context_length + 1
        tokens = torch.cat([problems["tokens"], problems["tokens"][:, :1]], dim=1).numpy()
        asked: Flags = np.zeros(tokens.shape, np.bool_)
        labels = problems["labels"].numpy()
        asked[:, 1:] = labels != IGNORED
        tokens[asked] = labels[labels != IGNORED]
        lengths = np.where(asked, np.arange(1, asked.shape[1] + 1), 0).max(axis=1)
        count = len(lengths) // windows
        lengths = lengths.reshape(windows, count)
        tokens = self._table[tokens].reshape(windows, count, -1)
        asked = asked.reshape(tokens.shape)

        window = torch.cat([batch["tokens"], batch["labels"][:, -1:]], dim=1).numpy()
        numbers = batch["examples"][:, 0].numpy()
        places = self._line_starts(window, numbers, lengths)
        result = np.empty((windows, width), np.int64)
        wanted = np.zeros((windows, width), np.bool_)
        columns, row = np.arange(width), np.arange(windows)[:, None]
        # The text moves on by what stands before it; beyond the window's end it is lost.
        moved = columns + ((columns >= places[..., None]) * lengths[..., None]).sum(axis=1)
        kept = moved < width
        result[np.broadcast_to(row, kept.shape)[kept], moved[kept]] = window[kept]
        wanted[np.broadcast_to(row, kept.shape)[kept], moved[kept]] = text
        begins = places + np.cumsum(lengths, axis=1) - lengths
        place = begins[..., None] + np.arange(tokens.shape[2])
        written = np.arange(tokens.shape[2]) < lengths[..., None]
        rows = np.broadcast_to(row[..., None], place.shape)[written]
        result[rows, place[written]] = tokens[written]
        wanted[rows, place[written]] = asked[written]
        return {
            "tokens": torch.from_numpy(result[:, :-1].copy()),
            "labels": torch.from_numpy(np.where(wanted[:, 1:], result[:, 1:], IGNORED)),
            "examples": batch["examples"],
        }

    def _line_starts(self, window: Integers, numbers: Integers, lengths: Integers) -> Integers:
        """Random lines of each window, (windows, k) in order, before which all problems fit.

        Args:
            window: (windows, columns) tokens of the text.
            numbers: (windows,), on which the choice depends.
            lengths: (windows, k) of the problems.
        """
        starts = np.zeros(window.shape, np.bool_)
        starts[:, 0] = True  # a window's first token may follow a problem, too
        starts[:, 1:] = window[:, :-1] == self._table[self.exercise.stop]
        starts &= np.arange(window.shape[1]) <= window.shape[1] - lengths.sum(axis=1)[:, None]
        count = np.cumsum(starts, axis=1)
        bits = random_bits(self.seed, _LINES, numbers, lengths.shape[1]).T >> np.uint64(32)
        chosen = (bits * count[:, -1:].astype(np.uint64)) >> np.uint64(32)
        chosen = np.sort(chosen.astype(np.int64), axis=1)
        place: Integers = (count[:, None] > chosen[..., None]).argmax(axis=2)
        return place
