"""Cross-entropy that never holds all logits of a large vocabulary at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from archzoo.inputs import IGNORED
from archzoo.kernels import cross_entropy as kernels
from archzoo.numerics import at_least_float32

CHUNK = 2**25  # logits at once: 128 MiB in float32


class Scores(NamedTuple):
    """How well each token was predicted; both (tokens,), zero at unlabelled positions.

    Attributes:
        losses: float, in nats.
        predicted: int64, the most likely token.
    """

    losses: Tensor
    predicted: Tensor


def check_labels(batch: dict[str, Any]) -> Tensor:
    """The labels of a batch, int64; whether they lie in the vocabulary is seen later.

    Raises:
        ValueError: None, not integers, or other than one for every token.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(
            "the batch holds no labels: give it the token that should follow each token, and "
            f"{IGNORED} at unlabelled positions"
        )
    kind = str(labels.dtype).removeprefix("torch.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {kind}: they are integers, torch.int64")
    if labels.shape != batch["tokens"].shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, the tokens {tuple(batch['tokens'].shape)}: "
            f"give one for every token, {IGNORED} at unlabelled positions"
        )
    return labels.long()


def total_loss(x: Tensor, head: nn.Linear, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """The sum over tokens of ``-log softmax(head(x))[label]``, in nats.

    By a kernel where there is one for these tensors, see `archzoo.kernels.cross_entropy`. Else,
    where the logits would be more than `chunk` numbers, they are computed chunk by chunk, and
    recomputed in the backward pass instead of being kept.

    Args:
        x: (batch, time, dim), after the last norm.
        head: To (vocab_size).
        labels: (batch, time) int64, -100 at unlabelled positions.
        chunk: Logits to hold at once.

    Returns:
        A scalar, float32 at least.
    """
    x, labels = x.flatten(0, 1), labels.flatten()
    if kernels.available(x, head):
        return kernels.total_loss(x, head.weight, labels)
    rows = max(chunk // head.out_features, 1)
    if len(x) <= rows:
        return _sum_of_losses(x, head, labels)
    parts = [
        checkpoint(_sum_of_losses, *pair, use_reentrant=False)
        for pair in ((a, head, b) for a, b in zip(x.split(rows), labels.split(rows), strict=True))
    ]
    return torch.stack(parts).sum()


def score(x: Tensor, head: nn.Linear, labels: Tensor, chunk: int = CHUNK) -> Scores:
    """Loss and most likely token at every position.

    Args:
        x: (batch, time, dim), before the head.
        head: To logits.
        labels: (batch, time), -100 at unlabelled positions.
        chunk: Logits that are held at once.
    """
    x, labels = x.flatten(0, 1), labels.flatten()
    if kernels.available(x, head):
        return Scores(*kernels.score(x, head.weight, labels))
    rows = max(chunk // head.out_features, 1)
    losses, predicted = [], []
    for some, targets in zip(x.split(rows), labels.split(rows), strict=True):
        logits = head(some)
        logits = logits.to(at_least_float32(logits.dtype))
        losses.append(_cross_entropy(logits, targets, "none"))
        predicted.append(logits.argmax(-1))
    return Scores(torch.cat(losses), torch.cat(predicted))


def _sum_of_losses(x: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    logits = head(x)
    logits = logits.to(at_least_float32(logits.dtype))
    return _cross_entropy(logits, labels, "sum")


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    try:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction=reduction)
    except IndexError:  # on a CPU; a GPU says so some calls later, in its own words
        wrong = labels[((labels < 0) | (labels >= logits.shape[-1])) & (labels != IGNORED)]
        raise ValueError(
            f"label {int(wrong[0])} is not a token: the model knows 0 .. {logits.shape[-1] - 1}, "
            f"and {IGNORED} at unlabelled positions"
        ) from None
