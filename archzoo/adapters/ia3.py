"""(IA)^3: a learned number for each channel of keys, values and the feed-forward's middle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archzoo.adapters import Adapter, Target
from archzoo.numerics import KeepsFloat32


def scales_input(target: Target) -> bool:
    """Whether a scaling of this target is one of its input: ``down`` reads a feed-forward's middle.

    Args:
        target: A block of a Linear.
    """
    return target.path.rpartition(".")[2] == "down"


class IA3(KeepsFloat32, Adapter):
    """``k = l_k * (W_k x)``, ``v = l_v * (W_v x)``, and ``W_down (l_ff * h)`` of the middle h.

    (IA)^3, "infused adapter by inhibiting and amplifying inner activations". l starts at 1, so
    nothing changes before the first step. On ``down`` it scales the input, with or without a gate
    in front; on any other block the output, the bias with it. Each expert has its own l. A layer
    holds kv_dim + kv_dim + width parameters. They never decay, for 1 is neutral and not 0, and
    stay in float32 beside a base in half precision, which has no step small enough near 1.

    Merged: ``W' = diag(l) W`` and ``b' = l * b``, on ``down`` ``W' = W diag(l)``.

    Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning, arXiv 2205.05638, section 3.3.

    Args:
        target: What it changes.
        targets: As for `archzoo.LoRA`. None: key, value and down, as in the paper. A router is
            refused: its rows are scores.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
    """

    kinds = ("linear", "experts")
    default_targets = ("key", "value", "down")
    mergeable = True
    takes_routers = False
    float32_names = ("scale",)

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
    ) -> None:
        super().__init__(target, targets=targets, layers=layers)
        self.decays = False
        self.of_input = scales_input(target)
        *stack, rows, columns = target.shape
        self.scale = nn.Parameter(torch.empty(*stack, columns if self.of_input else rows))  # l
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """L is 1."""
        nn.init.ones_(self.scale)

    def input(self, x: Tensor) -> Tensor | None:
        """``(l - 1) * x`` on ``down``, (..., columns); None elsewhere."""
        return x * (self.scale - 1) if self.of_input else None

    def output(self, x: Tensor, y: Tensor) -> Tensor | None:
        """``(l - 1) * y``, (..., rows), and None on ``down``; of a stack each expert by its l."""
        if self.of_input:
            return None
        scale = self.scale - 1
        return y * (scale if scale.dim() == 1 else scale[:, None])

    def delta(self, weight: Tensor) -> Tensor:
        """``diag(l - 1) W``, or ``W diag(l - 1)`` on ``down``, of the weight's shape."""
        scale = self.scale - 1
        return weight * (scale[..., None, :] if self.of_input else scale[..., None])

    def bias_delta(self, bias: Tensor) -> Tensor | None:
        """``(l - 1) * b``; None on ``down``, whose bias is added behind the scaling."""
        return None if self.of_input else bias * (self.scale - 1)
