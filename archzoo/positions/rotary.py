"""Rotations of queries and keys by position: RoPE and its scalings, xPos, RetNet's own, and none.

All rotate interleaved pairs (2i, 2i + 1) of a head by the angle ``position * theta_i``; they
differ in theta. A scaling makes a model read texts s times longer than it was trained on by
turning slower; it changes numbers on the host and no weight.

Angles are built in float64, and only their sine and cosine are rounded: in float32 the angle
itself loses digits with the position, in bfloat16 whole positions coincide. Where a device has no
float64 they are built on the CPU. Frequencies are
host-side numbers and never buffers, so no cast of the model can reach them.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from archzoo.block import Rotary
from archzoo.numerics import at_least_float32, cast, constant, for_float64, once_per_call

Frequencies = tuple[float, ...]

RopeType = Literal["default", "linear", "ntk", "dynamic", "yarn", "llama3"]


# ---------------------------------------------------------------------------- frequencies


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


def ntk_base(base: float, rotary_dim: int, factor: float) -> float:
    """NTK-aware scaling: ``base * factor^(rotary_dim / (rotary_dim - 2))``.

    The slowest pair then turns exactly `factor` times slower, the fastest as before. The exponent
    takes the channels that are rotated, which are fewer than the head's where
    ``partial_rotary_factor`` is below 1: Yuan2.0-M32 rotates 128 of 256, and
    ``ntk_base(10_000, 128, 4)`` is 40,889.94.

    Source: bloc97, "NTK-Aware Scaled RoPE", 2023; Peng et al., YaRN, arXiv 2309.00071, eq. 16.

    Args:
        base: Of RoPE's frequencies, such as 10,000.
        rotary_dim: Channels that are rotated.
        factor: Target length over trained length.

    Raises:
        ValueError: Fewer than 4 channels, whose one pair has no slower one beside it.
    """
    if rotary_dim < 4:
        raise ValueError(
            f"NTK scaling of {rotary_dim} rotated channels changes nothing: it needs at least 4"
        )
    return float(base * factor ** (rotary_dim / (rotary_dim - 2)))


def dynamic_ntk_base(
    base: float, rotary_dim: int, factor: float, length: int, original_length: int
) -> float:
    """Dynamic NTK at one length: `ntk_base` of ``factor * n / L - (factor - 1)``, n >= L.

    `factor` is not the ratio that can be reached: with 4, the slowest pair turns 5 times slower
    at 2 L and 13 times at 4 L.

    Args:
        base: Of the trained model.
        rotary_dim: Channels that are rotated.
        factor: Of the method; 1 divides the slowest pair by n / L.
        length: n, tokens of the text; below L it counts as L.
        original_length: L, tokens of the texts in training.

    Source: emozilla, "Dynamically Scaled RoPE", 2023, as Hugging Face computes it.
    """
    ratio = max(length, original_length) / original_length
    return ntk_base(base, rotary_dim, factor * ratio - (factor - 1))


def yarn_frequencies(
    rotary_dim: int,
    base: float,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Frequencies:
    """YaRN: fast pairs as they are, slow ones `factor` times slower, a ramp in between.

    Pair i turns ``L theta_i / 2 pi`` times in L trained tokens. It turns r times at
    ``i = f(r) = D ln(L / 2 pi r) / (2 ln base)``; the ramp goes from floor f(beta_fast) to
    ceil f(beta_slow), both kept in 0 .. D - 1.

    Args:
        rotary_dim: D, channels that are rotated.
        base: Of the trained model.
        factor: s, target length over trained length; 1 changes nothing, to the last bit.
        original_length: L, tokens of the texts in training.
        beta_fast: Turns in L from which a pair stays.
        beta_slow: Turns in L up to which a pair is interpolated in full.
        truncate: Round the ends of the ramp to whole pairs.

    Source: Peng et al., YaRN, arXiv 2309.00071, section 3.2, definition 2.
    """
    frequencies = rotary_frequencies(rotary_dim, base)
    if factor == 1:
        return frequencies

    def pair(turns: float) -> float:
        return rotary_dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(beta_fast), pair(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if high <= low:
        high = low + 0.001  # a step instead of a ramp
    scaled = []
    for index, theta in enumerate(frequencies):
        ramp = min(max((index - low) / (high - low), 0.0), 1.0)
        scaled.append(ramp * theta / factor + (1 - ramp) * theta)
    return tuple(scaled)


def yarn_attention_factor(factor: float) -> float:
    """``0.1 ln s + 1``, by which YaRN multiplies rotated queries and rotated keys.

    Source: Peng et al., YaRN, arXiv 2309.00071, section 3.4: scores grow by its square.
    """
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def llama3_frequencies(
    rotary_dim: int,
    base: float,
    factor: float,
    original_length: int,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Frequencies:
    """Llama 3.1: by wavelength ``w = 2 pi / theta`` against the trained length L.

    ``w < L / high`` stays, ``w > L / low`` turns `factor` times slower, and between the two
    ``(L / w - low) / (high - low)`` says how much of it stays.

    Args:
        rotary_dim: Channels that are rotated.
        base: Of the trained model.
        factor: s; 1 changes nothing, to the last bit.
        original_length: L, tokens of the texts in training.
        low_freq_factor: low.
        high_freq_factor: high.

    Source: Dubey et al., The Llama 3 Herd of Models, arXiv 2407.21783, as released in code.
    """
    frequencies = rotary_frequencies(rotary_dim, base)
    if factor == 1:
        return frequencies
    scaled = []
    for theta in frequencies:
        turns = original_length * theta / (2 * math.pi)
        kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        scaled.append(kept * theta + (1 - kept) * theta / factor)
    return tuple(scaled)


# ---------------------------------------------------------------------------- rotating


def _polar(length: Tensor, angles: Tensor, dtype: torch.dtype) -> Tensor:
    """``length * exp(i * angles)``: complex, or under a compiler cosine and sine in a last axis."""
    if torch.compiler.is_compiling():
        both = torch.stack([angles.cos(), angles.sin()], dim=-1)
        return (length[..., None] * both).to(dtype)
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    return torch.polar(length, angles).to(wide)


def rotation_table(
    positions: Tensor,
    frequencies: Frequencies,
    dtype: torch.dtype,
    amplitude: float | tuple[float, ...] = 1.0,
) -> Tensor:
    """``amplitude * exp(i * position * theta)``, computed once for all layers of a call.

    Args:
        positions: (batch, time) ints; rows that are one row expanded give a table of batch 1.
        frequencies: theta, one a pair.
        dtype: float32 or float64, of the table's parts.
        amplitude: What the rotated channels are multiplied with besides; a compiler of any size
            takes a number for one that may change, and one in a tuple for a constant.

    Returns:
        (batch or 1, time, 1, pairs) complex, to multiply (batch, time, heads, pairs) with; under a
        compiler the same as cosine and sine, (batch or 1, time, 1, pairs, 2).
    """

    def compute() -> Tensor:
        rows = for_float64(positions[:1] if positions.stride(0) == 0 else positions)
        theta = constant(frequencies, rows.device, torch.float64)
        angles = rows.view(*rows.shape, 1, 1) * theta
        given = amplitude if isinstance(amplitude, tuple) else (amplitude,)
        lengths = constant(given, rows.device, torch.float64)
        return _polar(lengths, angles, dtype).to(positions.device)

    return once_per_call(positions, ("rotation", frequencies, dtype, amplitude), compute)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first 2 * pairs channels of x (batch, time, heads, head_dim).

    Compilers do not fuse complex arithmetic, and eager mode is 2 to 3 times faster with it.

    Args:
        x: Any float dtype; it comes back in the same.
        table: From `rotation_table`.
    """
    batch, time, heads, channels = x.shape
    pairs = table.shape[3]
    if channels > 2 * pairs:
        turned = rotate(x[..., : 2 * pairs], table)
        return torch.cat([turned, x[..., 2 * pairs :]], dim=-1)
    if not table.is_complex():
        a, b = x.to(table.dtype).view(batch, time, heads, pairs, 2).unbind(-1)
        cos, sin = table.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        wide = cast(x, torch.float64 if table.dtype == torch.complex128 else torch.float32)
        wide = wide.view(batch, time, heads, pairs, 2)
        *others, unit = wide.stride()
        if unit != 1 or wide.storage_offset() % 2 or any(stride % 2 for stride in others):
            # At an odd offset a pair cannot be viewed as complex, though it be contiguous.
            wide = wide.clone(memory_format=torch.contiguous_format)
        turned = torch.view_as_real(torch.view_as_complex(wide) * table)
    return cast(turned.view(batch, time, heads, channels), x.dtype)


class _Rotation(Rotary):
    """Rotates q and k by the same frequencies."""

    def __init__(
        self, head_dim: int, frequencies: Frequencies, attention_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.head_dim, self.frequencies = head_dim, frequencies
        self.attention_factor = attention_factor
        self._amplitude = (attention_factor,)

    def table(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """What queries and keys at these positions are turned by: `rotation_table`."""
        dtype = at_least_float32(dtype)
        return rotation_table(positions, self.frequencies, dtype, self._amplitude)

    def forward(
        self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate q and k (batch, time, heads, head_dim) by positions (batch, time)."""
        q = rotate(q, self.table(query_positions, q.dtype))
        k = rotate(k, self.table(key_positions, k.dtype))
        return q, k

    def both(self, qk: Tensor, heads: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q and k side by side, (batch, time, heads + key heads, head_dim), in one go."""
        qk = rotate(qk, self.table(positions, qk.dtype))
        q, k = qk.split_with_sizes((heads, qk.shape[2] - heads), 2)
        return q, k


class RotaryEmbedding(_Rotation):
    """RoPE: ``theta_i = base^(-2i / rotary_dim)``, and its scalings to longer texts.

    ======== ==================================================================================
    default  as trained
    linear   ``theta / factor``: positions divided by the factor
    ntk      ``base * factor^(D / (D - 2))`` for the base, D channels rotated: see `ntk_base`
    dynamic  as ntk at the length n so far: by ``factor n / L - (factor - 1)``, see below
    yarn     fast pairs as they are, slow ones divided, queries and keys ``0.1 ln s + 1`` longer
    llama3   as yarn, by wavelength, without the last
    ======== ==================================================================================

    All arguments but `base`, which is ``rope_theta`` there, go by Hugging Face's names. A trained
    model is scaled by `scale_rotary`, or by building it with another `rotary`: no weight changes.

    dynamic takes the base of the length that a document has reached: the token at position t is
    rotated with that of n = t + 1, and keeps it, as it does where Hugging Face's code reads a text
    token by token with a cache. So a token's rotation is a function of its position alone: not of
    how the text is cut, of what comes later, or of other texts in the batch. Where the length to
    reach is known beforehand, ntk gives one base to all of it.

    Source: Su et al., RoFormer, arXiv 2104.09864; linear: Chen et al., arXiv 2306.15595; the
    others: see `ntk_base`, `yarn_frequencies` and `llama3_frequencies`.

    Args:
        head_dim: Channels of a head.
        base: The wavelengths run from 2 pi to 2 pi * base tokens.
        rope_type: The scaling.
        factor: s >= 1, the length to reach over the trained length.
        original_max_position_embeddings: L, tokens of the texts in training; dynamic, yarn and
            llama3 need it.
        partial_rotary_factor: Fraction of the channels that is rotated: the first of each head.
        attention_factor: yarn: what rotated queries and keys are multiplied with. None: by factor.
        beta_fast: yarn: turns in L from which a pair stays as it is.
        beta_slow: yarn: turns in L up to which a pair is divided by the factor.
        truncate: yarn: whole pairs for the ends of the ramp.
        low_freq_factor: llama3: turns in L up to which a pair is divided by the factor.
        high_freq_factor: llama3: turns in L from which a pair stays as it is.

    Raises:
        ValueError: An unknown type, a factor below 1, a missing length, or no pairs to rotate.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10_000.0,
        rope_type: RopeType = "default",
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
        rotary_dim = int(head_dim * partial_rotary_factor)
        if not 0 < partial_rotary_factor <= 1 or rotary_dim < 2 or rotary_dim % 2:
            fraction = "" if partial_rotary_factor == 1 else f" * {partial_rotary_factor}"
            raise ValueError(
                f"head_dim={head_dim}{fraction} gives {rotary_dim} channels to rotate: a rotation "
                "needs pairs of channels"
            )
        if factor < 1:
            raise ValueError(
                f"factor={factor} would shorten the reach: it is the length to reach over the "
                "trained length, so take 1 or more"
            )
        length = original_max_position_embeddings
        if rope_type in ("dynamic", "yarn", "llama3") and (length is None or length < 1):
            raise ValueError(
                f"original_max_position_embeddings={length}: rope_type {rope_type} needs the "
                "length in tokens of the texts that the model was trained on"
            )
        if low_freq_factor >= high_freq_factor:
            raise ValueError(
                f"low_freq_factor={low_freq_factor} must be below high_freq_factor="
                f"{high_freq_factor}"
            )
        amplitude = 1.0
        if rope_type in ("default", "dynamic"):
            frequencies = rotary_frequencies(rotary_dim, base)
        elif rope_type == "linear":
            frequencies = tuple(f / factor for f in rotary_frequencies(rotary_dim, base))
        elif rope_type == "ntk":
            frequencies = rotary_frequencies(rotary_dim, ntk_base(base, rotary_dim, factor))
        elif rope_type == "yarn":
            assert length is not None
            frequencies = yarn_frequencies(
                rotary_dim, base, factor, length, beta_fast, beta_slow, truncate
            )
            amplitude = attention_factor or yarn_attention_factor(factor)
        elif rope_type == "llama3":
            assert length is not None
            frequencies = llama3_frequencies(
                rotary_dim, base, factor, length, low_freq_factor, high_freq_factor
            )
        else:
            known = ", ".join(get_args(RopeType))
            raise ValueError(f"rope_type={rope_type!r} is not one of {known}")
        super().__init__(head_dim, frequencies, amplitude)
        self.base, self.rotary_dim = base, rotary_dim
        if rope_type == "dynamic":
            ntk_base(base, rotary_dim, factor)  # refuses too few channels
            pairs = range(rotary_dim // 2)
            self._slower = tuple(-2.0 * i / (rotary_dim - 2) for i in pairs)
        self._parameters_given: dict[str, Any] = {
            "rope_type": rope_type,
            "factor": factor,
            "original_max_position_embeddings": length,
            "partial_rotary_factor": partial_rotary_factor,
            "attention_factor": attention_factor,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "truncate": truncate,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
        }

    def table(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        given = self._parameters_given
        if given["rope_type"] != "dynamic":
            return super().table(positions, dtype)
        dtype = at_least_float32(dtype)
        factor, length = given["factor"], given["original_max_position_embeddings"]

        def compute() -> Tensor:
            rows = for_float64(positions[:1] if positions.stride(0) == 0 else positions)
            theta = constant(self.frequencies, rows.device, torch.float64)
            time = rows.view(*rows.shape, 1, 1)
            # `dynamic_ntk_base` of each position: base^(-2i / D) gets ratio^(-2i / (D - 2)) more.
            reached = (time + 1).clamp(min=length).to(torch.float64) / length
            slower = constant(self._slower, rows.device, torch.float64)
            angles = time * theta * (factor * reached - (factor - 1)) ** slower
            lengths = constant((1.0,), rows.device, torch.float64)
            return _polar(lengths, angles, dtype).to(positions.device)

        key = ("dynamic", self.frequencies, factor, length, dtype)
        return once_per_call(positions, key, compute)

    def rope_parameters(self) -> dict[str, Any]:
        """Hugging Face's ``config.rope_parameters`` for the same rotation.

        Hugging Face has no static NTK: it comes out as a default rotation with the changed base.
        For dynamic it takes L from the configuration's max_position_embeddings.
        """
        given = self._parameters_given
        kind, base = given["rope_type"], self.base
        if kind == "ntk":
            kind, base = "default", ntk_base(base, self.rotary_dim, given["factor"])
        found = {"rope_type": kind, "rope_theta": base}
        found |= {name: given[name] for name in HUGGING_FACE_NAMES[kind]}
        if given["partial_rotary_factor"] != 1:
            found["partial_rotary_factor"] = given["partial_rotary_factor"]
        return {name: value for name, value in found.items() if value is not None}


#: What each type reads, by Hugging Face's names, besides rope_theta and partial_rotary_factor.
HUGGING_FACE_NAMES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
    ),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
}


class XPos(Rotary):
    """xPos: RoPE whose scores also fade with distance, fast pairs faster.

    q is multiplied by ``zeta_i^(t / scale_base)`` and k by its inverse, so that the score of a
    query at t with a key at s has the factor ``zeta_i^((t - s) / scale_base)`` in pair i, with
    ``zeta_i = (2i / D + gamma) / (1 + gamma)``.

    Source: Sun et al., A Length-Extrapolatable Transformer, arXiv 2212.10554, section 3.2.

    Keys grow with their position, since a cached key cannot know the queries to come: 64 times
    scale_base tokens (32,768) is as far as float32 and bfloat16 can count, float16 an eighth of
    it.

    Args:
        head_dim: Channels of a head.
        base: Of the rotation, as RoPE's.
        gamma: Bounds zeta from below.
        scale_base: Tokens in which pair i fades by zeta_i.
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
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd: a rotation needs pairs of channels")
        self.head_dim, self.scale_base = head_dim, scale_base
        self.frequencies = rotary_frequencies(head_dim, base)
        self.log_scales = tuple(
            math.log((2 * i / head_dim + gamma) / (1 + gamma)) for i in range(head_dim // 2)
        )
        self.furthest = int(64 * scale_base)

    def _table(self, positions: Tensor, dtype: torch.dtype, sign: int) -> Tensor:
        def compute() -> Tensor:
            rows = for_float64(positions[:1] if positions.stride(0) == 0 else positions)
            time = rows[..., None, None]
            angles = time * constant(self.frequencies, rows.device, torch.float64)
            fading = time * constant(self.log_scales, rows.device, torch.float64)
            lengths = (fading * (sign / self.scale_base)).exp()
            return _polar(lengths, angles, dtype).to(positions.device)

        key = ("xpos", self.frequencies, self.log_scales, self.scale_base, sign, dtype)
        return once_per_call(positions, key, compute)

    def forward(
        self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate and scale q and k (batch, time, heads, head_dim) by positions (batch, time)."""
        dtype = at_least_float32(q.dtype)
        q = rotate(q, self._table(query_positions, dtype, 1))
        k = rotate(k, self._table(key_positions, dtype, -1))
        return q, k


class RetentionRotation(_Rotation):
    """RetNet's rotation: ``theta_i = base^(-linspace(0, 1, head_dim / 2)_i)``.

    Source: Sun et al., Retentive Network, arXiv 2307.08621, eq. 4, as torchscale builds it.

    Args:
        head_dim: Channels of a head.
        base: The slowest pair turns by 1 / base a token.
    """

    def __init__(self, head_dim: int, *, base: float = 10_000.0) -> None:
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd: a rotation needs pairs of channels")
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
