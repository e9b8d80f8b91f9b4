"""The progressive loss of looped models: recurrences of random number, the first without gradients.

Source: Bansal et al., End-to-end Algorithm Synthesis with Recurrent Networks, arXiv 2202.05826,
section 3.2, as McLeish et al., arXiv 2405.17399, train
their looped models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from archzoo.embeddings.counter_random import LOOPS, integers, random_bits


class Pass(NamedTuple):
    """One pass through a looped stack.

    Attributes:
        weight: Of its loss.
        loops: Iterations with gradients; None: all that the model has.
        no_grad_loops: Iterations before those, without gradients.
    """

    weight: float
    loops: int | None = None
    no_grad_loops: int = 0


def passes(loops: int, fraction: float, seed: int, step: int) -> list[Pass]:
    """What a step's loss is made of: ``(1 - fraction) L_full + fraction L_progressive``.

    L_progressive begins with ``n ~ U{0 .. loops - 1}`` iterations without gradients, and
    ``m ~ U{1 .. min(loops - n, max(loops / 2, 1))}`` more are trained.

    Args:
        loops: Iterations of the model's stack; 1: nothing is random.
        fraction: Of the progressive loss, 0 to 1.
        seed: Of the random numbers.
        step: Optimizer steps taken so far; the numbers are a function of (seed, step).
    """
    if loops == 1 or not fraction:
        return [Pass(1.0)]
    first, second = random_bits(seed, LOOPS, torch.tensor([step]), torch.arange(2)).split(1)
    without = int(integers(first, loops))
    most = min(loops - without, max(loops // 2, 1))
    drawn = Pass(fraction, 1 + int(integers(second, most)), without)
    return [drawn] if fraction == 1 else [Pass(1 - fraction), drawn]
