"""The Triton side of `archzoo.kernels.low_rank`: imported only once a kernel is to run.

The kernels take up to four changes, of which those that are not there have no tiles.
"""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    weight, y, a0, a1, a2, a3, b0, b1, b2, b3, columns,
    begin0, begin1, begin2, begin3, size0, size1, size2, size3,
    rank0, rank1, rank2, rank3, scale0, scale1, scale2, scale3, tiles0, tiles1, tiles2, tiles3,
    RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows of one change and some columns: ``y = W + s B A``, in float32."""
    tile = tl.program_id(0)
    if tile < tiles0:
        a, b, begin, size, rank, scale = a0, b0, begin0, size0, rank0, scale0
    elif tile < tiles0 + tiles1:
        a, b, begin, size, rank, scale = a1, b1, begin1, size1, rank1, scale1
        tile -= tiles0
    elif tile < tiles0 + tiles1 + tiles2:
        a, b, begin, size, rank, scale = a2, b2, begin2, size2, rank2, scale2
        tile -= tiles0 + tiles1
    else:
        a, b, begin, size, rank, scale = a3, b3, begin3, size3, rank3, scale3
        tile -= tiles0 + tiles1 + tiles2
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.arange(0, RANK)
    in_row, in_column, in_rank = row < size, column < columns, index < rank
    left = tl.load(
        b + row[:, None] * rank + index[None, :],
        mask=in_row[:, None] & in_rank[None, :], other=0.0,
    )  # fmt: skip
    right = tl.load(
        a + index[:, None] * columns + column[None, :],
        mask=in_rank[:, None] & in_column[None, :], other=0.0,
    )  # fmt: skip
    change = tl.dot(left, right, input_precision="ieee")
    at = (begin + row).to(tl.int64)[:, None] * columns + column[None, :]
    inside = in_row[:, None] & in_column[None, :]
    value = tl.load(weight + at, mask=inside, other=0.0) + scale * change
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(
    grad, a0, a1, a2, a3, da0, da1, da2, da3, b0, b1, b2, b3, db0, db1, db2, db3, columns,
    begin0, begin1, begin2, begin3, size0, size1, size2, size3,
    rank0, rank1, rank2, rank3, scale0, scale1, scale2, scale3, tiles0, tiles1, tiles2, tiles3,
    across, count,
    RANK: tl.constexpr, ROWS: tl.constexpr, LONG_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, LONG_COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Some columns of ``dA = s B^T G``, or some rows of ``dB = s G A^T``, G of the change's rows.

    The first have the longer way, and begin first.
    """
    program = tl.program_id(0)
    of_first = program < count * across
    tile = program - count * across
    which = program // across
    if not of_first:
        if tile < tiles0:
            which = 0
        elif tile < tiles0 + tiles1:
            which = 1
            tile -= tiles0
        elif tile < tiles0 + tiles1 + tiles2:
            which = 2
            tile -= tiles0 + tiles1
        else:
            which = 3
            tile -= tiles0 + tiles1 + tiles2
    if which == 0:
        a, b, da, db, begin, size, rank, scale = a0, b0, da0, db0, begin0, size0, rank0, scale0
    elif which == 1:
        a, b, da, db, begin, size, rank, scale = a1, b1, da1, db1, begin1, size1, rank1, scale1
    elif which == 2:
        a, b, da, db, begin, size, rank, scale = a2, b2, da2, db2, begin2, size2, rank2, scale2
    else:
        a, b, da, db, begin, size, rank, scale = a3, b3, da3, db3, begin3, size3, rank3, scale3
    g = grad + begin.to(tl.int64) * columns
    # Triton's interpreter multiplies bf16 wrongly.
    kind = tl.float32 if UPCAST else grad.dtype.element_ty
    if of_first:  # of columns, along rows
        _gradient(
            g, 1, columns, b, rank, 1, da, 1, columns,
            program % across, columns, size, rank, scale, RANK, COLUMNS, LONG_ROWS, kind,
        )  # fmt: skip
    else:
        _gradient(
            g, columns, 1, a, 1, columns, db, rank, 1,
            tile, size, columns, rank, scale, RANK, ROWS, LONG_COLUMNS, kind,
        )  # fmt: skip


@triton.jit
def _gradient(
    g, g_own, g_long, factor, factor_long, factor_rank, out, out_own, out_rank,
    tile, owns, longs, rank, scale,
    RANK: tl.constexpr, OWN: tl.constexpr, LONG: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """Some of ``s G F``: of G's own side, summed along its long one; each with its stride."""
    index = tl.arange(0, RANK)
    own = (tile * OWN + tl.arange(0, OWN)).to(tl.int64)
    in_rank, in_own = index < rank, own < owns
    total = tl.zeros((OWN, RANK), tl.float32)
    for begin in range(0, longs, LONG):
        long = (begin + tl.arange(0, LONG)).to(tl.int64)
        in_long = long < longs
        left = tl.load(
            g + own[:, None] * g_own + long[None, :] * g_long,
            mask=in_own[:, None] & in_long[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            factor + long[:, None] * factor_long + index[None, :] * factor_rank,
            mask=in_long[:, None] & in_rank[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(left.to(kind), right.to(kind), total, input_precision="ieee")
    place = out + own[:, None] * out_own + index[None, :] * out_rank
    tl.store(place, total * scale, mask=in_own[:, None] & in_rank[None, :])


@triton.jit
def factors_kernel(
    once, twice, of_once, of_twice, a0, a1, a2, a3, b0, b1, b2, b3,
    tokens, columns, once_stride, twice_stride,
    begin0, begin1, begin2, begin3, size0, size1, size2, size3, tiles0, tiles1, tiles2, tiles3,
    COUNT: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, TURNED: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What some tokens add to ``dB = G^T (x A^T)`` and ``dA^T = x^T (G B)``, in float32.

    G is read once and x twice, of which the second time is out of the cache; TURNED: x once and G
    twice, with A and B as b and a, for one change of a matrix that is wider than high. All changes
    have the same rank and lie beside each other in the `WIDTH` columns of a product. Sizes, places
    and strides count `UNIT` numbers: Triton reads 16 bytes at once where it sees that they fit.
    """
    kind = tl.float32 if UPCAST else once.dtype.element_ty
    columns, once_stride, twice_stride = columns * UNIT, once_stride * UNIT, twice_stride * UNIT
    begin0, begin1, begin2, begin3 = begin0 * UNIT, begin1 * UNIT, begin2 * UNIT, begin3 * UNIT
    size0, size1, size2, size3 = size0 * UNIT, size1 * UNIT, size2 * UNIT, size3 * UNIT
    program = tl.program_id(0)
    token = (program * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    in_token = (token < tokens)[:, None]
    index = tl.arange(0, WIDTH)
    there = (index < COUNT * RANK)[None, :]
    which = index // RANK
    inner = index % RANK
    a = tl.where(which == 0, a0, tl.where(which == 1, a1, tl.where(which == 2, a2, a3)))
    block = tl.arange(0, BLOCK)

    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    for begin in range(0, columns, BLOCK):
        column = begin + block
        inside = column < columns
        left = tl.load(
            twice + token[:, None] * twice_stride + column[None, :],
            mask=in_token & inside[None, :], other=0.0,
        )  # fmt: skip
        if TURNED:
            place = column[:, None] * RANK + inner[None, :]
        else:
            place = column[:, None] + inner[None, :] * columns
        right = tl.load(a[None, :] + place, mask=inside[:, None] & there, other=0.0)
        total = tl.dot(left.to(kind), right.to(kind), total, input_precision="ieee")
    hidden = total.to(kind)

    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    sizes = size0 + size1 + size2 + size3
    for tile in range(tiles0 + tiles1 + tiles2 + tiles3):
        # Chosen by arithmetic: what is loaded behind a branch is not begun ahead of its turn.
        past0, past1 = tile >= tiles0, tile >= tiles0 + tiles1
        past2 = tile >= tiles0 + tiles1 + tiles2
        b = tl.where(past2, b3, tl.where(past1, b2, tl.where(past0, b1, b0)))
        begin = tl.where(past2, begin3, tl.where(past1, begin2, tl.where(past0, begin1, begin0)))
        size = tl.where(past2, size3, tl.where(past1, size2, tl.where(past0, size1, size0)))
        tiles = tl.where(past0, tiles0, 0) + tl.where(past1, tiles1, 0) + tl.where(past2, tiles2, 0)
        above = tl.where(past0, size0, 0) + tl.where(past1, size1, 0) + tl.where(past2, size2, 0)
        change = past0.to(tl.int32) + past1.to(tl.int32) + past2.to(tl.int32)
        row = (tile - tiles) * BLOCK + block
        own = index - change * RANK
        inside = row < size
        mine = inside[:, None] & ((own >= 0) & (own < RANK))[None, :]
        left = tl.load(
            once + token[:, None] * once_stride + (begin + row)[None, :],
            mask=in_token & inside[None, :], other=0.0,
        ).to(kind)  # fmt: skip
        if TURNED:
            place = row[:, None] + own[None, :] * size
        else:
            place = row[:, None] * RANK + own[None, :]
        right = tl.load(b + place, mask=mine, other=0.0)
        total = tl.dot(left, right.to(kind), total, input_precision="ieee")
        part = tl.dot(tl.trans(left), hidden, input_precision="ieee")
        place = program.to(tl.int64) * sizes + above + row
        tl.store(of_once + place[:, None] * RANK + own[None, :], part, mask=mine)
    hidden = total.to(kind)

    for begin in range(0, columns, BLOCK):
        column = begin + block
        inside = column < columns
        left = tl.load(
            twice + token[:, None] * twice_stride + column[None, :],
            mask=in_token & inside[None, :], other=0.0,
        ).to(kind)  # fmt: skip
        part = tl.dot(tl.trans(left), hidden, input_precision="ieee")
        place = program.to(tl.int64) * columns + column
        tl.store(
            of_twice + place[:, None] * (COUNT * RANK) + index[None, :], part,
            mask=inside[:, None] & there,
        )  # fmt: skip


@triton.jit
def sum_kernel(
    of_b, of_a, da0, da1, da2, da3, db0, db1, db2, db3, parts, columns, across,
    size0, size1, size2, size3, scale0, scale1, scale2, scale3,
    COUNT: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums over programs of what `factors_kernel` wrote, times scales, in a fixed order."""
    program = tl.program_id(0)
    block, part = tl.arange(0, BLOCK), tl.arange(0, PARTS)
    of_first = program < across
    at = tl.where(of_first, program, program - across) * BLOCK + block
    sizes = size0 + size1 + size2 + size3
    entries = tl.where(of_first, columns * COUNT, sizes) * RANK
    given = tl.where(of_first, of_a, of_b)
    inside = at < entries
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, parts, PARTS):
        now = (begin + part).to(tl.int64)
        total += tl.sum(
            tl.load(
                given + now[:, None] * entries + at[None, :],
                mask=(now < parts)[:, None] & inside[None, :], other=0.0,
            ), axis=0,
        )  # fmt: skip
    if of_first:
        index = at % (COUNT * RANK)
        which = index // RANK
        out = tl.where(which == 0, da0, tl.where(which == 1, da1, tl.where(which == 2, da2, da3)))
        place = out + (index % RANK) * columns + at // (COUNT * RANK)
    else:
        row = at // RANK
        past0, past1 = row >= size0, row >= size0 + size1
        past2 = row >= size0 + size1 + size2
        which = past0.to(tl.int32) + past1.to(tl.int32) + past2.to(tl.int32)
        above = tl.where(past0, size0, 0) + tl.where(past1, size1, 0) + tl.where(past2, size2, 0)
        out = tl.where(past2, db3, tl.where(past1, db2, tl.where(past0, db1, db0)))
        place = out + at - above * RANK
    low = tl.where(which == 0, scale0, scale1)
    scale = tl.where(which < 2, low, tl.where(which == 2, scale2, scale3))
    tl.store(place, total * scale, mask=inside)
