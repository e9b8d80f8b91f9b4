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
from archzoo.kernels.launching import (
    check_dense,
    interpreting,
    launch,
    power_of_2,
    with_unit_stride,
)

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
# Programs, about, of a product that leaves logits for the next one's vectors: each of the next's
# programs reads what all of them left.
LEAVING = 32
_PARTS = 32  # of these at once
_MOST_RANKS = 512  # of a block's mixture, which one program holds
_MOST_ROUTED = 2**16  # channels times experts of a router, likewise
_MOST_SCALED = 64  # experts of which each scales a product's input
_BLEND_TILE = 128  # channels of a whole vector that one program blends
_MOST_ALIGNED = 128  # outputs of one block in a row, that a program may take
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


class Mixture(NamedTuple):
    """LoRAs beside a product: ``scale * B (g * A x)``, g = softmax(R x), for each block of outputs.

    Attributes:
        first: The A of all blocks, each of all its experts, and below them the R of all:
            (blocks * (experts * rank + experts), width).
        second: B of all outputs, (out, experts * rank).
        which: Of every `aligned` outputs in a row the number of their block, int32; -1: of none.
        blocks: That have a mixture.
        experts: Of each.
        rank: Of an expert.
        top_k: Experts of a token; the others' gates are 0.
        aligned: Outputs in a row that are of one block, a power of two; where they are paired, all
            of one of the two.
        scale: Of what is added.
    """

    first: Tensor
    second: Tensor
    which: Tensor
    blocks: int
    experts: int
    rank: int
    top_k: int
    aligned: int
    scale: float


class Blend(NamedTuple):
    """Vectors that scale heads, or a whole vector: ``z * sum_e g_e l_e``, g = softmax(R z).

    Attributes:
        routers: R of all that have one, (routers, experts, most channels of a z).
        vectors: l - 1 of each tile, (tiles, experts, most channels of a tile) float32.
        places: Of each tile (tiles, 5) int32: where in a row its z begins, how many channels z has,
            the number of its router, where in z the tile begins, 1 where it is turned after.
        top_k: Experts of a token; the others' gates are 0.
    """

    routers: Tensor
    vectors: Tensor
    places: Tensor
    top_k: int


class Scaling(NamedTuple):
    """Vectors that scale the input of a product.

    Attributes:
        first: R, (experts, width).
        columns: The same transposed, contiguous, for the product that makes the input.
        vectors: l - 1, (experts, width) float32.
        top_k: Experts of a token; the others' gates are 0.
        blend: The same in tiles.
    """

    first: Tensor
    columns: Tensor
    vectors: Tensor
    top_k: int
    blend: Blend


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
    check_dense(embedding=embedding, positions=positions)
    given = (tokens.contiguous(), embedding, frequencies.contiguous(), positions, x, table)
    _start(given, amplitude, dim, pairs, True)
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
    positions = positions.contiguous()
    given = (positions, table, frequencies.contiguous(), positions, table, table)
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
    mixture: Mixture | Scaling | None = None,
    left: Tensor | None = None,
) -> Tensor:
    """``y = f(norm(x)) W^T``, with what stands around it in a layer.

    Args:
        x: (batch, width), unit last stride.
        weight: W, (out, width).
        norm: Of x, and what it is gated by. None: x as it is.
        rotation: Of y's first channels. None: none.
        paired: W is two matrices of as many rows, gate and up, and y is ``silu(gate) * up``.
        residual: (batch, out): y is added to it, in place, and it is returned.
        mixture: What is added to the product, or scales f(norm(x)), which then has no norm.
        left: What the product before has left for a `Scaling`, (parts, batch, experts). None:
            a kernel of its own computes it.

    Returns:
        y, (batch, out) of W's dtype; out / 2 where paired.
    """
    return linear_and_next(
        x, weight, None, norm=norm, rotation=rotation, paired=paired, residual=residual,
        mixture=mixture, left=left,
    )[0]  # fmt: skip


def linear_and_next(
    x: Tensor,
    weight: Tensor,
    following: Mixture | Scaling | None,
    *,
    norm: Norm | None = None,
    rotation: Rotation | None = None,
    paired: bool = False,
    residual: Tensor | None = None,
    mixture: Mixture | Scaling | None = None,
    left: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`linear`, and the next product's logits in parts, if vectors scale what it reads.

    Logits are a small product of all of x, which is there only once the kernel that makes it has
    ended: a launch of its own. With one or two rows every program of that kernel multiplies what it
    has made instead, and the next one's programs sum. A mixture of LoRAs has so many columns that
    the launch takes less.

    Args:
        x: As `linear`'s, and so are all others but the next.
        weight: The same.
        following: The next product's mixture, or None.
        norm: The same.
        rotation: The same.
        paired: The same.
        residual: The same.
        mixture: The same.
        left: The same.
    """
    check_dense(weight=weight)
    x = with_unit_stride(x)
    if norm is not None and norm.gate is not None:
        norm = norm._replace(gate=with_unit_stride(norm.gate))
    batch, width = x.shape
    if residual is not None and (
        residual.stride(-1) != 1 or (batch > 1 and not residual.stride(0))
    ):
        raise ValueError(
            f"residual of strides {residual.stride()}, to be written in place, needs rows of their "
            "own and a unit last stride"
        )
    out = weight.shape[0] // 2 if paired else weight.shape[0]
    y = weight.new_empty((batch, out)) if residual is None else residual
    options: dict[str, int] = {"PAIRED": paired, "ADD": residual is not None, "OUT": out}
    table, scaled_from, scale = y, 0, 1.0  # a table that is not read
    options |= {"ROTATED": 0, "HEAD": 1, "PAIRS": 1}
    if rotation is not None:
        table = rotation.table.contiguous()
        scaled_from, scale = rotation.query_width, rotation.scale
        options["ROTATED"] = rotation.query_width + rotation.key_width
        options |= {"HEAD": rotation.head_dim, "PAIRS": table.shape[1]}
    many = batch > _VECTOR_ROWS
    if many and norm is not None and norm.gate is not None:
        x, norm = _gated(x, norm, weight.dtype), None
    if many and isinstance(mixture, Scaling):
        x, mixture = blend(x, mixture.blend, x.new_empty(x.shape)), None
    if mixture is not None and (many or left is None):
        left = linear(x, mixture.first, norm=norm)[None]
    aligned = _MOST_ALIGNED
    if isinstance(mixture, Mixture) and not paired:
        aligned = mixture.aligned
    if many:
        scales, eps = weight, 0.0
        if norm is not None:
            assert norm.groups == 1 and norm.weight is not None
            scales, eps = norm.weight.contiguous(), norm.eps
        gated, second, which, mixture_scale = x, weight, weight, 1.0
        ranks = {"RANKS": 0, "BLOCKS": 0, "ALIGNED": 1, "BLOCK_RANKS": 16}
        if isinstance(mixture, Mixture):
            assert left is not None
            gated = _gate_experts(left[0], mixture)
            second, which, mixture_scale = mixture.second, mixture.which, mixture.scale
            rank = mixture.experts * mixture.rank
            block = min(max(power_of_2(rank), 16), 64)
            ranks = {"RANKS": rank, "BLOCKS": mixture.blocks, "ALIGNED": mixture.aligned}
            ranks["BLOCK_RANKS"] = block
        grid, tiles = _plan_matrix(batch, out, width, weight.dtype.itemsize, 1 + paired, aligned)
        _launch(
            "matrix_kernel", grid, batch, (x, scales, weight, table, y, gated, second, which),
            batch, x.stride(0), y.stride(0), eps, scaled_from, scale, mixture_scale,
            WIDTH=width, NORM=norm is not None, UPCAST=interpreting(), **options, **ranks, **tiles,
        )  # fmt: skip
        return y, None
    groups, gate, scales, eps = 1, x, weight, 0.0
    if norm is not None:
        groups, eps = norm.groups, norm.eps
        gate = x if norm.gate is None else norm.gate
        scales = weight if norm.weight is None else norm.weight.contiguous()
    # A program reads all vectors that scale x, too.
    few = isinstance(following, Scaling) or isinstance(mixture, Scaling)
    grid, tiles = _plan_vector(
        batch, out, width, groups, weight.dtype.itemsize, 1 + paired, LEAVING if few else PROGRAMS
    )
    of_mixture, second, which, mixture_scale = _of_mixture(mixture, left, weight)
    columns, parts = weight, None
    leaving = {"LEFT": 0, "BLOCK_LEFT": 1}
    if isinstance(following, Scaling):
        columns, experts = following.columns, len(following.first)
        parts = weight.new_empty((grid[0], batch, experts), dtype=torch.float32)
        leaving = {"LEFT": experts, "BLOCK_LEFT": power_of_2(experts)}
    _launch(
        "vector_kernel", grid, batch,
        (
            x, gate, scales, weight, table, y,
            weight if left is None else left, second, which,
            columns, y if parts is None else parts,
        ),
        batch, x.stride(0), gate.stride(0), y.stride(0), eps, scaled_from, scale, mixture_scale,
        NORM=norm is not None, WEIGHTED=scales is not weight, GATED=gate is not x,
        **options, **of_mixture, **leaving, **tiles,
    )  # fmt: skip
    return y, parts


def _of_mixture(
    mixture: Mixture | Scaling | None, left: Tensor | None, absent: Tensor
) -> tuple[dict[str, Any], Tensor, Tensor, float]:
    """Of a mixture `vector_kernel`'s constants, `second` or vectors, `which`, and scale.

    Args:
        mixture: Or None.
        left: For it.
        absent: Stands for what is not read.
    """
    names = "EXPERTS", "RANK", "TOP_K", "BLOCKS", "ALIGNED", "BLOCK_EXPERTS", "BLOCK_RANK"
    parts = 1
    if mixture is None:
        sizes, second, which, scale = (0, 0, 0, 0, 1, 1, 1), absent, absent, 1.0
    else:
        assert left is not None
        parts = len(left)
        if isinstance(mixture, Mixture):
            second, which, scale = mixture.second, mixture.which, mixture.scale
            sizes = (
                mixture.experts, mixture.rank, mixture.top_k, mixture.blocks, mixture.aligned,
                power_of_2(mixture.experts), power_of_2(mixture.rank),
            )  # fmt: skip
        else:
            second, which, scale = mixture.vectors, absent, 1.0
            experts = len(mixture.first)
            sizes = experts, 0, mixture.top_k, 0, 1, power_of_2(experts), 1
    constants: dict[str, Any] = dict(zip(names, sizes, strict=True))
    constants |= {"PARTS": parts, "BLOCK_PARTS": min(power_of_2(parts), _PARTS)}
    return constants, second, which, scale


def _gate_experts(hidden: Tensor, mixture: Mixture) -> Tensor:
    """``g * (A x)`` of all blocks, (batch, blocks * experts * rank), of `first` x."""
    batch, blocks = len(hidden), mixture.blocks
    gated = hidden.new_empty((batch, blocks * mixture.experts * mixture.rank))
    _launch(
        "gate_experts_kernel", (blocks, batch), batch, (hidden, gated),
        BLOCKS=blocks, EXPERTS=mixture.experts, RANK=mixture.rank, TOP_K=mixture.top_k,
        BLOCK_EXPERTS=power_of_2(mixture.experts), BLOCK_RANK=power_of_2(mixture.rank), num_warps=4,
    )  # fmt: skip
    return gated


def blend(z: Tensor, how: Blend, y: Tensor, rotation: Rotation | None = None) -> Tensor:
    """``z * sum_e g_e l_e`` of heads or whole vectors of each row.

    Args:
        z: (batch, width), unit last stride.
        how: By what.
        y: To be written, of z's shape; z itself where every tile is all of its z.
        rotation: Of the heads that are turned after; their scale is its own.

    Returns:
        y.
    """
    batch = len(z)
    check_dense(y=y)
    z = with_unit_stride(z)
    table, pairs, scale = z, 0, 1.0
    if rotation is not None:
        table, scale = rotation.table.contiguous(), rotation.scale
        pairs = table.shape[1]
    tiles, experts, tile = how.vectors.shape
    size = how.routers.shape[2]
    block, block_experts = power_of_2(size), power_of_2(experts)
    _launch(
        "blend_kernel", (tiles, batch), batch,
        (z, how.routers, how.vectors, how.places, table, y), z.stride(0), y.stride(0), scale,
        EXPERTS=experts, TOP_K=how.top_k, BLOCK_EXPERTS=block_experts,
        SIZE=size, BLOCK=block, TILE=tile, BLOCK_TILE=max(power_of_2(tile), 2), PAIRS=pairs,
        num_warps=min(max(block * block_experts // 2048, 4), 16),
    )  # fmt: skip
    return y


def make_scaling(router: Tensor, vectors: Tensor, top_k: int | None) -> Scaling | None:
    """Vectors that scale a product's input; None: they are too many.

    Args:
        router: R, (experts, width).
        vectors: l - 1, (experts, width) float32.
        top_k: Experts of a token. None: all.
    """
    experts, width = vectors.shape
    if not _holds_router(experts, width) or experts > _MOST_SCALED:
        return None
    starts = range(0, width, _BLEND_TILE)
    padded = torch.nn.functional.pad(vectors, (0, len(starts) * _BLEND_TILE - width))
    tiles = padded.view(experts, len(starts), _BLEND_TILE).transpose(0, 1).contiguous()
    places = [(0, width, 0, start, 0) for start in starts]
    top_k = top_k or experts
    how = Blend(router[None].contiguous(), tiles, _integers(places, router.device), top_k)
    columns = router.t().contiguous()
    return Scaling(router.contiguous(), columns, vectors.contiguous(), top_k, how)


def make_blend(blocks: list[tuple[int, Tensor, Tensor, bool]], top_k: int | None) -> Blend | None:
    """Vectors that scale the heads of some blocks of a product's outputs; None: too many.

    Args:
        blocks: Of each where it begins, R (experts, size), l - 1 (heads, experts, size) float32,
            and whether it is turned after.
        top_k: Experts of a token. None: all.
    """
    size = max(router.shape[1] for _, router, _, _ in blocks)
    if not _holds_router(len(blocks[0][1]), size):
        return None
    routers, vectors, places = [], [], []
    for number, (begin, router, of_heads, turned) in enumerate(blocks):
        heads, experts, own = of_heads.shape
        routers.append(torch.nn.functional.pad(router, (0, size - own)))
        vectors.append(torch.nn.functional.pad(of_heads, (0, size - own)))
        places += [(begin + head * own, own, number, 0, int(turned)) for head in range(heads)]
    device = blocks[0][1].device
    stacked = torch.stack(routers), torch.cat(vectors)
    return Blend(*stacked, _integers(places, device), top_k or experts)


def _holds_router(experts: int, size: int) -> bool:
    return power_of_2(experts) * power_of_2(size) <= _MOST_ROUTED


def _integers(rows: Any, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def make_mixture(
    first: Tensor,
    seconds: list[tuple[int, Tensor]],
    out: int,
    experts: int,
    top_k: int | None,
    scale: float,
    paired: bool = False,
) -> Mixture | None:
    """LoRAs beside a product of `out` outputs; None: the kernels do not take them.

    They take blocks that begin and end at multiples of 16 outputs, and so many ranks.

    Args:
        first: As `Mixture`'s.
        seconds: Of each block its first output, and B (outputs, experts * rank).
        out: Outputs of all, those without a mixture too.
        experts: Of each.
        top_k: Experts of a token. None: all.
        scale: Of what is added.
        paired: The outputs are gate and up, and each of them is one block or has no mixture.
    """
    ranks = seconds[0][1].shape[1]
    if power_of_2(experts) * power_of_2(ranks // experts) > _MOST_RANKS:
        return None
    ends = [begin + len(second) for begin, second in seconds]
    if paired:
        aligned = out // 2
        if any(begin % aligned or len(second) != aligned for begin, second in seconds):
            return None
    else:
        aligned = _MOST_ALIGNED
        for border in [begin for begin, _ in seconds] + [end for end in ends if end != out]:
            aligned = min(aligned, border & -border or aligned)
        if aligned < _TILES[-1][1]:
            return None
    which = [-1] * -(-out // aligned)
    whole = first.new_zeros((out, ranks))
    for number, ((begin, second), end) in enumerate(zip(seconds, ends, strict=True)):
        whole[begin:end] = second
        for place in range(begin // aligned, -(-end // aligned)):
            which[place] = number
    return Mixture(
        first.contiguous(), whole, _integers(which, first.device), len(seconds), experts,
        ranks // experts, top_k or experts, aligned, scale,
    )  # fmt: skip


def _plan_vector(
    batch: int,
    out: int,
    width: int,
    groups: int,
    itemsize: int,
    tiles: int,
    programs: int,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The programs of `vector_kernel`, and its blocks."""
    group = width // groups
    block_group, block_groups = power_of_2(group), power_of_2(groups)
    row = block_group * block_groups * itemsize * tiles  # bytes that one output takes
    block = 16  # at the most, which divides what a mixture has aligned
    while block > 2 and (block * row > _TILE_BYTES or -(-out // block) * batch < programs):
        block //= 2
    warps = 4 if block * row <= _TILE_BYTES else 8
    sizes: dict[str, Any] = {"GROUP": group, "GROUPS": groups, "BLOCK_GROUP": block_group}
    sizes |= {"BLOCK_GROUPS": block_groups, "BLOCK_OUT": block, "num_warps": warps}
    return (-(-out // block), batch), sizes | {"EVICTION": EVICTION}


def _plan_matrix(
    batch: int, out: int, width: int, itemsize: int, tiles: int, aligned: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """The programs of `matrix_kernel`, and its blocks: outputs that are no more than `aligned`."""
    fitting = [
        (rows, block)
        for rows, block in _TILES
        if rows < 2 * batch and block * tiles <= _TILES[0][1] and block <= aligned
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
    check_dense(memory=memory)
    q, k, v = map(with_unit_stride, (q, k, v))
    if len(memory) > 1 and not q.stride(0) == k.stride(0) == v.stride(0):
        raise ValueError(
            f"q, k and v have rows of strides {q.stride(0)}, {k.stride(0)} and {v.stride(0)}: give "
            "parts of one larger row, which share theirs"
        )
    batch, heads, dk, dv = memory.shape
    o = memory.new_empty((batch, heads * dv))
    block = power_of_2(dk)
    tile = min(16 if batch == 1 else 32, power_of_2(dv))
    while block * tile > 2**14:
        tile //= 2
    _launch(
        "retention_kernel", (-(-dv // tile) * batch * heads,), batch,
        (q, k, v, log_decay.contiguous(), positions.contiguous(), memory, o), q.stride(0), heads,
        DK=dk, DV=dv, BLOCK_K=block, TILE=tile, num_warps=4,
    )  # fmt: skip
    return o
