"""Dense feed-forwards: gated (SwiGLU, GEGLU) and plain (GELU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from archzoo.block import Aux, FeedForward
from archzoo.documents import Context
from archzoo.kernels import swiglu
from archzoo.kernels.launching import fused
from archzoo.linear import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}


def find_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of a name, or one clear line that names those there are."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class GatedFeedForward(FeedForward):
    """SwiGLU and its kin: ``y = (activation(x Wg) * (x Wu)) Wd``.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202, eq. 6.

    Args:
        dim: Width of x.
        width: Hidden width. The layer holds 3 * dim * width parameters.
        activation: "silu" (SwiGLU), "gelu" (GEGLU) or "relu" (ReGLU).
    """

    def __init__(
        self, dim: int, width: int, *, activation: Literal["silu", "gelu", "relu"] = "silu"
    ) -> None:
        super().__init__()
        # Gate and up are one matrix, gate first: one product a step where most would have two.
        self.gate_up = Linear(dim, {"gate": width, "up": width})
        self.down = Linear(width, {"down": dim}, residual_projection=True)
        self.activation = find_activation(activation)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Aux]:
        """X (batch, time, dim) to y of the same shape; aux is empty."""
        hidden = self.gate_up(x)
        gate, up = hidden.chunk(2, dim=-1)
        down = self.down
        # peft puts another module in its place.
        if self.activation is F.silu and fused(hidden) and isinstance(down, Linear):
            weight = down.weight_of_call(up)
            if weight is not None:
                return swiglu.swiglu_product(hidden, weight), Aux()
        return self.down(self.activation(gate) * up), Aux()


class PlainFeedForward(FeedForward):
    """The two-matrix feed-forward: ``y = activation(x Wu) Wd``.

    Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 3.3 (ReLU);
    RetNet's paper uses it with GELU and width 2 * dim (arXiv 2307.08621, section 3.1).

    Args:
        dim: Width of x.
        width: Hidden width. The layer holds 2 * dim * width parameters.
        activation: "gelu", "relu" or "silu".
    """

    def __init__(
        self, dim: int, width: int, *, activation: Literal["silu", "gelu", "relu"] = "gelu"
    ) -> None:
        super().__init__()
        self.up = Linear(dim, {"up": width})
        self.down = Linear(width, {"down": dim}, residual_projection=True)
        self.activation = find_activation(activation)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Aux]:
        """X (batch, time, dim) to y of the same shape; aux is empty."""
        return self.down(self.activation(self.up(x))), Aux()
