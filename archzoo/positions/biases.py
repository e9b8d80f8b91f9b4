"""Biases: what a pair of positions (i, j) adds to attention's logit, for each head.

::

    ALiBi     - slope_h d
    T5        table[bucket(d), h]
    KERPLE    - r_h log(1 + s_h d)      or  - r_h d^(s_h)
    FIRE      mlp_h(psi(d) / psi(max(i, L)))

with the distance d = i - j; a key to come (d < 0) is masked by attention, and gets what d = 0 gets,
so that no logarithm of a negative number can poison a gradient. Computed in float32 at least.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.block import Bias
from archzoo.linear import Linear
from archzoo.numerics import at_least_float32, constant


def distances(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """``max(i - j, 0)``, (batch or 1, queries, keys) int64; one row where all rows are one."""
    if query_positions.stride(0) == 0 and key_positions.stride(0) == 0:
        query_positions, key_positions = query_positions[:1], key_positions[:1]
    return (query_positions[:, :, None] - key_positions[:, None, :]).clamp(min=0)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """``2^(-8 h / heads)``, h = 1 .. heads, for a power of two.

    Otherwise those of the next smaller power of two, and then every other one of twice as many.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * head / power) for head in range(1, power + 1)]
    between = [2.0 ** (-8 * head / (2 * power)) for head in range(1, 2 * power + 1, 2)]
    return tuple(slopes + between[: heads - power])


class ALiBi(Bias):
    """``- slope_h (i - j)``, nothing learned.

    Source: Press et al., Train Short, Test Long, arXiv 2108.12409, section 3; other numbers of
    heads than powers of two as in the authors' code.

    Args:
        heads: Of attention.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slopes = alibi_slopes(heads)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Positions (batch, queries), (batch, keys) to (batch or 1, heads, queries, keys)."""
        distance = distances(query_positions, key_positions)
        # No parameter says which precision is wanted; attention rounds to its own.
        slopes = constant(self.slopes, distance.device, torch.float32)
        return -slopes[:, None, None] * distance[:, None]


def t5_buckets(distance: Tensor, buckets: int, furthest: int) -> Tensor:
    """The first half of the buckets hold one distance each, the rest grow as its logarithm.

    ``n`` for n < half, then ``half + floor(log(n / half) / log(furthest / half) * half)``, the
    last bucket at most.

    Args:
        distance: Int, at least 0, of any shape.
        buckets: How many there are.
        furthest: The distance at which the last one begins.
    """
    half = buckets // 2
    far_away = distance.clamp(min=half).to(torch.float32)  # whatever torch's default dtype is
    growth = (far_away / half).log() / math.log(furthest / half)
    far = half + (growth * (buckets - half)).long()
    return torch.where(distance < half, distance, far.clamp(max=buckets - 1))


class T5Bias(Bias):
    """``table[bucket(i - j), head]``, learned.

    Source: Raffel et al., T5, arXiv 1910.10683, section 2.1, causal: all buckets look back.

    Args:
        heads: Of attention.
        buckets: Rows of the table, half of them one distance each.
        furthest: All distances from this one on use the last bucket.
    """

    def __init__(self, heads: int, *, buckets: int = 32, furthest: int = 128) -> None:
        super().__init__()
        if buckets < 2 or buckets % 2 or furthest <= buckets // 2:
            raise ValueError(
                f"buckets={buckets} must be even, and furthest={furthest} above the "
                f"{buckets // 2} distances with a bucket of their own"
            )
        self.buckets, self.furthest = buckets, furthest
        self.table = nn.Parameter(torch.empty(buckets, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02^2)."""
        nn.init.normal_(self.table, std=0.02)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Positions (batch, queries), (batch, keys) to (batch or 1, heads, queries, keys)."""
        distance = distances(query_positions, key_positions)
        rows = F.embedding(t5_buckets(distance, self.buckets, self.furthest), self.table)
        return rearrange(rows, "b q k h -> b h q k")


class KERPLE(Bias):
    """``- r log(1 + s d)``, or ``- r d^s`` with s <= 2; r, s > 0 learned for each head.

    Source: Chi et al., KERPLE, arXiv 2205.09921, section 4, eq. 6 and 7. The parameters are kept
    positive by an exponential (a sigmoid for the power's s), there by clamping, which stops a
    parameter at its bound for good.

    Args:
        heads: Of attention.
        kind: "log" or "power".

    Raises:
        ValueError: Another kind.
    """

    def __init__(self, heads: int, *, kind: Literal["log", "power"] = "log") -> None:
        super().__init__()
        if kind not in ("log", "power"):
            raise ValueError(f"kind={kind!r} is neither log nor power")
        self.kind = kind
        self.log_scale, self.rate = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """R and s start as in the paper's code, uniform up to 2 and up to 1, but away from 0."""
        with torch.no_grad():
            self.log_scale.uniform_().mul_(1.9).add_(0.1).log_()
            self.rate.uniform_().mul_(0.9).add_(0.1)
            if self.kind == "log":
                self.rate.log_()
            else:
                self.rate.div_(2).logit_()

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Positions (batch, queries), (batch, keys) to (batch or 1, heads, queries, keys)."""
        dtype = at_least_float32(self.rate.dtype)
        scale = self.log_scale.to(dtype).exp()[:, None, None]
        rate = self.rate.to(dtype)[:, None, None]
        distance = distances(query_positions, key_positions)[:, None].to(dtype)
        if self.kind == "log":
            return -scale * (rate.exp() * distance).log1p()
        # At distance 0 the power is 0, and its logarithm must not reach the gradient.
        power = (2 * rate.sigmoid() * distance.clamp(min=1).log()).exp()
        return -scale * torch.where(distance > 0, power, 0)


class FIRE(Bias):
    """``mlp(psi(i - j) / psi(max(i, L)))``, ``psi(x) = log(c x + 1)``; c, L and the mlp learned.

    The mlp is 1 to `width` to heads with a ReLU. Up to L tokens it sees the distance alone, after
    that the distance as a fraction of the query's position, so that no input is ever out of range.

    Source: Li et al., Functional Interpolation for Relative Positions, arXiv 2310.04418, section
    3.2, eq. 6 to 8.

    Args:
        heads: Of attention.
        width: Of the mlp's hidden layer.
        threshold: What L starts at, in tokens.
        slope: What c starts at.
    """

    def __init__(
        self, heads: int, *, width: int = 32, threshold: float = 512.0, slope: float = 0.1
    ) -> None:
        super().__init__()
        if threshold <= 0 or slope <= 0:
            raise ValueError(f"threshold={threshold} and slope={slope} must be above 0")
        self.threshold, self.first_slope = threshold, slope
        self.slope = nn.Parameter(torch.tensor(float(slope)))
        self.multiplier = nn.Parameter(torch.ones(()))  # of the threshold
        # A constant added to all of a head's logits does nothing, so the mlp ends without a bias.
        self.inner = Linear(1, {"fire_inner": width}, bias=True)
        self.outer = Linear(width, {"fire_outer": heads})
        for layer in (self.inner, self.outer):
            # At the decoder's scale of 0.02 the bias would start, and stay for long, at nothing.
            layer.keeps_init = True
            layer.weight_is_read = True

    def reset_parameters(self) -> None:
        """C and L as given, the mlp as torch starts it."""
        nn.init.constant_(self.slope, self.first_slope)
        nn.init.ones_(self.multiplier)
        self.inner.reset_parameters()
        self.outer.reset_parameters()

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Positions (batch, queries), (batch, keys) to (batch or 1, heads, queries, keys)."""
        dtype = at_least_float32(self.slope.dtype)
        distance = distances(query_positions, key_positions)
        queries = query_positions[: len(distance), :, None].to(dtype)
        # Absolute values: a step past 0 must not take the logarithm of a negative number.
        slope = self.slope.to(dtype).abs()
        threshold = (self.threshold * self.multiplier.to(dtype)).abs()
        reach = (slope * torch.maximum(queries, threshold)).log1p()
        fraction = (slope * distance.to(dtype)).log1p() / reach.clamp(min=1e-6)
        inner, shift = self.inner.effective_weight().to(dtype), self.inner.effective_bias()
        assert shift is not None  # it has one
        hidden = F.relu(F.linear(fraction[..., None], inner, shift.to(dtype)))
        bias = F.linear(hidden, self.outer.effective_weight().to(dtype))
        return rearrange(bias, "b q k h -> b h q k")
