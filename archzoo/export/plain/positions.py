"""Rotations in plain PyTorch. Biases are plain in archzoo/positions/biases.py already."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from archzoo.export.plain.core import Rotary, for_float64
from archzoo.positions.rotary import (
    llama3_frequencies,
    ntk_base,
    rotary_frequencies,
    yarn_attention_factor,
    yarn_frequencies,
)


def rotate(x: Tensor, angles: Tensor, length: float | Tensor = 1.0) -> Tensor:
    """Turn pairs of channels (2i, 2i + 1) of x (batch, time, heads, head_dim), the first ones.

    Angles are (batch, time, 1, pairs) float64, in less than which far positions would coincide.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    pairs = angles.shape[-1]
    cos, sin = ((part * length).to(x.device, dtype) for part in (angles.cos(), angles.sin()))
    a, b = x[..., : 2 * pairs].to(dtype).unflatten(-1, (pairs, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., 2 * pairs :]], dim=-1)


class Rotation(Rotary):
    """Turns queries and keys by ``position * theta_i``, so that scores see the distance alone."""

    frequencies: tuple[float, ...]  # theta, one a pair
    length = 1.0  # what rotated queries and keys are multiplied with besides

    def angles(self, positions: Tensor) -> Tensor:
        """Of positions (batch, time): (batch, time, 1, pairs) float64."""
        if positions.device.type == "mps":  # which has no float64
            positions = positions.cpu()
        theta = torch.tensor(self.frequencies, dtype=torch.float64, device=positions.device)
        return positions[:, :, None, None] * theta

    def forward(
        self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate q and k (batch, time, heads, head_dim) by positions (batch, time)."""
        q = rotate(q, self.angles(query_positions), self.length)
        return q, rotate(k, self.angles(key_positions), self.length)


class RetentionRotation(Rotation):
    """RetNet's rotation: ``theta_i = base^-e_i``, e from 0 to 1 in head_dim / 2 even steps.

    Source: Sun et al., Retentive Network, arXiv 2307.08621, eq. 4, as torchscale builds it.
    """

    def __init__(self, head_dim: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        pairs = head_dim // 2
        self.frequencies = tuple(base ** -(i / max(pairs - 1, 1)) for i in range(pairs))


class RotaryEmbedding(Rotation):
    """RoPE: ``theta_i = base^(-2i / D)``, D channels rotated, and its scalings to longer texts.

    Source: Su et al., RoFormer, arXiv 2104.09864; linear: Chen et al., arXiv 2306.15595; ntk:
    bloc97, "NTK-Aware Scaled RoPE", 2023; yarn: arXiv 2309.00071; llama3: arXiv 2407.21783.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10_000.0,
        rope_type: str = "default",
        factor: float = 1.0,
        original_max_position_embeddings: int | None = None,
        partial_rotary_factor: float = 1.0,
        attention_factor: float | None = None,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        truncate: bool = True,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
    ) -> None:
        super().__init__()
        dim = int(head_dim * partial_rotary_factor)
        longest = original_max_position_embeddings
        self.factor, self.trained = factor, longest or 0
        self.frequencies = rotary_frequencies(dim, base)
        if rope_type == "linear":
            self.frequencies = tuple(theta / factor for theta in self.frequencies)
        if rope_type == "ntk":
            self.frequencies = rotary_frequencies(dim, ntk_base(base, dim, factor))
        if rope_type == "yarn":
            self.frequencies = yarn_frequencies(
                dim, base, factor, self.trained, beta_fast, beta_slow, truncate
            )
            self.length = attention_factor or yarn_attention_factor(factor)
        if rope_type == "llama3":
            self.frequencies = llama3_frequencies(
                dim, base, factor, self.trained, low_freq_factor, high_freq_factor
            )


class DynamicRotaryEmbedding(RotaryEmbedding):
    """RoPE of the base that fits the length which is reached at each position, see rope_type.

    ``base (s n / L - s + 1)^(D / (D - 2))`` at position n - 1, from the trained length L on.

    Source: emozilla, "Dynamically Scaled RoPE", 2023.
    """

    def angles(self, positions: Tensor) -> Tensor:
        """Of positions (batch, time): (batch, time, 1, pairs) float64."""
        angles = super().angles(positions)
        pairs = angles.shape[-1]
        time = for_float64(positions)[:, :, None, None]
        reached = (time + 1).clamp(min=self.trained).to(torch.float64) / self.trained
        slower = torch.arange(pairs, device=time.device, dtype=torch.float64) * -2.0
        slower = slower / (2 * pairs - 2)
        return angles * (self.factor * reached - (self.factor - 1)) ** slower


class XPos(Rotary):
    """RoPE whose scores also fade with distance, fast pairs faster.

    q is multiplied by ``zeta_i^(t / scale_base)`` and k by its inverse,
    ``zeta_i = (2i / D + gamma) / (1 + gamma)``.

    Source: Sun et al., A Length-Extrapolatable Transformer, arXiv 2212.10554, section 3.2.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10_000.0,
        gamma: float = 0.4,
        scale_base: float = 512.0,
    ) -> None:
        super().__init__()
        self.frequencies, self.scale_base = rotary_frequencies(head_dim, base), scale_base
        pairs = range(head_dim // 2)
        self.log_scales = [math.log((2 * i / head_dim + gamma) / (1 + gamma)) for i in pairs]

    def forward(
        self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate and scale q and k (batch, time, heads, head_dim) by positions (batch, time)."""

        def turned(x: Tensor, positions: Tensor, sign: int) -> Tensor:
            time = for_float64(positions)[:, :, None, None]
            how: Any = {"dtype": torch.float64, "device": time.device}
            theta = torch.tensor(self.frequencies, **how)
            fading = time * torch.tensor(self.log_scales, **how) * (sign / self.scale_base)
            return rotate(x, time * theta, fading.exp())

        return turned(q, query_positions, 1), turned(k, key_positions, -1)


class NoRotation(Rotary):
    """No position method on q and k: the causal mask alone tells order.

    Source: Kazemnejad et al., arXiv 2305.19466.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()

    def forward(
        self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hand q and k back as they are."""
        return q, k
