"""Log-likelihoods of texts after contexts, of any lengths, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from archzoo.compiled import uncompiled
from archzoo.decoder import Decoder
from archzoo.generation.prompts import pad_left
from archzoo.inputs import IGNORED
from archzoo.training.losses import score

#: A context's tokens and those that are scored after it, which are its continuation.
Pair = tuple[Sequence[int], Sequence[int]]


class Scored(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_likelihood: ``sum over its tokens of ln p(token | all before it)``, in nats.
        greedy: Whether each of its tokens is the most likely one where it stands.
    """

    log_likelihood: float
    greedy: bool


def log_likelihoods(
    model: Decoder,
    pairs: Sequence[Pair],
    batch_size: int = 16,
    done: Callable[[int], object] | None = None,
) -> list[Scored]:
    """Score continuations, each after its context: what it would get alone, whatever the batch is.

    Rows of a batch are padded on the left, so that they end together. Each token's loss is computed
    as `archzoo test` does it, in float32 at least, and added up in float64.

    Args:
        model: Any decoder. It works in evaluation mode, and is left in the mode it was in.
        pairs: Tokens of contexts, each of at least one, and of their continuations.
        batch_size: Rows that are read at once; the longest come first.
        done: Told how many more have been scored.

    Raises:
        ValueError: A context is empty.
    """
    if any(not len(context) for context, _ in pairs):
        raise ValueError("a context is empty: the first token of a text has no probability")
    model = uncompiled(model)
    found: list[Scored] = [Scored(0.0, True)] * len(pairs)  # of continuations without a token
    lengths = [len(context) + len(continuation) for context, continuation in pairs]
    order = sorted((n for n, pair in enumerate(pairs) if len(pair[1])), key=lambda n: -lengths[n])
    with model.evaluating(), torch.inference_mode(), model.weights_held():
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            scored = _score_batch(model, [pairs[number] for number in chosen])
            for number, result in zip(chosen, scored, strict=True):
                found[number] = result
            if done is not None:
                done(len(chosen))
    return found


def _score_batch(model: Decoder, pairs: list[Pair]) -> list[Scored]:
    # The last token is only ever a label.
    rows = [[*context, *continuation][:-1] for context, continuation in pairs]
    tokens, documents = pad_left(rows, model.device)
    positions = model.embedding.prompt_positions(tokens, documents)
    x, _, _ = model.hidden(tokens, documents=documents, positions=positions)
    longest = max(len(continuation) for _, continuation in pairs)
    labels = torch.full((len(pairs), longest), IGNORED)
    for row, (_, continuation) in enumerate(pairs):
        labels[row, longest - len(continuation) :] = torch.tensor(continuation)
    targets = labels.to(x.device)
    losses, predicted = score(x[:, -longest:], model.head, targets)
    nats = losses.view(targets.shape).cpu().double().sum(dim=1)
    right = (predicted.view(targets.shape) == targets) | (targets == IGNORED)
    return [Scored(-n, g) for n, g in zip(nats.tolist(), right.all(dim=1).tolist(), strict=True)]
