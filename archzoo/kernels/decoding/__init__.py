"""The kernels of a decoding step: one token a row, few kernels a layer, weights read once.

At batch 1 a step reads every weight once, and that is nearly all it does: a layer's matrices take
a few microseconds, as much as it takes to launch the dozen operations that a layer is made of. So
what stands around a product goes into its kernel: the norm before it, which every program computes
anew, and the rotation, the activation or the residual after it.

`linear` and `retain` write their results rounded as the layers' own operations do, and sum in
float32. The plain form is the layers' own `step`; who puts the kernels together is
`archzoo.generation.fused`. There is no backward pass. Importing this module needs neither Triton
nor a GPU.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archzoo.kernels import launching
from archzoo.kernels.launching import interpreting, launch, power_of_2

_MODULE = "archzoo.kernels.decoding.triton"
_VECTOR_ROWS = 2  # up to which a row is a program's, and the weight is read once for each
_TILE_BYTES = 2**15  # of a weight, which 128 threads hold in registers
# Up to which a kernel begins while the one before still runs. At batch 64 weights that come early
# are in the state's way: retnet_base took 1,562 us a step on an H100, and 1,416 without.
EARLY_ROWS = 16
_SHARED_BYTES = 200_000  # of a multiprocessor, about
PROGRAMS = 128  # at least, where the sizes allow it: one for each multiprocessor, about
EVICTION = (
    "evict_first"  # of weights, so that the state of a step stays in the cache until the next
)
# (rows, outputs) of a program's product, the most at once first.
_TILES = ((64, 128), (64, 64), (64, 32), (32, 32), (32, 16), (16, 16))


class Norm(NamedTuple):
    """The RMS norm before a product.

    Attributes:
        weight: (width,), or None for all ones.
        eps: Added to the mean square.
        groups: Groups of channels, such as heads, that are normalised each by itself.
        gate: (batch, width), whose SiLU multiplies the result, or None.
    """

    weight: Tensor | None
    eps: float
    groups: int = 1
    gate: Tensor | None = None


class Rotation(NamedTuple):
    """The rotation after a product, of q's and k's heads, which come first.

    Attributes:
        table: Cosine and sine, (batch, pairs, 2) float32.
        head_dim: Channels of a head, of which the first 2 * pairs are rotated.
        query_width: Channels of q.
        key_width: Of k, which follows.
        scale: Multiplies k.
    """

    table: Tensor
    head_dim: int
    query_width: int
    key_width: int
    scale: float = 1.0


def available(weight: Tensor) -> bool:
    """Whether `linear` takes this weight, (out, width)."""
    return launching.fused(weight, weight.shape[-1]) and weight.is_contiguous()


@functools.lru_cache(maxsize=8)
def _begins_early(device: torch.device) -> bool:
    """Whether kernels may begin while the one before still runs: from Hopper on."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return bool(importlib.import_module(_MODULE).CAN_BEGIN_EARLY)


def begins_early(batch: int, device: torch.device) -> bool:
    """Whether the kernels of a step begin while the one before still runs.

    Args:
        batch: Rows.
        device: Where.
    """
    return batch <= EARLY_ROWS and _begins_early(device)


def _launch(
    kernel: str,
    grid: tuple[int, ...],
    batch: int,
    tensors: tuple[Tensor, ...],
    *numbers: float,
    **options: int,
) -> None:
    early = begins_early(batch, tensors[0].device)
    if early:
        options["launch_pdl"] = True
    launch(_MODULE, kernel, grid, tensors, *numbers, EARLY=early, **options)


def start(
    tokens: Tensor, embedding: Tensor, positions: Tensor, frequencies: Tensor, amplitude: float
) -> tuple[Tensor, Tensor]:
    """Count the positions on, in place; look up the tokens; and what q and k are turned by.

    Args:
        tokens: (batch,) or (batch, 1) int.
        embedding: (vocabulary, dim).
        positions: Of the tokens before, (batch,) int64; they become those of these tokens.
        frequencies: theta, (pairs,) float64; none, where nothing is rotated.
        amplitude: What rotated channels are multiplied with besides.

    Returns:
        x (batch, dim), and the table (batch, pairs, 2) float32 of `Rotation`.
    """
    batch, (_, dim), pairs = len(positions), embedding.shape, len(frequencies)
    x = embedding.new_empty((batch, dim))
    table = positions.new_empty((batch, pairs, 2), dtype=torch.float32)
    _start((tokens, embedding, frequencies, positions, x, table), amplitude, dim, pairs, True)
    return x, table


def rotation_table(positions: Tensor, frequencies: Tensor, amplitude: float) -> Tensor:
    """The table of another rotation, as `start` gives it.

    Args:
        positions: Of the tokens, (batch,) int64.
        frequencies: theta, (pairs,) float64.
        amplitude: What rotated channels are multiplied with besides.
    """
    pairs = len(frequencies)
    table = positions.new_empty((len(positions), pairs, 2), dtype=torch.float32)
    # The kernel reads neither tokens nor vectors.
    given = (positions, table, frequencies, positions, table, table)
    _start(given, amplitude, 1, pairs, False)
    return table


def _start(tensors: tuple[Tensor, ...], amplitude: float, dim: int, pairs: int, all: bool) -> None:
    blocks = {"BLOCK_DIM": power_of_2(dim), "BLOCK_PAIRS": power_of_2(max(pairs, 1))}
    how = {"DIM": dim, "PAIRS": pairs, **blocks, "EMBED": all, "num_warps": 4}
    batch = len(tensors[3])
    _launch("start_kernel", (batch,), batch, tensors, amplitude, **how)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Norm | None = None,
    rotation: Rotation | None = None,
    paired: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``y = f(norm(x)) W^T``, with what stands around it in a layer.

    Args:
        x: (batch, width), unit last stride.
        weight: W, (out, width).
        norm: Of x, and what it is gated by. None: x as it is.
        rotation: Of y's first channels. None: none.
        paired: W is two matrices of as many rows, gate and up, and y is ``silu(gate) * up``.
        residual: (batch, out): y is added to it, in place, and it is returned.

    Returns:
        y, (batch, out) of W's dtype; out / 2 where paired.
    """
    batch, width = x.shape
    out = weight.shape[0] // 2 if paired else weight.shape[0]
    y = weight.new_empty((batch, out)) if residual is None else residual
    options: dict[str, int] = {"PAIRED": paired, "ADD": residual is not None, "OUT": out}
    table, scaled_from, scale = y, 0, 1.0  # a table that is not read
    options |= {"ROTATED": 0, "HEAD": 1, "PAIRS": 1}
    if rotation is not None:
        table, scaled_from, scale = rotation.table, rotation.query_width, rotation.scale
        options["ROTATED"] = rotation.query_width + rotation.key_width
        options |= {"HEAD": rotation.head_dim, "PAIRS": table.shape[1]}
    if batch > _VECTOR_ROWS:
        if norm is not None and norm.gate is not None:
            x, norm = _gated(x, norm, weight.dtype), None
        scales, eps = weight, 0.0
        if norm is not None:
            assert norm.groups == 1 and norm.weight is not None
            scales, eps = norm.weight, norm.eps
        grid, tiles = _plan_matrix(batch, out, width, weight.dtype.itemsize, 1 + paired)
        _launch(
            "matrix_kernel", grid, batch, (x, scales, weight, table, y),
            batch, x.stride(0), y.stride(0), eps, scaled_from, scale,
            WIDTH=width, NORM=norm is not None, UPCAST=interpreting(), **options, **tiles,
        )  # fmt: skip
        return y
    groups, gate, scales, eps = 1, x, weight, 0.0
    if norm is not None:
        groups, eps = norm.groups, norm.eps
        gate = x if norm.gate is None else norm.gate
        scales = weight if norm.weight is None else norm.weight
    grid, tiles = _plan_vector(batch, out, width, groups, weight.dtype.itemsize, 1 + paired)
    _launch(
        "vector_kernel", grid, batch, (x, gate, scales, weight, table, y),
        batch, x.stride(0), gate.stride(0), y.stride(0), eps, scaled_from, scale,
        NORM=norm is not None, WEIGHTED=scales is not weight, GATED=gate is not x,
        **options, **tiles,
    )  # fmt: skip
    return y


def _plan_vector(
    batch: int, out: int, width: int, groups: int, itemsize: int, tiles: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The programs of `vector_kernel`, and its blocks."""
    group = width // groups
    block_group, block_groups = power_of_2(group), power_of_2(groups)
    row = block_group * block_groups * itemsize * tiles  # bytes that one output takes
    block = 16
    while block > 2 and (block * row > _TILE_BYTES or -(-out // block) * batch < PROGRAMS):
        block //= 2
    warps = 4 if block * row <= _TILE_BYTES else 8
    sizes: dict[str, Any] = {"GROUP": group, "GROUPS": groups, "BLOCK_GROUP": block_group}
    sizes |= {"BLOCK_GROUPS": block_groups, "BLOCK_OUT": block, "num_warps": warps}
    return (-(-out // block), batch), sizes | {"EVICTION": EVICTION}


def _plan_matrix(
    batch: int, out: int, width: int, itemsize: int, tiles: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """The programs of `matrix_kernel`, and its blocks."""
    fitting = [
        (rows, block)
        for rows, block in _TILES
        if rows < 2 * batch and block * tiles <= _TILES[0][1]
    ] or [_TILES[-1]]
    for rows, block in fitting:
        grid = -(-out // block), -(-batch // rows)
        if grid[0] * grid[1] >= PROGRAMS:
            break
    # As many bytes under way as fit, where all programs shall run at once.
    few = rows + block * tiles <= 32
    depth = min((512 if few else 256) // itemsize, max(power_of_2(width), 16))
    stage = (rows + block * tiles) * depth * itemsize
    together = min(-(-grid[0] * grid[1] // PROGRAMS), 3)
    stages = min(max(1 + _SHARED_BYTES // (stage * together), 3), 5)
    sizes = {"BLOCK_ROWS": rows, "BLOCK_OUT": block, "BLOCK": depth, "num_stages": stages}
    return grid, {**sizes, "num_warps": 8 if rows * block * tiles > 4096 else 4}


def _gated(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """``silu(gate) * norm(x)``, where a product's programs would compute it too often."""
    batch, width = x.shape
    assert norm.gate is not None and norm.weight is None
    y = x.new_empty((batch, width), dtype=dtype)
    group = width // norm.groups
    block = power_of_2(group)
    rows = max(2048 // block, 1)
    launch(
        "archzoo.kernels.retention_layer.triton", "gate_kernel",
        (-(-batch // rows), norm.groups), (x, norm.gate, y),
        batch, x.stride(0), group, norm.gate.stride(0), norm.groups, norm.eps,
        WIDTH=group, BLOCK=block, ROWS=rows, num_warps=4,
    )  # fmt: skip
    return y


def retain(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, positions: Tensor, memory: Tensor
) -> Tensor:
    """One token of retention: S <- gamma S + k^T v in place, and o = q S / sqrt(s_n).

    Args:
        q: Rotated, (batch, heads * key_dim), a part of a larger row, as are the next two.
        k: Rotated and scaled, likewise.
        v: (batch, heads * value_dim).
        log_decay: log gamma of each head, (heads,).
        positions: n of each token in its document, (batch,) int64.
        memory: S, (batch, heads, key_dim, value_dim) float32, contiguous.

    Returns:
        o, (batch, heads * value_dim) float32.
    """
    batch, heads, dk, dv = memory.shape
    o = memory.new_empty((batch, heads * dv))
    block = power_of_2(dk)
    tile = min(16 if batch == 1 else 32, power_of_2(dv))
    while block * tile > 2**14:
        tile //= 2
    _launch(
        "retention_kernel", (-(-dv // tile), batch * heads), batch,
        (q, k, v, log_decay, positions, memory, o), q.stride(0), heads,
        DK=dk, DV=dv, BLOCK_K=block, TILE=tile, num_warps=4,
    )  # fmt: skip
    return o
