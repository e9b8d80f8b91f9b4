"""Rotations of queries and keys by position: RoPE, RetNet's own, and none.

All rotate interleaved pairs (2i, 2i + 1) of a head by the angle ``position * theta_i``; they
differ in theta. Angles are built in float64, and only their sine and cosine are rounded: in
float32 the angle itself loses digits with the position, in bfloat16 whole positions coincide.
Frequencies are host-side numbers and never buffers, so no cast of the model can reach them.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from archzoo.block import Rotary, at_least_float32, constant

Frequencies = tuple[float, ...]

# All layers of one call rotate by the same positions tensor, so their tables are shared while
# that tensor lives: {positions: {(frequencies, dtype): table}}.
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def rotary_frequencies(rotary_dim: int, base: float = 10_000.0) -> Frequencies:
    """RoPE's ``theta_i = base^(-2i / rotary_dim)``, i = 0 .. rotary_dim/2 - 1.

    Source: Su et al., RoFormer, arXiv 2104.09864, section 3.2.2.
    """
    return tuple(base ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2))


def retention_frequencies(rotary_dim: int, base: float = 10_000.0) -> Frequencies:
    """RetNet's ``theta_i = base^(-e_i)``, e from 0 to 1 in rotary_dim/2 even steps.

    The last frequency is exactly 1 / base, unlike RoPE's. Source: torchscale's RetNet, after
    arXiv 2307.08621, eq. 3 to 4.
    """
    steps = rotary_dim // 2
    return tuple(base ** -(i / max(steps - 1, 1)) for i in range(steps))


def _rotation_table(positions: Tensor, frequencies: Frequencies, dtype: torch.dtype) -> Tensor:
    """``exp(i * position * theta)``: positions (batch, time) to (batch, time, pairs) complex.

    Rows that are one row expanded (stride 0) give a table of batch 1.
    """
    if positions.stride(0) == 0:
        positions = positions[:1]
    theta = constant(frequencies, positions.device, torch.float64)
    angles = positions[..., None] * theta
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    return torch.polar(torch.ones_like(angles), angles).to(complex_dtype)


def rotation_table(positions: Tensor, frequencies: Frequencies, dtype: torch.dtype) -> Tensor:
    """`_rotation_table`, computed once for all layers that see the same positions tensor."""
    if torch.compiler.is_compiling():
        return _rotation_table(positions, frequencies, dtype)
    tables = _tables.setdefault(positions, {})
    key = (frequencies, dtype)
    if key not in tables:
        tables[key] = _rotation_table(positions, frequencies, dtype)
    return tables[key]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first 2 * pairs channels of x (batch, time, heads, head_dim).

    Args:
        x: Any float dtype; it comes back in the same.
        table: (batch or 1, time, pairs) complex, from `rotation_table`.
    """
    pairs = table.shape[-1]
    rotated, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    wide = rearrange(rotated.to(table.real.dtype), "b t h (p two) -> b t h p two", two=2)
    if torch.compiler.is_compiling():
        # Compilers do not fuse complex arithmetic; eager mode is 2 to 3 times faster with it.
        cos, sin = table.real[:, :, None], table.imag[:, :, None]
        a, b = wide.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(wide.contiguous()) * table[:, :, None])
    turned = rearrange(turned, "b t h p two -> b t h (p two)").to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class _Rotation(Rotary):
    """Rotates q and k by the same frequencies."""

    def __init__(self, head_dim: int, frequencies: Frequencies) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd: a rotation needs pairs of channels")
        self.head_dim, self.frequencies = head_dim, frequencies

    def forward(
        self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate q and k (batch, time, heads, head_dim) by positions (batch, time)."""
        dtype = at_least_float32(q.dtype)
        q = rotate(q, rotation_table(query_positions, self.frequencies, dtype))
        k = rotate(k, rotation_table(key_positions, self.frequencies, dtype))
        return q, k


class RotaryEmbedding(_Rotation):
    """RoPE: ``theta_i = base^(-2i / rotary_dim)``.

    Source: Su et al., RoFormer, arXiv 2104.09864.

    Args:
        head_dim: Channels of a head.
        base: The wavelengths run from 2 pi to 2 pi * base tokens.
    """

    def __init__(self, head_dim: int, *, base: float = 10_000.0) -> None:
        super().__init__(head_dim, rotary_frequencies(head_dim, base))


class RetentionRotation(_Rotation):
    """RetNet's rotation: ``theta_i = base^(-linspace(0, 1, head_dim / 2)_i)``.

    Source: Sun et al., Retentive Network, arXiv 2307.08621, eq. 4, as torchscale builds it.

    Args:
        head_dim: Channels of a head.
        base: The slowest pair turns by 1 / base a token.
    """

    def __init__(self, head_dim: int, *, base: float = 10_000.0) -> None:
        super().__init__(head_dim, retention_frequencies(head_dim, base))


class NoRotation(Rotary):
    """No position method on q and k: NoPE, where the causal mask alone tells order.

    Source: Kazemnejad et al., arXiv 2305.19466.

    Args:
        head_dim: Channels of a head; unused.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()

    def forward(
        self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hand q and k back as they are."""
        return q, k
