"""The wide maps of retention for Hopper, with warp specialisation.

`stream_kernel` computes what its namesake in `triton` does, and takes the same
parameters. There all warps of a program load, multiply, scale and store in step, and wait for each
other nine times a chunk, so that the tensor cores work four tenths of the time. Here three groups
of four warps run side by side and meet at barriers in shared memory:

- one issues the copies, some chunks ahead, and makes the chunks' own weights, one chunk ahead;
- two each hold 64 columns of the state, (BLOCK_A, 64), in registers, and scan time at their
  own pace, so that one multiplies while the other scales and converts.

Both read the same a, b and weights. Where `a` is wider than BLOCK_A, each split makes the weights
of its own columns: they add up, as the shares of the state do. The state is held as tiles of 64
rows, for each TMA's widest swizzled box of a and b.

Gluon is Triton's lower level, and has no interpreter: `triton`'s kernel, which the
ordinary tests run, is its reference, and tests on a GPU hold both to the same recurrence.
"""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    mma_v2,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
WIDE: gl.constexpr = gl.constexpr(64)  # columns of a swizzled box of bfloat16
# What has other names from one Triton to the next: where a group's warps wait for each other, and
# TMA's copies.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_renamed = hasattr(tma, "async_load")
async_load = tma.async_load if _renamed else tma.async_copy_global_to_shared
async_store = tma.async_store if _renamed else tma.async_copy_shared_to_global


@gluon.jit
def _chunk(turn, turns, start, stop, CHUNK: gl.constexpr, REVERSE: gl.constexpr):
    """First token and size of the chunk of the loop's turn."""
    if REVERSE:
        begin = start + (turns - 1 - turn) * CHUNK
    else:
        begin = start + turn * CHUNK
    return begin, gl.minimum(CHUNK, stop - begin)


@gluon.jit
def power(log2_decay, exponent):
    """gamma^exponent, the exponent cut at 0 from below."""
    return gl.exp2(gl.maximum(exponent, 0).to(gl.float32) * log2_decay)


@gluon.jit
def log2_decay_of(log_decay_ptr, head):
    """log2 gamma of one head, finite: see `triton._load_log_decay`."""
    return gl.maximum(gl.load(log_decay_ptr + head).to(gl.float32), -1.0e4) * LOG2_E


@gluon.jit
def slices_of(
    pointer, batch, head, stride_batch, stride_time, stride_head, time, WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """Descriptor of one head of (batch, time, heads, WIDTH), read in boxes (ROWS, 64), swizzled."""
    box: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    base = pointer + batch * stride_batch + head * stride_head
    return tma.make_tensor_descriptor(base, [time, WIDTH], [stride_time, 1], [ROWS, WIDE], box)


@gluon.jit
def _weigh(
    a_buffer, b_buffer, weights_buffer, stage, slot, normaliser_row, log2_decay, begin, size,
    CHUNK: gl.constexpr, TILES: gl.constexpr, REVERSE: gl.constexpr, NORMALISE: gl.constexpr,
):  # fmt: skip
    """A chunk's own weights gamma^(i-j) (a_i . b_j), normalised, at [j, i]; 0 where j > i."""
    # The wide matrix instruction has 64 rows; 32 tokens take the narrow one.
    layout: gl.constexpr = (
        gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
        if CHUNK == 64
        else gl.NVMMADistributedLayout([2, 0], [2, 2], [16, 8])
    )
    weights = gl.zeros([CHUNK, CHUNK], gl.float32, layout)
    for i in gl.static_range(TILES):
        b = b_buffer.index(stage * TILES + i)
        a = a_buffer.index(stage * TILES + i).permute((1, 0))
        if CHUNK == 64:
            weights = warpgroup_mma(b, a, weights, is_async=True)
        else:
            left = b.load(gl.DotOperandLayout(0, layout, 2))
            right = a.load(gl.DotOperandLayout(1, layout, 2))
            weights = mma_v2(left, right, weights)
    rows = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))
    if REVERSE:
        gap = rows[:, None] - columns[None, :]
    else:
        gap = columns[None, :] - rows[:, None]
    decay = gl.where(gap >= 0, power(log2_decay, gap), 0.0)
    if NORMALISE:
        token = rows if REVERSE else columns
        normaliser = gl.load(normaliser_row + begin + token, mask=token < size, other=0.0)
        decay *= normaliser[:, None] if REVERSE else normaliser[None, :]
    if CHUNK == 64:
        weights = warpgroup_mma_wait(0, deps=(weights,))
    weights_buffer.index(slot).store((weights * decay).to(gl.bfloat16))
    fence_async_shared()
    barrier()


@gluon.jit
def _copy_and_weigh(
    a_desc, b_desc, c_desc, out_desc, a_buffer, b_buffer, c_buffer, stored_buffer, weights_buffer,
    full, empty, weighed, normaliser_row, log2_decay, start, stop, split, tile,
    CHUNK: gl.constexpr, BLOCK_A: gl.constexpr, REVERSE: gl.constexpr, NORMALISE: gl.constexpr,
    ADD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying group, which between copies makes the chunks' own weights.

    Nothing before a chunk leads to its weights, so they are ready when the others come to it: it
    weighs a chunk while they multiply the one before, and STAGES - 2 more are on their way.
    """
    TILES: gl.constexpr = BLOCK_A // WIDE
    BYTES: gl.constexpr = 2 * CHUNK * (2 * BLOCK_A + (4 * WIDE if ADD else 2 * WIDE))
    LEAD: gl.constexpr = STAGES - 2
    turns = gl.cdiv(stop - start, CHUNK)
    for step in range(turns + LEAD):
        stage = step % STAGES
        # The chunk that was there is done with, and so are its weights: two are kept.
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        if step < turns:
            begin, _ = _chunk(step, turns, start, stop, CHUNK, REVERSE)
            ready = full.index(stage)
            mbarrier.expect(ready, BYTES)
            for i in gl.static_range(TILES):
                at = split * BLOCK_A + i * WIDE
                async_load(a_desc, [begin, at], ready, a_buffer.index(stage * TILES + i))
                async_load(b_desc, [begin, at], ready, b_buffer.index(stage * TILES + i))
            for i in gl.static_range(2):
                at = (2 * tile + i) * WIDE
                async_load(c_desc, [begin, at], ready, c_buffer.index(2 * stage + i))
                if ADD:
                    async_load(out_desc, [begin, at], ready, stored_buffer.index(2 * stage + i))
        turn = step - LEAD
        if turn >= 0:
            begin, size = _chunk(turn, turns, start, stop, CHUNK, REVERSE)
            mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
            _weigh(
                a_buffer, b_buffer, weights_buffer, turn % STAGES, turn % 2, normaliser_row,
                log2_decay, begin, size, CHUNK, TILES, REVERSE, NORMALISE,
            )  # fmt: skip
            mbarrier.arrive(weighed.index(turn % 2), count=1)


@gluon.jit
def _multiply(
    out_desc, a_buffer, b_buffer, c_buffer, stored_buffer, weights_buffer, out_buffer, full,
    empty, weighed,
    initial_ptr, final_ptr, normaliser_row, log2_decay, start, stop, split, tile,
    stride_a, stride_c, inner_ptr, segment,
    HALF: gl.constexpr, CHUNK: gl.constexpr, BLOCK_A: gl.constexpr, REVERSE: gl.constexpr,
    NORMALISE: gl.constexpr, HAS_INITIAL: gl.constexpr, HAS_FINAL: gl.constexpr,
    ADD: gl.constexpr, STAGES: gl.constexpr, EACH: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """One of the two multiplying groups: columns [64 HALF, 64 HALF + 64) of the program's tile.

    With EACH > 1 the initial states of its later segments go to `inner_ptr`, stride A rows.
    """
    TILES: gl.constexpr = BLOCK_A // WIDE
    SHIFT: gl.constexpr = 0 if REVERSE else 1
    state_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    rows = split * BLOCK_A + gl.arange(0, WIDE, layout=gl.SliceLayout(0, state_layout))
    columns = (2 * tile + HALF) * WIDE + gl.arange(0, WIDE, layout=gl.SliceLayout(1, state_layout))
    offset = columns[:, None] * stride_c + rows[None, :] * stride_a
    if HAS_INITIAL:
        state0 = gl.load(initial_ptr + offset)
        state1 = gl.load(initial_ptr + offset + WIDE * stride_a)
        if TILES > 2:
            state2 = gl.load(initial_ptr + offset + 2 * WIDE * stride_a)
            state3 = gl.load(initial_ptr + offset + 3 * WIDE * stride_a)
    else:
        state0 = gl.zeros([WIDE, WIDE], gl.float32, state_layout)
        state1 = gl.zeros([WIDE, WIDE], gl.float32, state_layout)
        if TILES > 2:
            state2 = gl.zeros([WIDE, WIDE], gl.float32, state_layout)
            state3 = gl.zeros([WIDE, WIDE], gl.float32, state_layout)
    index = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, out_layout))
    turns = gl.cdiv(stop - start, CHUNK)
    begin, size = _chunk(0, turns, start, stop, CHUNK, REVERSE)
    normaliser = gl.full([CHUNK], 1.0, gl.float32, gl.SliceLayout(0, out_layout))
    if NORMALISE:
        normaliser = gl.load(normaliser_row + begin + index, mask=index < size, other=0.0)
    mine = out_buffer.index(HALF)
    for turn in range(turns):
        begin, size = _chunk(turn, turns, start, stop, CHUNK, REVERSE)
        if REVERSE:
            rank = size - 1 - index
        else:
            rank = index
        from_initial = power(log2_decay, rank + SHIFT)
        to_final = power(log2_decay, size - SHIFT - rank)
        across = gl.exp2(size.to(gl.float32) * log2_decay)
        if NORMALISE:
            if REVERSE:
                to_final *= normaliser
            else:
                from_initial *= normaliser
            ahead, rest = _chunk(turn + 1, turns, start, stop, CHUNK, REVERSE)
            normaliser = gl.load(
                normaliser_row + ahead + index,
                mask=(index < rest) & (turn + 1 < turns),
                other=0.0,
            )
        stage = turn % STAGES
        mbarrier.wait(full.index(stage), turn // STAGES & 1)

        # The past, through the state: two of its tiles at a time, whose copies take registers.
        out = gl.zeros([WIDE, CHUNK], gl.float32, out_layout)
        a = stage * TILES
        left0 = gl.convert_layout(state0.to(gl.bfloat16), left)
        left1 = gl.convert_layout(state1.to(gl.bfloat16), left)
        out = warpgroup_mma(
            left0, a_buffer.index(a).permute((1, 0)), out, use_acc=False, is_async=True
        )
        out = warpgroup_mma(left1, a_buffer.index(a + 1).permute((1, 0)), out, is_async=True)
        # Meanwhile what needs no tensor cores.
        c = c_buffer.index(2 * stage + HALF).permute((1, 0))
        scaled = (c.load(out_layout).to(gl.float32) * to_final[None, :]).to(gl.bfloat16)
        scaled = gl.convert_layout(scaled, left)
        state0 *= across
        state1 *= across
        out, left0, left1 = warpgroup_mma_wait(0, deps=(out, left0, left1))
        if TILES > 2:
            left2 = gl.convert_layout(state2.to(gl.bfloat16), left)
            left3 = gl.convert_layout(state3.to(gl.bfloat16), left)
            out = warpgroup_mma(left2, a_buffer.index(a + 2).permute((1, 0)), out, is_async=True)
            out = warpgroup_mma(left3, a_buffer.index(a + 3).permute((1, 0)), out, is_async=True)
            state2 *= across
            state3 *= across
            out, left2, left3 = warpgroup_mma_wait(0, deps=(out, left2, left3))
        out *= from_initial[None, :]
        # The chunk itself, through its weights; and the state after it.
        if ADD:
            stored = stored_buffer.index(2 * stage + HALF).permute((1, 0)).load(out_layout)
            out += stored.to(gl.float32)
        mbarrier.wait(weighed.index(turn % 2), turn // 2 & 1)
        out = warpgroup_mma(c, weights_buffer.index(turn % 2), out, is_async=True)
        state0 = warpgroup_mma(scaled, b_buffer.index(a), state0, is_async=True)
        state1 = warpgroup_mma(scaled, b_buffer.index(a + 1), state1, is_async=True)
        if TILES > 2:
            state2 = warpgroup_mma(scaled, b_buffer.index(a + 2), state2, is_async=True)
            state3 = warpgroup_mma(scaled, b_buffer.index(a + 3), state3, is_async=True)
        out = warpgroup_mma_wait(TILES, deps=(out,))
        tma.store_wait(0)
        barrier()
        mine.permute((1, 0)).store(out.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        async_store(out_desc, [begin, (2 * tile + HALF) * WIDE], mine)
        if TILES > 2:
            state0, state1, state2, state3, scaled = warpgroup_mma_wait(
                0, deps=(state0, state1, state2, state3, scaled)
            )
        else:
            state0, state1, scaled = warpgroup_mma_wait(0, deps=(state0, state1, scaled))
        fence_async_shared()
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        if EACH > 1:
            # Tokens from the program's first to where the state stands now.
            passed = begin - start if REVERSE else begin - start + CHUNK
            if (passed % segment == 0) & (passed > 0) & (passed < stop - start):
                # The state's number goes into its rows: addresses made here, at each use, where
                # an offset of the first state's would hold its registers through the loop.
                inner_rows = rows + (passed // segment - (1 if REVERSE else 0)) * A
                inner = inner_ptr + columns[:, None] * stride_c + inner_rows[None, :] * stride_a
                gl.store(inner, state0)
                gl.store(inner + WIDE * stride_a, state1)
                if TILES > 2:
                    gl.store(inner + 2 * WIDE * stride_a, state2)
                    gl.store(inner + 3 * WIDE * stride_a, state3)
    if HAS_FINAL:
        gl.store(final_ptr + offset, state0)
        gl.store(final_ptr + offset + WIDE * stride_a, state1)
        if TILES > 2:
            gl.store(final_ptr + offset + 2 * WIDE * stride_a, state2)
            gl.store(final_ptr + offset + 3 * WIDE * stride_a, state3)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["segments", "heads", "chunks", "split", "normaliser_rows", "pairs"],
    do_not_specialize_on_alignment=["log_decay_ptr"],
)
def stream_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, scores_ptr, log_decay_ptr, normaliser_ptr, documents_ptr,
    ranges_ptr, initial_ptr, final_ptr, kept_ptr,
    a_batch, a_time, a_head, b_batch, b_time, b_head, c_batch, c_time, c_head,
    out_batch, out_time, out_head,
    time, segment, segments, heads, chunks, split, stride_a, stride_c, normaliser_rows, pairs,
    A: gl.constexpr, C: gl.constexpr, BLOCK_A: gl.constexpr, CHUNK: gl.constexpr,
    REVERSE: gl.constexpr, NORMALISE: gl.constexpr, HAS_INITIAL: gl.constexpr,
    HAS_FINAL: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """out_i = sum_{j <= i} gamma^(i-j) (a_i . b_j) c_j for 128 columns and EACH segments.

    See `triton.stream_kernel`. Rows are whole, of one document, bfloat16; A is a
    multiple of BLOCK_A, which is 128 or 256, and C of 128. The initial state of the first of
    EACH segments is read; those of the others are written there, for the maps to come.
    """
    tile = gl.program_id(0)
    row = gl.program_id(1)
    segment_id = gl.program_id(2)
    row_wide = row.to(gl.int64)
    batch = (row // heads).to(gl.int64)
    head = (row % heads).to(gl.int64)
    log2_decay = log2_decay_of(log_decay_ptr, head)
    start = segment_id * EACH * segment
    stop = gl.minimum(start + EACH * segment, time)
    normaliser_row = normaliser_ptr + (row % normaliser_rows).to(gl.int64) * time
    inner = initial_ptr + (row_wide * segments + segment_id * EACH) * A * C
    initial = inner
    if REVERSE:
        initial += (EACH - 1) * A * C
    final = final_ptr + row_wide * A * C

    TILES: gl.constexpr = BLOCK_A // WIDE
    box: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    square: gl.constexpr = gl.NVMMASharedLayout(2 * CHUNK, 16, 2)
    a_desc = slices_of(a_ptr, batch, head, a_batch, a_time, a_head, time, A, CHUNK)
    b_desc = slices_of(b_ptr, batch, head, b_batch, b_time, b_head, time, A, CHUNK)
    c_desc = slices_of(c_ptr, batch, head, c_batch, c_time, c_head, time, C, CHUNK)
    out_desc = slices_of(out_ptr, batch, head, out_batch, out_time, out_head, time, C, CHUNK)
    a_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES * TILES, CHUNK, WIDE], box)
    b_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES * TILES, CHUNK, WIDE], box)
    c_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, CHUNK, WIDE], box)
    weights_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, CHUNK, CHUNK], square)
    stored_buffer = weights_buffer
    if ADD:
        stored_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, CHUNK, WIDE], box)
    out_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, CHUNK, WIDE], box)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(weighed.index(i), count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_copy_and_weigh, (
                a_desc, b_desc, c_desc, out_desc, a_buffer, b_buffer, c_buffer, stored_buffer,
                weights_buffer, full, empty, weighed, normaliser_row, log2_decay, start, stop,
                split,
                tile, CHUNK, BLOCK_A, REVERSE, NORMALISE, ADD, STAGES,
            )),
            (_multiply, (
                out_desc, a_buffer, b_buffer, c_buffer, stored_buffer, weights_buffer, out_buffer,
                full, empty,
                weighed, initial, final, normaliser_row, log2_decay, start, stop, split, tile,
                stride_a, stride_c, inner, segment, 0, CHUNK, BLOCK_A, REVERSE, NORMALISE,
                HAS_INITIAL, HAS_FINAL, ADD, STAGES, EACH, A,
            )),
            (_multiply, (
                out_desc, a_buffer, b_buffer, c_buffer, stored_buffer, weights_buffer, out_buffer,
                full, empty,
                weighed, initial, final, normaliser_row, log2_decay, start, stop, split, tile,
                stride_a, stride_c, inner, segment, 1, CHUNK, BLOCK_A, REVERSE, NORMALISE,
                HAS_INITIAL, HAS_FINAL, ADD, STAGES, EACH, A,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


@gluon.jit
def _copy_summands(
    b_desc, c_desc, b_buffer, c_buffer, full, empty, start, stop, row_column, column,
    CHUNK: gl.constexpr, BLOCK_B: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp of the first level."""
    TILES: gl.constexpr = BLOCK_B // WIDE
    turns = gl.cdiv(stop - start, CHUNK)
    for turn in range(turns):
        begin, _ = _chunk(turn, turns, start, stop, CHUNK, not REVERSE)
        stage = turn % STAGES
        mbarrier.wait(empty.index(stage), (turn // STAGES & 1) ^ 1)
        ready = full.index(stage)
        mbarrier.expect(ready, 2 * CHUNK * (BLOCK_B + 2 * WIDE))
        for i in gl.static_range(2):
            async_load(c_desc, [begin, column + i * WIDE], ready, c_buffer.index(2 * stage + i))
        for i in gl.static_range(TILES):
            async_load(
                b_desc, [begin, row_column + i * WIDE], ready, b_buffer.index(stage * TILES + i)
            )


@gluon.jit
def _add_up(
    b_buffer, c_buffer, full, empty, sums_ptr, normaliser_row, log2_decay, start, stop, row_column,
    column, HALF: gl.constexpr, C: gl.constexpr, CHUNK: gl.constexpr, BLOCK_B: gl.constexpr,
    REVERSE: gl.constexpr, NORMALISE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One multiplying group of the first level, as in `_multiply`."""
    TILES: gl.constexpr = BLOCK_B // WIDE
    state_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, state_layout, 2)
    chunk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    index = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, chunk_layout))
    state0 = gl.zeros([WIDE, WIDE], gl.float32, state_layout)
    state1 = gl.zeros([WIDE, WIDE], gl.float32, state_layout)
    if TILES > 2:
        state2 = gl.zeros([WIDE, WIDE], gl.float32, state_layout)
        state3 = gl.zeros([WIDE, WIDE], gl.float32, state_layout)
    turns = gl.cdiv(stop - start, CHUNK)
    for turn in range(turns):
        begin, size = _chunk(turn, turns, start, stop, CHUNK, not REVERSE)
        if REVERSE:
            to_final = power(log2_decay, begin - start + 1 + index)
        else:
            to_final = power(log2_decay, stop - 1 - begin - index)
        if REVERSE and NORMALISE:
            to_final *= gl.load(normaliser_row + begin + index, mask=index < size, other=0.0)
        stage = turn % STAGES
        mbarrier.wait(full.index(stage), turn // STAGES & 1)
        c = c_buffer.index(2 * stage + HALF).permute((1, 0)).load(chunk_layout)
        scaled = gl.convert_layout((c.to(gl.float32) * to_final[None, :]).to(gl.bfloat16), left)
        b = stage * TILES
        state0 = warpgroup_mma(scaled, b_buffer.index(b), state0, is_async=True)
        state1 = warpgroup_mma(scaled, b_buffer.index(b + 1), state1, is_async=True)
        if TILES > 2:
            state2 = warpgroup_mma(scaled, b_buffer.index(b + 2), state2, is_async=True)
            state3 = warpgroup_mma(scaled, b_buffer.index(b + 3), state3, is_async=True)
            state0, state1, state2, state3, scaled = warpgroup_mma_wait(
                0, deps=(state0, state1, state2, state3, scaled)
            )
        else:
            state0, state1, scaled = warpgroup_mma_wait(0, deps=(state0, state1, scaled))
        fence_async_shared()
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
    rows = row_column + gl.arange(0, WIDE, layout=gl.SliceLayout(0, state_layout))
    columns = column + HALF * WIDE + gl.arange(0, WIDE, layout=gl.SliceLayout(1, state_layout))
    offset = columns[:, None] + rows[None, :] * C
    gl.store(sums_ptr + offset, state0)
    gl.store(sums_ptr + offset + WIDE * C, state1)
    if TILES > 2:
        gl.store(sums_ptr + offset + 2 * WIDE * C, state2)
        gl.store(sums_ptr + offset + 3 * WIDE * C, state3)


@gluon.jit(
    do_not_specialize=["segments", "heads", "normaliser_rows"],
    do_not_specialize_on_alignment=["log_decay_ptr"],
)
def segment_sums_kernel(
    b_ptr, c_ptr, sums_ptr, log_decay_ptr, normaliser_ptr, documents_ptr, ranges_ptr,
    b_batch, b_time, b_head, c_batch, c_time, c_head,
    time, segment, segments, heads, normaliser_rows,
    B: gl.constexpr, C: gl.constexpr, BLOCK_B: gl.constexpr, CHUNK: gl.constexpr,
    REVERSE: gl.constexpr, SKIP: gl.constexpr, NORMALISE: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """First level: what each segment alone adds to (BLOCK_B, 128) of the state.

    See `triton.segment_sums_kernel`, and for what is taken `stream_kernel`.
    """
    COLUMNS: gl.constexpr = C // (2 * WIDE)
    tile = gl.program_id(0)
    row = gl.program_id(1)
    segment_id = gl.program_id(2) + SKIP
    batch = (row // heads).to(gl.int64)
    head = (row % heads).to(gl.int64)
    log2_decay = log2_decay_of(log_decay_ptr, head)
    start = segment_id * segment
    stop = gl.minimum(start + segment, time)
    row_column = (tile // COLUMNS) * BLOCK_B
    column = (tile % COLUMNS) * 2 * WIDE
    normaliser_row = normaliser_ptr + (row % normaliser_rows).to(gl.int64) * time
    sums = sums_ptr + (row.to(gl.int64) * segments + segment_id) * B * C

    TILES: gl.constexpr = BLOCK_B // WIDE
    box: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    b_desc = slices_of(b_ptr, batch, head, b_batch, b_time, b_head, time, B, CHUNK)
    c_desc = slices_of(c_ptr, batch, head, c_batch, c_time, c_head, time, C, CHUNK)
    b_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES * TILES, CHUNK, WIDE], box)
    c_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, CHUNK, WIDE], box)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_copy_summands, (
                b_desc, c_desc, b_buffer, c_buffer, full, empty, start, stop, row_column, column,
                CHUNK, BLOCK_B, REVERSE, STAGES,
            )),
            (_add_up, (
                b_buffer, c_buffer, full, empty, sums, normaliser_row, log2_decay, start, stop,
                row_column, column, 0, C, CHUNK, BLOCK_B, REVERSE, NORMALISE, STAGES,
            )),
            (_add_up, (
                b_buffer, c_buffer, full, empty, sums, normaliser_row, log2_decay, start, stop,
                row_column, column, 1, C, CHUNK, BLOCK_B, REVERSE, NORMALISE, STAGES,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip
