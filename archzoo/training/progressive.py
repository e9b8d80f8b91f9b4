"""The progressive loss, in which looped models are trained: a random number of runs of the stack.

Source: Bansal et al., End-to-end Algorithm Synthesis with Recurrent Networks, arXiv 2202.05826,
section 3.2, as McLeish et al., arXiv 2405.17399, train
their looped models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from archzoo.embeddings.counter_random import LOOPS, integers, random_bits


class Pass(NamedTuple):
    """One way through a looped stack.

    Attributes:
        weight: Of its loss.
        loops: Runs with gradients; None: all that the model has.
        no_grad_loops: Runs before those, without gradients.
    """

    weight: float
    loops: int | None = None
    no_grad_loops: int = 0


def passes(loops: int, share: float, seed: int, step: int) -> list[Pass]:
    """What a step's loss is made of: ``(1 - share) L_full + share L_progressive``.

    L_progressive begins with ``n ~ U{0 .. loops - 1}`` free runs, and ``m ~ U{1 .. min(loops - n,
    max(loops / 2, 1))}`` more are trained.

    Args:
        loops: Runs of the model's stack; 1: there is nothing to draw.
        share: Of the progressive loss, 0 to 1.
        seed: Of the draws.
        step: Optimizer steps taken so far; the draws are a function of (seed, step).
    """
    if loops == 1 or not share:
        return [Pass(1.0)]
    first, second = random_bits(seed, LOOPS, torch.tensor([step]), torch.arange(2)).split(1)
    free = int(integers(first, loops))
    most = min(loops - free, max(loops // 2, 1))
    drawn = Pass(share, 1 + int(integers(second, most)), free)
    return [drawn] if share == 1 else [Pass(1 - share), drawn]
