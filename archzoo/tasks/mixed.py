"""Problems inside real text: one tokenizer and one stream for both."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch

from archzoo.tasks import tokenizers
from archzoo.tasks.corpus import Corpus
from archzoo.tasks.counter_random import Integers, random_bits
from archzoo.tasks.digit_arrays import Flags
from archzoo.tasks.problems import SyntheticTask
from archzoo.tasks.stream import IGNORED, Batch, Loader, build_task
from archzoo.tasks.text import Text
from archzoo.tasks.tokenizers import Tokenizer

_LINES = 6  # the stream of random bits that chooses lines of text


class Mixed(Text):
    r"""Text with problems in it, each a line of its own between two lines of the text.

    How a window of Shakespeare begins in which 14 + 4 = 18 precedes the first line::

        position  0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
        token     4  1  +  4  =  8  1 \n  m  b  l  y  ␣  t  h  a
        label     .  .  .  .  8  1 \n  m  b  l  y  ␣  t  h  a  n

    The loss is that of the text and of the answers; a problem itself cannot be predicted, so it is
    unlabelled. A line end replaces the stop token.

    Training windows hold `lines` problems, at lines of the text that are a function of (seed,
    window); text that no longer fits is cut off at the window's end. Validation measures the text
    as it is (`validation/loss`, `validation/perplexity`, `validation/bits_per_byte`), and held-out
    problems within it (`validation/exact_match/problems`, and those of `ood_digits`). So does test,
    with the test part of the text and the problems that are test's.

    Args:
        problems: The task that they come from, such as Addition.
        problem_arguments: Of that task; its batch_size, steps_per_epoch, seed, separate_test and
            pack mean nothing here, and what is not named is as it was before there were
            `vocabulary` (own) and `zero` (false). With vocabulary shared, a tokenizer of
            characters knows the signs of all tasks.
        lines: Problems in a window.
        path: As for Text, and so are all that follow.
        tokenizer: The same; digits and signs must be tokens of their own, as in all that are
            learned here.
        vocab_size: The same.
        context_length: The same.
        batch_size: The same.
        validation_fraction: The same.
        cache_dir: The same.
        seed: Of the windows' order, the training problems, and where they are.
        test_fraction: As for Text; at 0 test asks the problems of validation, too.
        split: As for Text.
        field: As for Text. Documents are not separate: a problem may stand anywhere.

    Raises:
        FileNotFoundError: there is no such text or tokenizer.
        ValueError: as Text; or the problems are too long for a window, or cannot be written in
            the tokenizer's tokens.
    """

    synthetic: SyntheticTask

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
        validation_fraction: float = 0.05,
        cache_dir: str | None = None,
        seed: int = 0,
        test_fraction: float = 0.05,
        split: Literal["auto", "documents", "place"] = "auto",
        field: str | None = None,
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
            test_fraction=test_fraction,
            split=split,
            field=field,
            separate_documents=False,
        )
        name = problems if "." in problems else f"archzoo.tasks.{problems}"
        settings = (problem_arguments or {}) | {"seed": seed}
        synthetic = build_task({"class_path": name, "init_args": settings})
        if not isinstance(synthetic, SyntheticTask) or synthetic.coupling:
            raise ValueError(
                f"problems: {problems} cannot stand in a text; take Addition or another task of "
                "problems, not coupled"
            )
        if lines < 1:
            raise ValueError(f"lines {lines} is not positive")
        synthetic.ask_separately(test_fraction > 0)
        self.synthetic, self.lines = synthetic, lines
        self.synthetic_tasks = synthetic.synthetic_tasks
        self.characters = "\n" + synthetic.tokenizer.characters
        self.longest_run, self.longest_tested = synthetic.longest_run, synthetic.longest_tested
        self.operators = synthetic.operators
        self.extra_validation = ("problems", *synthetic.extra_validation)
        longest = synthetic.context_length + 1
        if context_length < lines * longest:
            raise ValueError(
                f"context_length {context_length} is too short for {lines} problems of up to "
                f"{longest} tokens: take {lines * longest} or more, or fewer lines"
            )

    # Preparing.

    def prepare(self) -> None:
        super().prepare()
        self._table = self.synthetic.tokens_of(self.tokenizer)

    def _learn(self, corpus: Corpus, train: Any) -> Tokenizer:
        if self.arguments["tokenizer"] != "characters":
            return super()._learn(corpus, train)
        texts: Iterator[str] = chain([self.characters], self._seen(corpus))
        return tokenizers.learn_characters(texts, self.arguments["vocab_size"])

    def take_up_split(self, settings: dict[str, Any]) -> None:
        self.synthetic.ask_separately(settings["test_fraction"] > 0)
        super().take_up_split(settings)

    # Batches.

    def training_batch(self, number: int, rows: Integers) -> Batch:
        batch = super().training_batch(number, rows)
        windows = batch["examples"][:, 0].numpy()
        numbers = windows[:, None] * self.lines + np.arange(self.lines)
        problems = self.synthetic.batch(self.synthetic.problems("train", numbers.reshape(-1)))
        return self._insert(batch, problems, text=True)

    def extra_evaluations(self, split: str) -> tuple[int | str, ...]:
        return self.extra_validation if split == "validation" else ("problems",)

    def extra_validation_loader(self, length: Any) -> Loader:
        return self.extra_evaluation_loader("validation", length)

    def extra_evaluation_loader(self, split: str, name: Any) -> Loader:
        self.prepare()
        synthetic = self.synthetic
        if name == "problems":
            found = synthetic.problems(split, np.arange(synthetic.rows(split)))
        else:
            found = synthetic.cell(name, name, synthetic.arguments["ood_examples"], split)
        windows = (self._tokens(split) - 1) // self.context_length
        longest = synthetic.batch(found)["tokens"].shape[1] + 1
        if not windows or longest > self.context_length:
            raise ValueError(
                f"problems of up to {longest} tokens do not fit in the text that is kept for "
                f"{split}, {self._tokens(split)} tokens, in windows of context_length "
                f"{self.context_length}: take a longer text, or other windows"
            )

        def make(number: int, rows: Integers) -> Batch:
            numbers = number * self.batch_size + rows
            batch = self._read(split, numbers % windows * self.context_length, numbers)
            return self._insert(batch, synthetic.batch(found.take(numbers)), text=False)

        return Loader(make, self.batch_size, found.examples, self, training=False)

    def _insert(self, batch: Batch, problems: Batch, *, text: bool) -> Batch:
        """Put problems into windows of text.

        Args:
            batch: (windows, time), without padding.
            problems: (windows * k, time of their own): k for each window.
            text: Whether the text is labelled too.
        """
        # Each problem with its last token, a line end, in (windows, k, columns).
        windows, width = len(batch["tokens"]), self.context_length + 1
        tokens = torch.cat([problems["tokens"], problems["tokens"][:, :1]], dim=1).numpy()
        labelled: Flags = np.zeros(tokens.shape, np.bool_)
        labels = problems["labels"].numpy()
        labelled[:, 1:] = labels != IGNORED
        tokens[labelled] = labels[labels != IGNORED]
        lengths = np.where(labelled, np.arange(1, labelled.shape[1] + 1), 0).max(axis=1)
        count = len(lengths) // windows
        lengths = lengths.reshape(windows, count)
        tokens = self._table[tokens].reshape(windows, count, -1)
        labelled = labelled.reshape(tokens.shape)

        window = torch.cat([batch["tokens"], batch["labels"][:, -1:]], dim=1).numpy()
        numbers = batch["examples"][:, 0].numpy()
        places = self._line_starts(window, numbers, lengths)
        result = np.empty((windows, width), np.int64)
        with_label = np.zeros((windows, width), np.bool_)
        columns, row = np.arange(width), np.arange(windows)[:, None]
        # The text shifts by what is inserted before it; what passes the window's end is lost.
        moved = columns + ((columns >= places[..., None]) * lengths[..., None]).sum(axis=1)
        kept = moved < width
        result[np.broadcast_to(row, kept.shape)[kept], moved[kept]] = window[kept]
        with_label[np.broadcast_to(row, kept.shape)[kept], moved[kept]] = text
        begins = places + np.cumsum(lengths, axis=1) - lengths
        target = begins[..., None] + np.arange(tokens.shape[2])
        written = np.arange(tokens.shape[2]) < lengths[..., None]
        rows = np.broadcast_to(row[..., None], target.shape)[written]
        result[rows, target[written]] = tokens[written]
        with_label[rows, target[written]] = labelled[written]
        return {
            "tokens": torch.from_numpy(result[:, :-1].copy()),
            "labels": torch.from_numpy(np.where(with_label[:, 1:], result[:, 1:], IGNORED)),
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
        starts[:, 1:] = window[:, :-1] == self._table[self.synthetic.stop]
        starts &= np.arange(window.shape[1]) <= window.shape[1] - lengths.sum(axis=1)[:, None]
        count = np.cumsum(starts, axis=1)
        bits = random_bits(self.seed, _LINES, numbers, lengths.shape[1]).T >> np.uint64(32)
        chosen = (bits * count[:, -1:].astype(np.uint64)) >> np.uint64(32)
        chosen = np.sort(chosen.astype(np.int64), axis=1)
        starts_at: Integers = (count[:, None] > chosen[..., None]).argmax(axis=2)
        return starts_at
