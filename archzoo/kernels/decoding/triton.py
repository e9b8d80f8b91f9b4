"""The Triton side of `archzoo.kernels.decoding`: imported only once a kernel is to run.

With EARLY a kernel may begin while the one before it still runs (programmatic dependent launch).
What no earlier kernel of the step writes, weights above all, is loaded before `_wait`, everything
else after it. A kernel lets the next one begin only once its own wait is over: so whatever ran
two kernels ago has ended, and memory that it read or wrote is free.
"""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

#: Whether this Triton can say where a kernel waits for the one before it.
CAN_BEGIN_EARLY = hasattr(cuda, "gdc_wait") and hasattr(cuda, "gdc_launch_dependents")


@triton.jit
def _wait(EARLY: tl.constexpr):
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def _rounded(x, like):
    """X in float32, rounded to what the pointer's tensor holds."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def start_kernel(
    tokens, embedding, frequencies, positions, x, table, amplitude,
    DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
    EMBED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Of one row: the position counted on, the token's vector, cosine and sine of the rotation.

    Without EMBED only the last, at the position as it is. Angles are float64: a float32 loses
    digits with the position.
    """
    row = tl.program_id(0)
    _wait(EARLY)
    position = tl.load(positions + row)
    if EMBED:
        position += 1
        channel = tl.arange(0, BLOCK_DIM)
        token = tl.load(tokens + row).to(tl.int64)
        vector = tl.load(embedding + token * DIM + channel, mask=channel < DIM, other=0.0)
        tl.store(x + row * DIM + channel, vector, mask=channel < DIM)
        tl.debug_barrier()  # every thread has read the position
        tl.store(positions + row, position)
    if PAIRS > 0:
        pair = tl.arange(0, BLOCK_PAIRS)
        theta = tl.load(frequencies + pair, mask=pair < PAIRS, other=0.0)
        angle = position.to(tl.float64) * theta
        at = table + (row * PAIRS + pair) * 2
        tl.store(at, (amplitude * tl.cos(angle)).to(tl.float32), mask=pair < PAIRS)
        tl.store(at + 1, (amplitude * tl.sin(angle)).to(tl.float32), mask=pair < PAIRS)


@triton.jit
def _load_beside(
    table, y_ptr, row, first, rows, y_row,
    OUT: tl.constexpr, BLOCK_OUT: tl.constexpr, ADD: tl.constexpr,
    ROTATED: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """What `_finish` takes besides: cosine, sine (rows, BLOCK_OUT / 2) and what y is added to."""
    cos, sin, held = 1.0, 0.0, 0.0
    if ROTATED > 0:
        even = first + 2 * tl.arange(0, BLOCK_OUT // 2)
        pair = (even % HEAD) // 2
        inside = (row < rows)[:, None] & ((even < ROTATED) & (pair < PAIRS))[None, :]
        at = table + (row[:, None] * PAIRS + pair[None, :]) * 2
        cos = tl.load(at, mask=inside, other=1.0)
        sin = tl.load(at + 1, mask=inside, other=0.0)
    if ADD:
        out = first + tl.arange(0, BLOCK_OUT)
        at = y_ptr + row.to(tl.int64)[:, None] * y_row + out[None, :]
        held = tl.load(at, mask=(row < rows)[:, None] & (out < OUT)[None, :], other=0.0)
        held = held.to(tl.float32)
    return cos, sin, held


@triton.jit
def _finish(
    y, up, beside, y_ptr, row, first, rows, y_row, scaled_from, scale,
    OUT: tl.constexpr, BLOCK_OUT: tl.constexpr, PAIRED: tl.constexpr, ADD: tl.constexpr,
    ROTATED: tl.constexpr,
):  # fmt: skip
    """What follows a product: y (rows, BLOCK_OUT) float32 of outputs from `first` on, and stored.

    PAIRED: ``silu(y) * up``. ROTATED: the first ROTATED outputs are heads, whose pairs are turned
    by cosine and sine, and scaled from output `scaled_from` on. ADD: to what is there.
    """
    cos, sin, held = beside
    y = _rounded(y, y_ptr)
    if PAIRED:
        y = _rounded(y * tl.sigmoid(y), y_ptr) * _rounded(up, y_ptr)
    if ROTATED > 0:
        even = first + 2 * tl.arange(0, BLOCK_OUT // 2)
        factor = tl.where((even >= scaled_from) & (even < ROTATED), scale, 1.0)[None, :]
        a, b = tl.split(tl.reshape(y, (row.shape[0], BLOCK_OUT // 2, 2)))
        y = tl.join((a * cos - b * sin) * factor, (a * sin + b * cos) * factor)
        y = tl.reshape(y, (row.shape[0], BLOCK_OUT))
    if ADD:
        y = _rounded(y, y_ptr) + held
    out = first + tl.arange(0, BLOCK_OUT)
    at = y_ptr + row.to(tl.int64)[:, None] * y_row + out[None, :]
    inside = (row < rows)[:, None] & (out < OUT)[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # one form for all batches of a plan
def vector_kernel(
    x_ptr, gate_ptr, scale_ptr, weight_ptr, table_ptr, y_ptr,
    rows, x_row, gate_row, y_row, eps, scaled_from, scale,
    OUT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, GATED: tl.constexpr, PAIRED: tl.constexpr,
    ADD: tl.constexpr, ROTATED: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr,
    EVICTION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT outputs of one row: norm, gate, product, `_finish`.

    The whole tile of the weight is under way before anything else happens. The channels are GROUPS
    groups of GROUP, each normalised by itself.
    """
    WIDTH: tl.constexpr = GROUP * GROUPS
    BLOCK: tl.constexpr = BLOCK_GROUP * BLOCK_GROUPS
    first = tl.program_id(0) * BLOCK_OUT
    row = tl.program_id(1)
    rows_of_y = row + tl.zeros((1,), tl.int32)
    index = tl.arange(0, BLOCK)
    channel = index
    inside = index < WIDTH
    if BLOCK_GROUPS > 1:
        channel = (index // BLOCK_GROUP) * GROUP + index % BLOCK_GROUP
        inside = (index // BLOCK_GROUP < GROUPS) & (index % BLOCK_GROUP < GROUP)
    out = first + tl.arange(0, BLOCK_OUT)
    at = weight_ptr + out.to(tl.int64)[:, None] * WIDTH + channel[None, :]
    both = (out < OUT)[:, None] & inside[None, :]
    weight = tl.load(at, mask=both, other=0.0, eviction_policy=EVICTION)
    if PAIRED:
        at += OUT * WIDTH
        weight_up = tl.load(at, mask=both, other=0.0, eviction_policy=EVICTION)
    if WEIGHTED:
        scales = tl.load(scale_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    _wait(EARLY)
    row_wide = row.to(tl.int64)
    x = tl.load(x_ptr + row_wide * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + row_wide * gate_row + channel, mask=inside, other=0.0)
        gate = gate.to(tl.float32)
    beside = _load_beside(
        table_ptr, y_ptr, rows_of_y, first, rows, y_row, OUT, BLOCK_OUT, ADD, ROTATED, HEAD, PAIRS
    )
    if NORM:
        if BLOCK_GROUPS == 1:
            x = x * tl.rsqrt(tl.sum(x * x, 0) / GROUP + eps)
        else:
            grouped = tl.reshape(x, (BLOCK_GROUPS, BLOCK_GROUP))
            root = tl.rsqrt(tl.sum(grouped * grouped, 1) / GROUP + eps)
            x = tl.reshape(grouped * root[:, None], (BLOCK,))
        if WEIGHTED:
            x = x * scales
    x = _rounded(x, weight_ptr)
    if GATED:
        x = _rounded(x * _rounded(gate * tl.sigmoid(gate), weight_ptr), weight_ptr)
    y = tl.sum(weight.to(tl.float32) * x[None, :], 1)[None, :]
    up = y
    if PAIRED:
        up = tl.sum(weight_up.to(tl.float32) * x[None, :], 1)[None, :]
    _finish(
        y, up, beside, y_ptr, rows_of_y, first, rows, y_row, scaled_from, scale,
        OUT, BLOCK_OUT, PAIRED, ADD, ROTATED,
    )  # fmt: skip


@triton.jit
def _product(x, weight, total, UPCAST: tl.constexpr):
    """``x W^T + total``. The interpreter multiplies bfloat16 wrongly: upcast there."""
    if UPCAST:
        x = x.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(x, tl.trans(weight), total, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])  # one form for all batches of a plan
def matrix_kernel(
    x_ptr, scale_ptr, weight_ptr, table_ptr, y_ptr,
    rows, x_row, y_row, eps, scaled_from, scale,
    OUT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, PAIRED: tl.constexpr,
    ADD: tl.constexpr, ROTATED: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr,
    UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT outputs of some rows: norm with a weight, product, `_finish`.

    The mean square is one number a row, so it can follow the product, and x is read once for both.
    """
    first = tl.program_id(0) * BLOCK_OUT
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = first + tl.arange(0, BLOCK_OUT)
    from_x = x_ptr + row.to(tl.int64)[:, None] * x_row
    from_weight = weight_ptr + out.to(tl.int64)[:, None] * WIDTH
    some = (row < rows)[:, None]
    _wait(EARLY)
    beside = _load_beside(
        table_ptr, y_ptr, row, first, rows, y_row, OUT, BLOCK_OUT, ADD, ROTATED, HEAD, PAIRS
    )
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    y = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    up = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for begin in range(0, WIDTH, BLOCK):
        channel = begin + tl.arange(0, BLOCK)
        inside = (channel < WIDTH)[None, :]
        x = tl.load(from_x + channel[None, :], mask=some & inside, other=0.0)
        if NORM:
            scales = tl.load(scale_ptr + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            x = (wide * scales[None, :]).to(x_ptr.dtype.element_ty)
        both = (out < OUT)[:, None] & inside
        weight = tl.load(from_weight + channel[None, :], mask=both, other=0.0)
        y = _product(x, weight, y, UPCAST)
        if PAIRED:
            weight = tl.load(from_weight + OUT * WIDTH + channel[None, :], mask=both, other=0.0)
            up = _product(x, weight, up, UPCAST)
    if NORM:
        root = tl.rsqrt(squares / WIDTH + eps)[:, None]
        y *= root
        up *= root
    _finish(
        y, up, beside, y_ptr, row, first, rows, y_row, scaled_from, scale,
        OUT, BLOCK_OUT, PAIRED, ADD, ROTATED,
    )  # fmt: skip


@triton.jit
def retention_kernel(
    q_ptr, k_ptr, v_ptr, log_decay_ptr, positions_ptr, memory_ptr, o_ptr, row_stride, heads,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """S <- gamma S + k^T v in place, o = q S / sqrt(s_n), of TILE columns of one head's S.

    S was last written a whole step ago, and positions kernels ago, so both come before the wait.
    s_n is computed in float64, where 1 - gamma^n keeps its digits.
    """
    row = tl.program_id(1)
    batch = (row // heads).to(tl.int64)
    head = row % heads
    key = tl.arange(0, BLOCK_K)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = memory_ptr + row.to(tl.int64) * DK * DV + key[:, None] * DV + column[None, :]
    inside = (key < DK)[:, None] & (column < DV)[None, :]
    memory = tl.load(at, mask=inside, other=0.0)
    log_decay = tl.load(log_decay_ptr + head).to(tl.float64)
    count = (tl.load(positions_ptr + batch) + 1).to(tl.float64)
    total = count
    if log_decay != 0.0:
        total = (1.0 - tl.exp(count * log_decay)) / (1.0 - tl.exp(log_decay))
    normaliser = tl.rsqrt(total.to(tl.float32))
    decay = tl.exp(log_decay).to(tl.float32)
    _wait(EARLY)
    q = tl.load(q_ptr + batch * row_stride + head * DK + key, mask=key < DK, other=0.0)
    k = tl.load(k_ptr + batch * row_stride + head * DK + key, mask=key < DK, other=0.0)
    v = tl.load(v_ptr + batch * row_stride + head * DV + column, mask=column < DV, other=0.0)
    memory = memory * decay + k.to(tl.float32)[:, None] * v.to(tl.float32)[None, :]
    o = tl.sum(q.to(tl.float32)[:, None] * memory, 0) * normaliser
    tl.store(at, memory, mask=inside)
    tl.store(o_ptr + row.to(tl.int64) * DV + column, o, mask=column < DV)
