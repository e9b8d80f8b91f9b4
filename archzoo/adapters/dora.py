"""DoRA: the length of each row of a weight beside its direction, which LoRA changes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from archzoo.adapters import Adapter, Target
from archzoo.adapters.lora import LoRA, times
from archzoo.numerics import KeepsFloat32, at_least_float32, without_autocast


class DoRA(KeepsFloat32, LoRA):
    """``W' = m V / |V|``, ``V = W + s B A``, s = alpha / rank, m (rows), |V| the norm of each row.

    m starts at the norms of W's rows and B at 0, so nothing changes before the first step. Rows of
    W' have the norm |m|, whatever A and B are. (The paper speaks of columns: its W is the
    transpose.) The bias is added behind, unscaled. Each expert has its own m, A and B.

    The norm counts as a constant in the gradient, as in the paper, which saves memory; with
    ``detach_norm=False`` A and B get the gradient through it as well, while y and the gradients of
    m and x are the same.

    Parameters: rank * (rows + columns) + rows for a block. m is a vector, which does not decay, and
    stays in float32 beside a base in half precision, which has no step small enough near m.

    Source: Liu et al., arXiv 2402.09353, equation 5; the norm as a constant: section 4.3.

    Args:
        target: What it changes.
        targets: Names of blocks, or regular expressions that match a whole path such as
            ``blocks.0.mixer.query_key_value.query``. None: query and value.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
        rank: Of the change of V; at most the block's rows or columns.
        alpha: Over rank, the scale of that change.
        dropout: Of x in all that is added to y, as the authors' code has it, at the price of a
            second product with W; where a weight is read there is none.
        rank_stabilised: Scale by alpha / sqrt(rank) instead of alpha / rank.
        detach_norm: Take the norm for a constant in the gradient.

    Raises:
        ValueError: What LoRA refuses.
    """

    float32_names = ("magnitude",)

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
        detach_norm: bool = True,
    ) -> None:
        super().__init__(
            target,
            targets=targets,
            layers=layers,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rank_stabilised=rank_stabilised,
        )
        self.detach_norm = detach_norm
        # m of all experts is one vector, too: weights of two axes would decay.
        self.magnitude = nn.Parameter(torch.ones(math.prod(target.shape[:-1])))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """A and B as LoRA's, m at the norms of the weight's rows."""
        self.reset_parameters()
        self.magnitude.copy_(self.norm(weight).flatten())

    def norm(self, weight: Tensor) -> Tensor:
        """|V| (rows), or (experts, rows), in m's dtype: a row of zeros has the smallest number."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            with without_autocast(weight.device):
                norm = self.norms(self.direction(weight.to(at_least_float32(weight.dtype))))
            norm = norm.to(self.magnitude.dtype)
            return norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def direction(self, weight: Tensor) -> Tensor:
        """``V = W + s B A``, of the weight's shape and dtype."""
        first, second = (factor.to(weight.dtype) for factor in self.factors())
        if weight.dim() == 2:  # in one pass
            return torch.addmm(weight, second, first, alpha=self.scale)
        return weight + second @ first * self.scale

    @staticmethod
    def norms(weight: Tensor) -> Tensor:
        """Of a matrix's rows, at least in float32."""
        wide = weight.to(at_least_float32(weight.dtype))
        norms: Tensor = torch.linalg.vector_norm(wide, dim=-1)
        return norms

    def gain(self, weight: Tensor) -> Tensor:
        """``m / |V|``, (rows) or (experts, rows): 1 at the start."""
        return self.magnitude.view(weight.shape[:-1]) / self.norm(weight)

    output = Adapter.output  # without the weight there is none

    def output_beside(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``(m / |V| - 1) W x + m / |V| s B (A x)``, of y's shape."""
        gain = self.gain(weight)
        scaled = (self.second * gain[..., None]).to(self.second.dtype)  # for y is larger than B
        gain = gain if gain.dim() == 1 else gain[:, None]
        if self.dropout and self.training:
            x = self.dropped(x)
            base = times(x, weight.to(x.dtype))
        else:
            x = x.to(self.first.dtype)
            base = y if bias is None else y - (bias if bias.dim() == 1 else bias[:, None])
        return (gain - 1).to(base.dtype) * base + times(times(x, self.first) * self.scale, scaled)

    def scaled_low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor, float, Tensor] | None:
        """A, B, s and ``m / |V|``; None while it drops some of x."""
        if self.dropout and self.training:
            return None
        return *self.factors(), self.scale, self.gain(weight)

    def delta(self, weight: Tensor) -> Tensor:
        """``m V / |V| - W``, of the weight's shape."""
        gain = self.gain(weight)[..., None]
        return (gain - 1) * weight + gain * self.change()
