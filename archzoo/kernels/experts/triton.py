"""The Triton side of `archzoo.kernels.experts`: imported only once a kernel is to run.

A program takes one token's row (`spread`, `collect`), a part of a row (`swiglu`), or a tile of the
gradient of experts' weights; none waits for another, and every sum has a fixed order.
"""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_kernel(keys, counts, assignments, BLOCK: tl.constexpr):
    """counts[expert, block]: how many keys of a block are an expert's."""
    expert = tl.program_id(0)
    block = tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + index, mask=index < assignments, other=-1)
    found = tl.sum((key == expert).to(tl.int32))
    tl.store(counts + expert * tl.num_programs(1) + block, found)


@triton.jit
def place_kernel(
    keys, counts, inverse, ends, assignments, experts,
    COUNTED: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """The rows of one expert's assignments in one block of keys.

    Before them come all that the table of counts holds before this expert's block. Where one block
    takes all keys there is no table: COUNTED is off. Key `experts` is that of dropped assignments,
    which come last and end nowhere.
    """
    expert = tl.program_id(0)
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    index = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + index, mask=index < assignments, other=experts + 1)
    if COUNTED:
        before = tl.zeros((TABLE,), tl.int32)
        slot = expert * blocks + block
        for start in range(0, slot, TABLE):
            at = start + tl.arange(0, TABLE)
            before += tl.load(counts + at, mask=at < slot, other=0)
        row = tl.sum(before)
    else:
        row = tl.sum((key < expert).to(tl.int32))
    here = (key == expert).to(tl.int32)
    tl.store(inverse + index, (row + tl.cumsum(here) - 1).to(tl.int64), mask=key == expert)
    last = (expert < experts) & (block == blocks - 1)
    tl.store(ends + expert, row + tl.sum(here), mask=last)


@triton.jit
def widen_kernel(x, y, size, BLOCK: tl.constexpr):
    """Copy x to y, of another dtype."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    tl.store(y + index, tl.load(x + index, mask=inside).to(y.dtype.element_ty), mask=inside)


@triton.jit
def experts_gradient_kernel(
    dy, x, ends, d_weight,
    OUT: tl.constexpr, IN: tl.constexpr, OUT_BLOCK: tl.constexpr, IN_BLOCK: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_weight[e] = dy^T x (out, in) over the rows of expert e.

    The interpreter multiplies bfloat16 wrongly: UPCAST there.
    """
    tile = tl.program_id(0)  # those of one expert follow each other, and find its rows in cache
    expert = tl.program_id(1)
    wide: tl.constexpr = (IN + IN_BLOCK - 1) // IN_BLOCK
    out = (tile // wide) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    index = (tile % wide) * IN_BLOCK + tl.arange(0, IN_BLOCK)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    total = tl.zeros((OUT_BLOCK, IN_BLOCK), tl.float32)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        row = (start + tl.arange(0, STEP)).to(tl.int64)[:, None]
        inside = (row < last) & (out < OUT)[None, :]
        left = tl.load(dy + row * OUT + out[None, :], mask=inside, other=0.0)
        inside = (row < last) & (index < IN)[None, :]
        right = tl.load(x + row * IN + index[None, :], mask=inside, other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(tl.trans(left), right, total)
    at = (expert.to(tl.int64) * OUT + out[:, None]) * IN + index[None, :]
    tl.store(d_weight + at, total, mask=(out < OUT)[:, None] & (index < IN)[None, :])


@triton.jit
def spread_kernel(x, inverse, ends, rows, experts, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """rows[inverse[t, j]] = x[t]; rows after the last expert's are not written."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    computed = tl.load(ends + experts - 1)
    value = tl.load(x + token * width + column, mask=inside)
    for j in tl.static_range(K):
        row = tl.load(inverse + token * K + j)
        here = column < tl.where(row < computed, width, 0)
        tl.store(rows + row * width + column, value.to(rows.dtype.element_ty), mask=here)


@triton.jit
def collect_kernel(
    rows, weights, inverse, ends, y, experts, width,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[t] = sum_j w[t, j] rows[inverse[t, j]]; rows after the last expert's add nothing."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    computed = tl.load(ends + experts - 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(inverse + token * K + j)
        here = column < tl.where(row < computed, width, 0)
        value = tl.load(rows + row * width + column, mask=here, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * K + j)
        total += value
    tl.store(y + token * width + column, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def collect_backward_kernel(
    dy, rows, weights, inverse, ends, d_rows, d_weights, experts, width,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_rows[inverse[t, j]] = w[t, j] dy[t] and d_w[t, j] = dy[t] . rows[inverse[t, j]]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    computed = tl.load(ends + experts - 1)
    gradient = tl.load(dy + token * width + column, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        row = tl.load(inverse + token * K + j)
        here = column < tl.where(row < computed, width, 0)
        value = tl.load(rows + row * width + column, mask=here, other=0.0).to(tl.float32)
        tl.store(d_weights + token * K + j, tl.sum(gradient * value))
        weighted = gradient * tl.load(weights + token * K + j)
        tl.store(d_rows + row * width + column, weighted.to(d_rows.dtype.element_ty), mask=here)
