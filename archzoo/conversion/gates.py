"""Rows of a router from prompts: the direction in which each expert's prompts lie.

A linear router scores expert e by ``W_e x``. Without training W_e can be the direction of what the
expert is for: of each prompt one vector in each layer (the gate says which), the mean over the
expert's positive prompts minus the mean over its negative ones, and of that the direction::

    W_e = m / |m|        m = mean over positive - mean over negative

The gates, by the vector that they take:

* ``router_average``: the mean over the prompt's tokens of what the router itself reads, the normed
  vector before the feed-forward;
* ``router_last``: that of the last token alone;
* ``hidden_average``, ``hidden_last``: the same of what the block reads, which is what
  mergekit-moe's ``hidden_avg`` and ``hidden`` take, although no router reads it;
* ``cheap_embed``: the sum of the prompt's embedded tokens, the same in all layers, and no pass
  through the model;
* ``random``: no prompts; the rows are drawn.

mergekit-moe pads prompts and averages over the padding, or takes a padding token for the last one;
here every prompt is read by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from archzoo.decoder import Decoder

Gate = Literal[
    "router_average", "router_last", "hidden_average", "hidden_last", "cheap_embed", "random"
]
GATES: tuple[str, ...] = get_args(Gate)
NOTHING = 1e-6  # of the vectors' own length: a difference below has no direction

Prompt = Sequence[int]


@torch.no_grad()
def router_rows(
    base: Decoder,
    positive: Sequence[Sequence[Prompt]],
    negative: Sequence[Sequence[Prompt]] | None = None,
    gate: str = "router_average",
) -> Tensor:
    """The rows of every layer's router, (layers, experts, dim) float64, each of norm 1.

    Args:
        base: The dense model, which reads the prompts.
        positive: Of each expert its prompts, as tokens.
        negative: Of each expert those that are not for it, maybe none. None: none at all.
        gate: One of `GATES` but random.

    Raises:
        ValueError: An expert has no prompts, or its positive and negative ones do not differ.
    """
    if gate not in GATES or gate == "random":
        raise ValueError(f"gate={gate!r} takes no prompts: take one of {', '.join(GATES[:-1])}")
    means: list[list[Tensor | None]] = []
    for prompts in (positive, negative if negative is not None else [()] * len(positive)):
        if len(prompts) != len(positive):
            raise ValueError(f"{len(prompts)} lists of prompts for {len(positive)} experts")
        found = [[prompt_vector(base, p, gate) for p in of_expert] for of_expert in prompts]
        means.append([torch.stack(vectors).mean(dim=0) if vectors else None for vectors in found])
    rows = []
    for expert, (mean, away) in enumerate(zip(*means, strict=True)):
        if mean is None:
            raise ValueError(f"expert {expert} has no prompt: give at least one")
        row = mean if away is None else mean - away
        length = row.norm(dim=-1, keepdim=True)
        nothing = (length <= NOTHING * mean.norm(dim=-1, keepdim=True)).squeeze(-1)
        if nothing.any():
            raise ValueError(
                f"the positive and negative prompts of expert {expert} are alike in layer "
                f"{int(nothing.nonzero()[0, 0])}, seen by {gate}, which gives its router no "
                "direction: give prompts that differ in what the gate sees, or another gate"
            )
        rows.append(row / length)
    return torch.stack(rows, dim=1)


def prompt_vector(base: Decoder, prompt: Prompt, gate: str) -> Tensor:
    """What a gate takes of a prompt in each layer, (layers, dim) float64.

    Args:
        base: The dense model.
        prompt: Its tokens.
        gate: One of `GATES` but random.
    """
    tokens = torch.tensor([list(prompt)], device=base.device)
    if gate == "cheap_embed":
        embedded = base.embedding.weight[tokens[0]].double().sum(dim=0)
        return embedded.expand(base.depth, -1).cpu()
    at_router = gate.startswith("router")
    modules = [block.feed_forward if at_router else block for block in base.blocks]
    seen: list[list[Tensor]] = [[] for _ in modules]  # in a looped model once an iteration

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0][0].double()
            seen[layer].append(x[-1] if gate.endswith("last") else x.mean(dim=0))

        return hook

    handles = [m.register_forward_pre_hook(keep(layer)) for layer, m in enumerate(modules)]
    training = base.training
    try:
        base.eval().hidden(tokens)
    finally:
        base.train(training)
        for handle in handles:
            handle.remove()
    return torch.stack([torch.stack(calls).mean(dim=0) for calls in seen]).cpu()
