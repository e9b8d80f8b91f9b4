"""What moves the weights: which of them decay, and how the learning rate runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.decay import spared_of_decay
from archzoo.decoder import Decoder
from archzoo.numerics import at_least_float32


def decay_groups(
    decoder: Decoder, weight_decay: float, joining: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices decay, everything else does not.

    A matrix maps vectors to vectors, and decay keeps its gain in bounds. Norms, biases and decay
    rates are scales of their own, which decay would pull to a value that means something else
    (a norm's weight to 0). Embeddings are tables: a row gets a gradient only when its token
    comes, decay would shrink it at every step, and rare tokens would fade. A head that is tied
    to the table counts as the table. What encodes positions is a table, too, even where a
    small network computes it: embeddings, rotaries and biases do not decay, with all they hold.
    Any module may say otherwise for what it holds, by an attribute ``decays``, True or False, or
    for single parameters by their names, ``{"magnitude": False}``.

    Args:
        decoder: Whose parameters.
        weight_decay: Of the matrices.
        joining: Parameters that are frozen now and trained later. A step skips what has no
            gradient, and keeps nothing of it.

    Returns:
        Two groups in the form torch's optimizers take, in a fixed order.
    """
    matrices, others = _split(decoder, spared_of_decay(decoder), joining)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _split(
    decoder: Decoder, spared: set[int], joining: Iterable[nn.Parameter] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those trained parameters that decay, and the others."""
    later = {id(parameter) for parameter in joining}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in decoder.parameters():
        if parameter.requires_grad or id(parameter) in later:
            is_matrix = parameter.dim() >= 2 and id(parameter) not in spared
            (matrices if is_matrix else others).append(parameter)
    return matrices, others


def regroup(
    state: dict[str, Any], decoder: Decoder, joining: Iterable[nn.Parameter] = ()
) -> dict[str, Any]:
    """An optimizer's state as today's: from before biases were exempt from weight decay, say.

    Its tensors lie in memory as the weights do, which lay otherwise before: a fused step takes both
    as they lie, and would pair numbers that do not belong together.

    Args:
        state: Its `state_dict`. Torch numbers parameters group by group, FSDP2 as the model does.
        decoder: Whose parameters it moved.
        joining: As for `decay_groups`.

    Returns:
        The same groups where they are today's, or others than `decay_groups` ever made.
    """
    laid = {
        number: {
            name: value.contiguous() if isinstance(value, Tensor) else value
            for name, value in entries.items()
        }
        for number, entries in state["state"].items()
    }
    state = state | {"state": laid}
    tables = {id(parameter) for parameter in decoder.embedding.parameters()}
    before = _split(decoder, tables, joining)
    now = _split(decoder, spared_of_decay(decoder), joining)
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes != [len(group) for group in before if group] or not all(map(len, now)):
        return state
    theirs = [number for group in state["param_groups"] for number in group["params"]]
    index = {id(entry): n for entry, n in zip(before[0] + before[1], theirs, strict=True)}
    moved = {
        number: state["state"][index[id(entry)]]
        for number, entry in enumerate(now[0] + now[1])
        if index[id(entry)] in state["state"]
    }
    numbers = iter(range(sum(sizes)))
    groups = [
        group | {"params": [next(numbers) for _ in entries]}
        for group, entries in zip(state["param_groups"], now, strict=True)
    ]
    return state | {"state": moved, "param_groups": groups}


SCHEDULES = ("cosine", "wsd", "constant")


def learning_rate_schedule(
    warmup_steps: int,
    steps: float,
    final: float,
    shape: str = "cosine",
    decay_fraction: float = 0.2,
) -> Callable[[int], float]:
    """The learning rate over its peak, as a function of the optimizer steps done.

    ``(n + 1) / warmup_steps`` first; then, where p runs from 0 to 1 over the steps that are left::

        cosine    final + (1 - final) (1 + cos(pi p)) / 2
        wsd       1 (stable), and over the last steps final + (1 - final) (1 - p) (decay)
        constant  1

    WSD is Hu et al.'s (MiniCPM, arXiv 2404.06395, section 4): until the decay begins, a run does
    not depend on how long it will be, so a checkpoint from there can be trained on. It decays along
    a line, over 20 % of the steps, as Hagele et al. find enough (arXiv 2405.18392, section 3).

    Args:
        warmup_steps: Steps until the peak; half of all steps at most, so that a run cut short
            for a trial still trains.
        steps: Steps in all; infinite: the rate stays at its peak after the warm-up.
        final: Where it ends, over the peak.
        shape: "cosine", "wsd" or "constant".
        decay_fraction: Of all steps, for wsd: those over which the rate falls.

    Raises:
        ValueError: Another shape.
    """
    if shape not in SCHEDULES:
        raise ValueError(f"schedule={shape!r} is not one of {', '.join(SCHEDULES)}")
    warmup = int(min(warmup_steps, steps / 2))
    begin: float = warmup  # of the decay
    if shape == "wsd" and not math.isinf(steps):
        begin = max(warmup, steps - round(decay_fraction * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if shape == "constant" or math.isinf(steps):
            return 1.0
        progress = min(max(step - begin, 0) / max(steps - begin, 1), 1.0)
        left = 1 - progress if shape == "wsd" else (1 + math.cos(math.pi * progress)) / 2
        return final + (1 - final) * left

    return factor


def clip_by_norm(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Clip gradients to a norm, in place, and hand back the norm that they had.

    Of 16-bit gradients torch takes it in their own dtype, where it is rounded to three digits or,
    in float16, infinite from 65,520 on; here it is float32 at least.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    dtypes = {gradient.dtype for gradient in gradients}
    if dtypes <= {torch.float32, torch.float64}:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    norms = [
        torch.linalg.vector_norm(gradient, dtype=at_least_float32(gradient.dtype))
        for gradient in gradients
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
