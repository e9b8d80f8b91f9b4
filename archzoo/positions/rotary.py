"""Rotations of queries and keys by position: RoPE, RetNet's own, and none.

All rotate interleaved pairs (2i, 2i + 1) of a head by the angle ``position * theta_i``; they
differ in theta. Angles are built in float64, and only their sine and cosine are rounded: in
float32 the angle itself loses digits with the position, in bfloat16 whole positions coincide.
Frequencies are host-side numbers and never buffers, so no cast of the model can reach them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from archzoo.block import Rotary, at_least_float32, constant, once_per_call

Frequencies = tuple[float, ...]

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


def rotation_table(positions: Tensor, frequencies: Frequencies, dtype: torch.dtype) -> Tensor:
    """``exp(i * position * theta)``, complex, computed once for all layers of a call.

    Args:
        positions: (batch, time) ints; rows that are one row expanded give a table of batch 1.
        frequencies: theta, one a pair.
        dtype: float32 or float64, of the table's parts.

    Returns:
        (batch or 1, time, 1, pairs), to multiply (batch, time, heads, pairs) with.
    """

    def compute() -> Tensor:
        rows = positions[:1] if positions.stride(0) == 0 else positions
        angles = rows[..., None, None] * constant(frequencies, rows.device, torch.float64)
        wide = torch.complex128 if dtype == torch.float64 else torch.complex64
        return torch.polar(torch.ones_like(angles), angles).to(wide)

    return once_per_call(positions, ("rotation", frequencies, dtype), compute)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first 2 * pairs channels of x (batch, time, heads, head_dim).

    Args:
        x: Any float dtype; it comes back in the same.
        table: (batch or 1, time, 1, pairs) complex, from `rotation_table`.
    """
    pairs = table.shape[-1]
    if x.shape[-1] > 2 * pairs:
        turned = rotate(x[..., : 2 * pairs], table)
        return torch.cat([turned, x[..., 2 * pairs :]], dim=-1)
    wide = x.to(table.real.dtype).unflatten(-1, (pairs, 2))
    if torch.compiler.is_compiling():
        # Compilers do not fuse complex arithmetic; eager mode is 2 to 3 times faster with it.
        a, b = wide.unbind(-1)
        cos, sin = table.real, table.imag
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(wide) * table)
    return turned.flatten(-2).to(x.dtype)


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

    def both(self, qk: Tensor, heads: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q and k side by side, (batch, time, heads + key heads, head_dim), in one go."""
        table = rotation_table(positions, self.frequencies, at_least_float32(qk.dtype))
        qk = rotate(qk, table)
        return qk[:, :, :heads], qk[:, :, heads:]


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
