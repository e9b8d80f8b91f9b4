"""Answers that a policy writes, and what is measured of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from archzoo.block import Aux
from archzoo.decoder import Decoder
from archzoo.generation import generate
from archzoo.inputs import IGNORED
from archzoo.preferences.losses import log_probabilities
from archzoo.tasks.stream import Batch, Task


class Answers(NamedTuple):
    """Questions with an answer each, as rows of a batch.

    Attributes:
        tokens: (batch, time) int64, question, answer and the stop token where it was written.
        documents: (batch, time) int64, -1 at the padding behind it.
        mask: (batch, time - 1) bool, where the token that follows belongs to the answer, the stop
            token included.
        right: (batch,) bool.
        stopped: (batch,) bool, whether the answer ended by itself.
    """

    tokens: Tensor
    documents: Tensor
    mask: Tensor
    right: Tensor
    stopped: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer, without the stop token, (batch,)."""
        return self.mask.sum(dim=1) - self.stopped.long()

    @property
    def ends(self) -> Tensor:
        """Where in the mask the last token of each answer is, (batch,)."""
        return last_places(self.mask)

    def take(self, rows: Tensor) -> Answers:
        """Some of them."""
        return Answers(*(tensor[rows] for tensor in self))


def last_places(mask: Tensor) -> Tensor:
    """The last place of each row at which a mask (batch, time) is True, (batch,) int64."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, places, -1).amax(dim=1)


def questions(task: Task, batch: Batch) -> list[list[int]]:
    """The question of each row of a batch: what comes up to its first label.

    Args:
        task: Whose batch it is.
        batch: As `Task` describes it.

    Raises:
        ValueError: The rows ask nothing.
    """
    labelled = (batch["labels"] != IGNORED).tolist()
    if "documents" in batch and (batch["documents"] > 0).any():
        raise ValueError("a row of the batch asks several questions: give --data.pack 1")
    found = []
    for row, here in zip(batch["tokens"].tolist(), labelled, strict=True):
        if not any(here[1:]) or here[0]:
            raise ValueError(
                f"{type(task).__name__} asks no questions: learning from answers needs a task of "
                "problems, whose labels begin after the question"
            )
        found.append(row[: here.index(True) + 1])
    return found


def write_answers(
    decoder: Decoder, task: Task, batch: Batch, *, max_tokens: int, temperature: float, seed: int
) -> Answers:
    """The answers that a model writes to the questions of a batch, token by token from its state.

    The right answer is the row's `wanted` where the batch holds one, and its labels otherwise.

    Args:
        decoder: That writes, by its recurrent form.
        task: Says what is right, and which token ends an answer.
        batch: As `Task` describes it.
        max_tokens: Of an answer at most.
        temperature: Of the draws; 0 takes the most likely tokens.
        seed: Row r is drawn by seed + r.

    Raises:
        ValueError: The rows ask nothing.
    """
    labels, device = batch["labels"], batch["tokens"].device
    stop = task.stop_token
    wanted = [
        [token for token in row if token not in (IGNORED, stop)]
        for row in batch.get("wanted", labels).tolist()
    ]
    asked = questions(task, batch)
    written = generate(
        decoder,
        asked,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop_token=stop,
        graph=False,
    )
    rows, begins = [], []
    for question, answer, stopped in zip(asked, written.tokens, written.stopped, strict=True):
        assert stop is not None or not stopped
        rows.append(question + answer + ([int(stop or 0)] if stopped else []))
        begins.append(len(question) - 1)  # whose logits say the first token of the answer
    time = max(map(len, rows))
    filled = torch.tensor([row + [0] * (time - len(row)) for row in rows], device=device)
    places = torch.arange(time, device=device)
    sizes = torch.tensor([len(row) for row in rows], device=device)[:, None]
    first = torch.tensor(begins, device=device)[:, None]
    pairs = zip(wanted, written.tokens, written.stopped, strict=True)
    right = [stopped and task.is_right(mine, answer) for mine, answer, stopped in pairs]
    return Answers(
        filled,
        torch.where(places < sizes, 0, -1),
        (places[:-1] >= first) & (places[:-1] < sizes - 1),
        torch.tensor(right, device=device),
        torch.tensor(written.stopped, device=device),
    )


def read(
    decoder: Decoder, tokens: Tensor, documents: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, list[Aux]]:
    """Log-probabilities of each token after the first, vectors before the head, and aux.

    Args:
        decoder: That reads all at once.
        tokens: (batch, time).
        documents: (batch, time), -1 at padding.
        temperature: That divides the logits.

    Returns:
        (batch, time - 1), (batch, time - 1, dim), and aux of each layer.
    """
    x, _, aux = decoder.hidden(tokens[:, :-1], documents=documents[:, :-1])
    return log_probabilities(decoder.head(x), tokens[:, 1:], temperature), x, aux
