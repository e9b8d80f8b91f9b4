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
    y = _rounded(y, y_ptr)
    out = first + tl.arange(0, BLOCK_OUT)
    at = y_ptr + row.to(tl.int64)[:, None] * y_row + out[None, :]
    inside = (row < rows)[:, None] & (out < OUT)[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)
    return y


@triton.jit
def _gates(logits, expert, EXPERTS: tl.constexpr, TOP_K: tl.constexpr):
    """Softmax of a router's logits (BLOCK_EXPERTS,) float32; of the TOP_K largest alone."""
    logits = tl.where(expert < EXPERTS, logits, float("-inf"))
    if TOP_K < EXPERTS:
        # One by one: the compiler may sum a logit twice, in two orders, and an expert that is
        # compared with itself then differs in the last bit.
        left, chosen = logits, expert < 0
        for _ in tl.static_range(TOP_K):
            largest = expert == tl.argmax(left, 0)
            chosen = chosen | largest
            left = tl.where(largest, float("-inf"), left)
        logits = tl.where(chosen, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 0))
    return weights / tl.sum(weights, 0)


@triton.jit
def _gated_hidden(
    hidden_ptr, block, row, like,
    BLOCKS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """``g * (A x)`` of a block's mixture, (BLOCK_EXPERTS * BLOCK_RANK,), rounded as `like` is.

    Of a row's A x of all BLOCKS, and after them the logits of all.
    """
    RANKS: tl.constexpr = EXPERTS * RANK
    from_row = hidden_ptr + row * BLOCKS * (RANKS + EXPERTS)
    index = tl.arange(0, BLOCK_EXPERTS * BLOCK_RANK)
    inside = (index // BLOCK_RANK < EXPERTS) & (index % BLOCK_RANK < RANK) & (block >= 0)
    column = block * RANKS + (index // BLOCK_RANK) * RANK + index % BLOCK_RANK
    hidden = tl.load(from_row + column, mask=inside, other=0.0).to(tl.float32)
    expert = tl.arange(0, BLOCK_EXPERTS)
    at = from_row + BLOCKS * RANKS + block * EXPERTS + expert
    logits = tl.load(at, mask=(expert < EXPERTS) & (block >= 0), other=0.0).to(tl.float32)
    gates = _rounded(_gates(logits, expert, EXPERTS, TOP_K), like)
    hidden = tl.reshape(hidden, (BLOCK_EXPERTS, BLOCK_RANK)) * gates[:, None]
    return _rounded(tl.reshape(hidden, (BLOCK_EXPERTS * BLOCK_RANK,)), like)


@triton.jit
def _seconds(
    second_ptr, out, outs, block, RANKS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_RANK: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """B of outputs `out` (BLOCK_OUT,), in the order of `_gated_hidden`."""
    index = tl.arange(0, BLOCK_EXPERTS * BLOCK_RANK)
    inside = (index // BLOCK_RANK < EXPERTS) & (index % BLOCK_RANK < RANK) & (block >= 0)
    column = (index // BLOCK_RANK) * RANK + index % BLOCK_RANK
    at = second_ptr + out.to(tl.int64)[:, None] * RANKS + column[None, :]
    both = (out < outs)[:, None] & inside[None, :]
    return tl.load(at, mask=both, other=0.0, eviction_policy=EVICTION)


@triton.jit(do_not_specialize=["rows"])  # one form for all batches of a plan
def vector_kernel(
    x_ptr, gate_ptr, scale_ptr, weight_ptr, table_ptr, y_ptr,
    hidden_ptr, second_ptr, which_ptr, router_ptr, left_ptr,
    rows, x_row, gate_row, y_row, eps, scaled_from, scale, mixture_scale,
    OUT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, GATED: tl.constexpr, PAIRED: tl.constexpr,
    ADD: tl.constexpr, ROTATED: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr, BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_RANK: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, LEFT: tl.constexpr, BLOCK_LEFT: tl.constexpr,
    EVICTION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT outputs of one row: norm, gate, product, `_finish`.

    The whole tile of the weight is under way before anything else happens. The channels are GROUPS
    groups of GROUP, each normalised by itself.

    EXPERTS > 0: there is a mixture. RANK > 0: of LoRAs, whose ``B (g * A x)`` is added to the
    product, of A x and logits that an earlier kernel made; ALIGNED outputs in a row are of one
    block, and `which` says of which. RANK = 0: of vectors, whose blend scales x, of logits that
    PARTS earlier programs have left in parts. LEFT > 0: leave a part of that many logits, this
    program's outputs times their columns of the next product's router.
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
    if RANK > 0:
        RANKS: tl.constexpr = EXPERTS * RANK
        block = tl.load(which_ptr + first // ALIGNED)
        second = _seconds(
            second_ptr, out, OUT, block, RANKS, EXPERTS, RANK, BLOCK_EXPERTS, BLOCK_RANK, EVICTION
        )
        if PAIRED:
            block_up = tl.load(which_ptr + (OUT + first) // ALIGNED)
            second_up = _seconds(
                second_ptr + OUT * RANKS, out, OUT, block_up,
                RANKS, EXPERTS, RANK, BLOCK_EXPERTS, BLOCK_RANK, EVICTION,
            )  # fmt: skip
    if LEFT > 0:
        column = tl.arange(0, BLOCK_LEFT)
        at = router_ptr + out.to(tl.int64)[:, None] * LEFT + column[None, :]
        both = (out < OUT)[:, None] & (column < LEFT)[None, :]
        router = tl.load(at, mask=both, other=0.0, eviction_policy=EVICTION)
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
            roots = tl.rsqrt(tl.sum(grouped * grouped, 1) / GROUP + eps)
            x = tl.reshape(grouped * roots[:, None], (BLOCK,))
        if WEIGHTED:
            x = x * scales
    x = _rounded(x, weight_ptr)
    if GATED:
        x = _rounded(x * _rounded(gate * tl.sigmoid(gate), weight_ptr), weight_ptr)
    if EXPERTS > 0 and RANK == 0:
        expert = tl.arange(0, BLOCK_EXPERTS)
        parts = tl.zeros((BLOCK_PARTS, BLOCK_EXPERTS), tl.float32)
        for begin in tl.static_range(0, PARTS, BLOCK_PARTS):
            part = begin + tl.arange(0, BLOCK_PARTS)
            at = hidden_ptr + ((part * rows + row) * EXPERTS)[:, None] + expert[None, :]
            both = (part < PARTS)[:, None] & (expert < EXPERTS)[None, :]
            parts += tl.load(at, mask=both, other=0.0).to(tl.float32)
        logits = _rounded(tl.sum(parts, 0), weight_ptr)
        gates = _gates(logits, expert, EXPERTS, TOP_K)
        blend = tl.zeros((BLOCK,), tl.float32)
        for number in tl.static_range(EXPERTS):
            vector = tl.load(second_ptr + number * WIDTH + channel, mask=inside, other=0.0)
            blend += tl.sum(tl.where(expert == number, gates, 0.0), 0) * vector
        x = _rounded(x + _rounded(x * blend, weight_ptr), weight_ptr)
    y = tl.sum(weight.to(tl.float32) * x[None, :], 1)[None, :]
    up = y
    if PAIRED:
        up = tl.sum(weight_up.to(tl.float32) * x[None, :], 1)[None, :]
    if RANK > 0:
        hidden = _gated_hidden(
            hidden_ptr, block, row, weight_ptr,
            BLOCKS, EXPERTS, RANK, TOP_K, BLOCK_EXPERTS, BLOCK_RANK,
        )  # fmt: skip
        y += mixture_scale * tl.sum(second.to(tl.float32) * hidden[None, :], 1)[None, :]
        if PAIRED:
            hidden = _gated_hidden(
                hidden_ptr, block_up, row, weight_ptr,
                BLOCKS, EXPERTS, RANK, TOP_K, BLOCK_EXPERTS, BLOCK_RANK,
            )  # fmt: skip
            up += mixture_scale * tl.sum(second_up.to(tl.float32) * hidden[None, :], 1)[None, :]
    y = _finish(
        y, up, beside, y_ptr, rows_of_y, first, rows, y_row, scaled_from, scale,
        OUT, BLOCK_OUT, PAIRED, ADD, ROTATED,
    )  # fmt: skip
    if LEFT > 0:
        left = tl.sum(router.to(tl.float32) * tl.reshape(y, (BLOCK_OUT,))[:, None], 0)
        at = left_ptr + (tl.program_id(0) * rows + row) * LEFT + column
        tl.store(at, left, mask=column < LEFT)


@triton.jit
def gate_experts_kernel(
    hidden_ptr, gated_ptr,
    BLOCKS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_RANK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``g * (A x)`` of one block's mixture and one row, for `matrix_kernel`."""
    block = tl.program_id(0)
    row = tl.program_id(1)
    _wait(EARLY)
    hidden = _gated_hidden(
        hidden_ptr, block, row, gated_ptr,
        BLOCKS, EXPERTS, RANK, TOP_K, BLOCK_EXPERTS, BLOCK_RANK,
    )  # fmt: skip
    index = tl.arange(0, BLOCK_EXPERTS * BLOCK_RANK)
    inside = (index // BLOCK_RANK < EXPERTS) & (index % BLOCK_RANK < RANK)
    column = (index // BLOCK_RANK) * RANK + index % BLOCK_RANK
    at = gated_ptr + (row.to(tl.int64) * BLOCKS + block) * (EXPERTS * RANK) + column
    tl.store(at, hidden.to(gated_ptr.dtype.element_ty), mask=inside)


@triton.jit
def blend_kernel(
    z_ptr, router_ptr, vectors_ptr, places_ptr, table_ptr, y_ptr, z_row, y_row, scale,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, BLOCK_TILE: tl.constexpr,
    PAIRS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of ``z * sum_e g_e l_e``, of one row: z is one head, or a whole vector.

    A place says where z begins in a row of z_ptr and how long it is, at most SIZE; which router it
    has; where in it the tile begins; and whether its pairs are turned and scaled after. A tile that
    is all of z may be written over it.
    """
    program = tl.program_id(0)
    row = tl.program_id(1)
    at = places_ptr + program * 5
    begin, size, router = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    start, turned = tl.load(at + 3), tl.load(at + 4)
    expert = tl.arange(0, BLOCK_EXPERTS)
    some = (expert < EXPERTS)[:, None]
    channel = tl.arange(0, BLOCK)
    at = router_ptr + (router * EXPERTS + expert)[:, None] * SIZE + channel[None, :]
    weight = tl.load(at, mask=some & (channel < size)[None, :], other=0.0)
    index = tl.arange(0, BLOCK_TILE)
    inside = (index < TILE) & (start + index < size)
    at = vectors_ptr + (program * EXPERTS + expert)[:, None] * TILE + index[None, :]
    vectors = tl.load(at, mask=some & inside[None, :], other=0.0)
    _wait(EARLY)
    from_row = z_ptr + row.to(tl.int64) * z_row + begin
    z = tl.load(from_row + channel, mask=channel < size, other=0.0).to(tl.float32)
    tile = tl.load(from_row + start + index, mask=inside, other=0.0).to(tl.float32)
    pair = (start + tl.arange(0, BLOCK_TILE // 2) * 2) // 2
    turns = (pair < PAIRS) & (turned > 0)
    at = table_ptr + (row * PAIRS + pair) * 2
    cos = tl.load(at, mask=turns, other=1.0)
    sin = tl.load(at + 1, mask=turns, other=0.0)
    logits = _rounded(tl.sum(weight.to(tl.float32) * z[None, :], 1), z_ptr)
    gates = _gates(logits, expert, EXPERTS, TOP_K)
    blend = tl.sum(gates[:, None] * vectors, 0)
    y = _rounded(tile + _rounded(tile * blend, z_ptr), z_ptr)
    a, b = tl.split(tl.reshape(y, (BLOCK_TILE // 2, 2)))
    factor = tl.where(turned > 0, scale, 1.0)
    y = tl.join((a * cos - b * sin) * factor, (a * sin + b * cos) * factor)
    y = tl.reshape(y, (BLOCK_TILE,))
    tl.debug_barrier()  # every thread has read z
    at = y_ptr + row.to(tl.int64) * y_row + begin + start + index
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product(x, weight, total, UPCAST: tl.constexpr):
    """``x W^T + total``. The interpreter multiplies bfloat16 wrongly: upcast there."""
    if UPCAST:
        x = x.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(x, tl.trans(weight), total, input_precision="ieee")


@triton.jit
def _second_product(
    from_gated, second_ptr, some, out, block,
    OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    RANKS: tl.constexpr, BLOCK_RANKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``(g * A x) B^T`` of the outputs of one block, (BLOCK_ROWS, BLOCK_OUT)."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    from_second = second_ptr + out.to(tl.int64)[:, None] * RANKS
    for begin in range(0, RANKS, BLOCK_RANKS):
        column = begin + tl.arange(0, BLOCK_RANKS)
        inside = ((column < RANKS) & (block >= 0))[None, :]
        at = from_gated[:, None] + block * RANKS + column[None, :]
        gated = tl.load(at, mask=some[:, None] & inside, other=0.0)
        both = (out < OUT)[:, None] & inside
        second = tl.load(from_second + column[None, :], mask=both, other=0.0)
        total = _product(gated, second, total, UPCAST)
    return total


@triton.jit(do_not_specialize=["rows"])  # one form for all batches of a plan
def matrix_kernel(
    x_ptr, scale_ptr, weight_ptr, table_ptr, y_ptr, gated_ptr, second_ptr, which_ptr,
    rows, x_row, y_row, eps, scaled_from, scale, mixture_scale,
    OUT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, PAIRED: tl.constexpr,
    ADD: tl.constexpr, ROTATED: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr,
    RANKS: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_RANKS: tl.constexpr,
    UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT outputs of some rows: norm with a weight, product, `_finish`.

    The mean square is one number a row, so it can follow the product, and x is read once for both.
    RANKS > 0: a mixture's ``B (g * A x)`` is added, of g * A x (rows, BLOCKS * RANKS).
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
    if RANKS > 0:
        some = row < rows
        from_gated = gated_ptr + row * (BLOCKS * RANKS)
        block = tl.load(which_ptr + first // ALIGNED)
        added = _second_product(
            from_gated, second_ptr, some, out, block, OUT, BLOCK_ROWS, BLOCK_OUT,
            RANKS, BLOCK_RANKS, UPCAST,
        )  # fmt: skip
        y += mixture_scale * added
        if PAIRED:
            block = tl.load(which_ptr + (OUT + first) // ALIGNED)
            added = _second_product(
                from_gated, second_ptr + OUT * RANKS, some, out, block, OUT, BLOCK_ROWS, BLOCK_OUT,
                RANKS, BLOCK_RANKS, UPCAST,
            )  # fmt: skip
            up += mixture_scale * added
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
    s_n is computed in float64, where 1 - gamma^n keeps its digits, unless gamma is all but 1.
    """
    TILES: tl.constexpr = (DV + TILE - 1) // TILE
    row = tl.program_id(0) // TILES
    batch = (row // heads).to(tl.int64)
    head = row % heads
    key = tl.arange(0, BLOCK_K)
    column = tl.program_id(0) % TILES * TILE + tl.arange(0, TILE)
    at = memory_ptr + row.to(tl.int64) * DK * DV + key[:, None] * DV + column[None, :]
    inside = (key < DK)[:, None] & (column < DV)[None, :]
    memory = tl.load(at, mask=inside, other=0.0)
    log_decay = tl.load(log_decay_ptr + head).to(tl.float64)
    count = (tl.load(positions_ptr + batch) + 1).to(tl.float64)
    total = count * (1.0 + 0.5 * (count - 1.0) * log_decay)  # the series' next term is below 1e-8
    if log_decay < -1e-10:
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
