"""All gradients of retention in one scan, for Hopper, by groups of warps with a task each.

`backward_kernel` computes what its namesake in `triton` does, and takes the same
parameters. There eleven products a chunk wait for each other. Of these only one leads from a chunk
to the next, that of the state, and each of the three gradients needs four at most. So here parts
run side by side and meet at barriers in shared memory:

- one warp issues the copies, up to STAGES chunks ahead;
- three groups of four warps make dq, dk and dv, a (CHUNK, 64) tile each, whose rows are tokens.
  That of dv carries D, the gradient of the state, in registers, and hands it to that of dk.

A chunk's weights never leave their group: they come out of one product in the registers from which
the next takes its left factor. So dq and dk make the same weights, each in the orientation that it
needs; only D goes through shared memory.

The forward kept S before every second chunk. The group of dq looks from the second chunk of a pair
at the first through that chunk's own weights instead of making the state between:

    dq_n = r_n (gamma^(C+i+1) do_n S^T + sum_m gamma^(C+i-j) (do_n . v_m) k_m + ...)

with m at place j in the first chunk, n at place i in the second; the rest is as in any chunk.

Gluon is Triton's lower level and has no interpreter: tests on a GPU hold this kernel to the same
recurrence as Triton's kernel.
"""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from archzoo.kernels.retention.gluon import (
    WIDE,
    async_load,
    async_store,
    barrier,
    log2_decay_of,
    power,
    slices_of,
)

# How a group's four warps hold 64 x 64 numbers: as products give them, and as a left factor.
TILE: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT: gl.constexpr = gl.constexpr(gl.DotOperandLayout(0, TILE.value, 2))


@gluon.jit
def _chunk(turn, turns, start, stop, CHUNK: gl.constexpr):
    """First token and size of the chunk of the loop's turn, backward in time.

    Chunks come in pairs; the very last one of a row may extend past its end. TMA fills it
    with zeros and writes nothing of it, and its size is 0.
    """
    begin = start + (turns - 1 - turn) * CHUNK
    return begin, gl.maximum(gl.minimum(CHUNK, stop - begin), 0)


@gluon.jit
def _store(desc, buffer, begin, result):
    """Hands a result to TMA, once it has read the one before."""
    tma.store_wait(0)
    barrier()
    buffer.store(result.to(gl.bfloat16))
    fence_async_shared()
    barrier()
    async_store(desc, [begin, 0], buffer)


@gluon.jit
def _copy_in(
    q_desc, k_desc, v_desc, do_desc, kept_desc, q_buffer, k_buffer, v_buffer, do_buffer,
    kept_buffer,
    full, empty, kept_full, kept_empty, start, stop, CHUNK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    pairs = gl.cdiv(stop - start, 2 * CHUNK)
    for pair in range(pairs):
        slot = pair % 2
        mbarrier.wait(kept_empty.index(slot), (pair // 2 & 1) ^ 1)
        mbarrier.expect(kept_full.index(slot), 2 * WIDE * WIDE)
        at = (start // (2 * CHUNK) + pairs - 1 - pair) * WIDE
        async_load(kept_desc, [at, 0], kept_full.index(slot), kept_buffer.index(slot))
        for half in gl.static_range(2):
            turn = 2 * pair + half
            begin, _ = _chunk(turn, 2 * pairs, start, stop, CHUNK)
            stage = turn % STAGES
            mbarrier.wait(empty.index(stage), (turn // STAGES & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, 8 * CHUNK * WIDE)
            async_load(v_desc, [begin, 0], ready, v_buffer.index(stage))
            async_load(do_desc, [begin, 0], ready, do_buffer.index(stage))
            async_load(k_desc, [begin, 0], ready, k_buffer.index(stage))
            async_load(q_desc, [begin, 0], ready, q_buffer.index(stage))


@gluon.jit
def _row_normaliser(normaliser_row, begin, size, index, NORMALISE: gl.constexpr):
    """1 / sqrt(s_n) of a chunk's tokens; 1 without NORMALISE."""
    if NORMALISE:
        return gl.load(normaliser_row + begin + index, mask=index < size, other=0.0)
    else:
        return gl.full(index.shape, 1.0, gl.float32, index.type.layout)


@gluon.jit
def _queries(
    dq_desc, k_buffer, v_buffer, do_buffer, kept_buffer, out_buffer, full, empty, kept_full,
    kept_empty,
    normaliser_row, log2_decay, start, stop,
    CHUNK: gl.constexpr, NORMALISE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The group of dq: rows are n, columns of the weights m."""
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, TILE))
    column = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, TILE))
    gap = row[:, None] - column[None, :]
    decay = gl.where(gap >= 0, power(log2_decay, gap), 0.0)
    from_initial = power(log2_decay, row + 1)
    remember = power(log2_decay, CHUNK - 1 - column)
    across = gl.exp2(CHUNK * log2_decay)
    zeros = gl.zeros([CHUNK, CHUNK], gl.float32, TILE)
    pairs = gl.cdiv(stop - start, 2 * CHUNK)
    for pair in range(pairs):
        begin, size = _chunk(2 * pair, 2 * pairs, start, stop, CHUNK)
        normaliser = _row_normaliser(normaliser_row, begin, size, row, NORMALISE)
        before = begin - CHUNK
        size = gl.minimum(CHUNK, stop - before)
        normaliser_before = _row_normaliser(normaliser_row, before, size, row, NORMALISE)
        slot = pair % 2
        second = 2 * pair % STAGES
        first = (2 * pair + 1) % STAGES
        kept = kept_buffer.index(slot)

        # The pair's second chunk: itself, the first one, and what was before both.
        mbarrier.wait(full.index(second), 2 * pair // STAGES & 1)
        do = do_buffer.index(second)
        own = warpgroup_mma(
            do, v_buffer.index(second).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(kept_full.index(slot), pair // 2 & 1)
        out = warpgroup_mma(do, kept, zeros, use_acc=False, is_async=True)
        mbarrier.wait(full.index(first), (2 * pair + 1) // STAGES & 1)
        other = warpgroup_mma(
            do, v_buffer.index(first).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        own = warpgroup_mma_wait(2, deps=(own,))
        weights = gl.convert_layout((own * decay).to(gl.bfloat16), LEFT)
        out, other = warpgroup_mma_wait(0, deps=(out, other))
        out *= (from_initial * across)[:, None]
        out = warpgroup_mma(weights, k_buffer.index(second), out, is_async=True)
        other = other * from_initial[:, None] * remember[None, :]
        others = gl.convert_layout(other.to(gl.bfloat16), LEFT)
        out = warpgroup_mma(others, k_buffer.index(first), out, is_async=True)
        out, weights, others = warpgroup_mma_wait(0, deps=(out, weights, others))
        barrier()
        mbarrier.arrive(empty.index(second), count=1)
        _store(dq_desc, out_buffer, begin, out * normaliser[:, None])

        # The first.
        do = do_buffer.index(first)
        own = warpgroup_mma(
            do, v_buffer.index(first).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        out = warpgroup_mma(do, kept, zeros, use_acc=False, is_async=True)
        own = warpgroup_mma_wait(1, deps=(own,))
        weights = gl.convert_layout((own * decay).to(gl.bfloat16), LEFT)
        out = warpgroup_mma_wait(0, deps=(out,))
        out *= from_initial[:, None]
        out = warpgroup_mma(weights, k_buffer.index(first), out, is_async=True)
        out, weights = warpgroup_mma_wait(0, deps=(out, weights))
        barrier()
        mbarrier.arrive(empty.index(first), count=1)
        mbarrier.arrive(kept_empty.index(slot), count=1)
        _store(dq_desc, out_buffer, before, out * normaliser_before[:, None])
    tma.store_wait(0)


@gluon.jit
def _keys(
    dk_desc, q_buffer, v_buffer, do_buffer, state_buffer, out_buffer, full, empty, given, taken,
    normaliser_row, log2_decay, start, stop,
    CHUNK: gl.constexpr, NORMALISE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The group of dk: rows are m, columns of the weights n."""
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, TILE))
    column = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, TILE))
    gap = column[None, :] - row[:, None]
    decay = gl.where(gap >= 0, power(log2_decay, gap), 0.0)
    zeros = gl.zeros([CHUNK, CHUNK], gl.float32, TILE)
    turns = 2 * gl.cdiv(stop - start, 2 * CHUNK)
    for turn in range(turns):
        begin, size = _chunk(turn, turns, start, stop, CHUNK)
        normaliser = _row_normaliser(normaliser_row, begin, size, column, NORMALISE)
        stage, slot = turn % STAGES, turn % 2
        mbarrier.wait(full.index(stage), turn // STAGES & 1)
        v = v_buffer.index(stage)
        own = warpgroup_mma(
            v, do_buffer.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(given.index(slot), turn // 2 & 1)
        out = warpgroup_mma(v, state_buffer.index(slot), zeros, use_acc=False, is_async=True)
        own = warpgroup_mma_wait(1, deps=(own,))
        own = own * decay * normaliser[None, :]
        weights = gl.convert_layout(own.to(gl.bfloat16), LEFT)
        out = warpgroup_mma_wait(0, deps=(out,))
        out *= power(log2_decay, size - 1 - row)[:, None]
        out = warpgroup_mma(weights, q_buffer.index(stage), out, is_async=True)
        out, weights = warpgroup_mma_wait(0, deps=(out, weights))
        barrier()
        mbarrier.arrive(taken.index(slot), count=1)
        mbarrier.arrive(empty.index(stage), count=1)
        _store(dk_desc, out_buffer, begin, out)
    tma.store_wait(0)


@gluon.jit
def _values(
    dv_desc, q_buffer, k_buffer, do_buffer, state_buffer, out_buffer, full, empty, given, taken,
    initial_ptr, final_ptr, normaliser_row, log2_decay, segment, sums_before, start, stop,
    CHUNK: gl.constexpr, NORMALISE: gl.constexpr, HAS_INITIAL: gl.constexpr, JOIN: gl.constexpr,
    HAS_FINAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The group of dv, rows m and columns of the weights n; it carries D^T, (dv, dk)."""
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, TILE))
    column = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, TILE))
    gap = column[None, :] - row[:, None]
    decay = gl.where(gap >= 0, power(log2_decay, gap), 0.0)
    to_final = power(log2_decay, column + 1)
    zeros = gl.zeros([CHUNK, CHUNK], gl.float32, TILE)
    offset = row[:, None] + column[None, :] * WIDE
    if HAS_INITIAL:
        state = gl.load(initial_ptr + offset)
    else:
        state = gl.zeros([WIDE, WIDE], gl.float32, TILE)
    if JOIN:
        # What the segments scanned before add, see `triton._initial_state`.
        across = gl.exp2((segment // JOIN).to(gl.float32) * log2_decay)
        for turn in range(sums_before):
            sums = initial_ptr + (sums_before - turn) * (WIDE * WIDE)
            state = state * across + gl.load(sums + offset)
    turns = 2 * gl.cdiv(stop - start, 2 * CHUNK)
    for turn in range(turns):
        begin, size = _chunk(turn, turns, start, stop, CHUNK)
        normaliser = _row_normaliser(normaliser_row, begin, size, column, NORMALISE)
        stage, slot = turn % STAGES, turn % 2
        mbarrier.wait(taken.index(slot), (turn // 2 & 1) ^ 1)
        state_buffer.index(slot).store(state.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        mbarrier.arrive(given.index(slot), count=1)
        mbarrier.wait(full.index(stage), turn // STAGES & 1)
        k, q = k_buffer.index(stage), q_buffer.index(stage)
        own = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        out = warpgroup_mma(
            k, state_buffer.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        own = warpgroup_mma_wait(1, deps=(own,))
        own = own * decay * normaliser[None, :]
        weights = gl.convert_layout(own.to(gl.bfloat16), LEFT)
        out = warpgroup_mma_wait(0, deps=(out,))
        out *= power(log2_decay, size - 1 - row)[:, None]
        out = warpgroup_mma(weights, do_buffer.index(stage), out, is_async=True)
        # Meanwhile D before the chunk.
        do = do_buffer.index(stage).permute((1, 0)).load(TILE)
        scaled = (do.to(gl.float32) * (to_final * normaliser)[None, :]).to(gl.bfloat16)
        scaled = gl.convert_layout(scaled, LEFT)
        state *= gl.exp2(size.to(gl.float32) * log2_decay)
        state = warpgroup_mma(scaled, q, state, is_async=True)
        out, state, weights, scaled = warpgroup_mma_wait(0, deps=(out, state, weights, scaled))
        fence_async_shared()
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        _store(dv_desc, out_buffer, begin, out)
    if HAS_FINAL:
        gl.store(final_ptr + offset, state)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["segments", "heads", "pairs", "normaliser_rows"],
    do_not_specialize_on_alignment=["log_decay_ptr"],
)
def backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, kept_ptr, log_decay_ptr, normaliser_ptr,
    documents_ptr, ranges_ptr, initial_ptr, final_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    do_batch, do_time, do_head, dq_batch, dq_time, dq_head, dk_batch, dk_time, dk_head,
    dv_batch, dv_time, dv_head,
    time, segment, segments, heads, pairs, normaliser_rows,
    CHUNK: gl.constexpr, NORMALISE: gl.constexpr, HAS_INITIAL: gl.constexpr, JOIN: gl.constexpr,
    HAS_FINAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq, dk and dv of a segment; see `triton.backward_kernel`.

    Rows are whole, of one document, bfloat16; dk = dv = CHUNK = 64, and a segment is a multiple of
    two chunks.
    """
    program = gl.program_id(0)
    segment_id = gl.program_id(1)
    program_wide = program.to(gl.int64)
    batch = (program // heads).to(gl.int64)
    head = (program % heads).to(gl.int64)
    log2_decay = log2_decay_of(log_decay_ptr, head)
    start = segment_id * segment
    stop = gl.minimum(start + segment, time)
    normaliser_row = normaliser_ptr + (program % normaliser_rows).to(gl.int64) * time
    # A state a segment; where they are joined here, JOIN sums, of which its last is meant.
    SUMS: gl.constexpr = JOIN if JOIN else 1
    own = (program_wide * segments + segment_id) * SUMS + SUMS - 1
    initial = initial_ptr + own * WIDE * WIDE
    sums_before = (segments - 1 - segment_id) * SUMS
    final = final_ptr + program_wide * WIDE * WIDE

    box: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_desc = slices_of(q_ptr, batch, head, q_batch, q_time, q_head, time, WIDE, CHUNK)
    k_desc = slices_of(k_ptr, batch, head, k_batch, k_time, k_head, time, WIDE, CHUNK)
    v_desc = slices_of(v_ptr, batch, head, v_batch, v_time, v_head, time, WIDE, CHUNK)
    do_desc = slices_of(do_ptr, batch, head, do_batch, do_time, do_head, time, WIDE, CHUNK)
    dq_desc = slices_of(dq_ptr, batch, head, dq_batch, dq_time, dq_head, time, WIDE, CHUNK)
    dk_desc = slices_of(dk_ptr, batch, head, dk_batch, dk_time, dk_head, time, WIDE, CHUNK)
    dv_desc = slices_of(dv_ptr, batch, head, dv_batch, dv_time, dv_head, time, WIDE, CHUNK)
    kept_desc = tma.make_tensor_descriptor(
        kept_ptr + program_wide * pairs * WIDE * WIDE,
        [pairs * WIDE, WIDE], [WIDE, 1], [WIDE, WIDE], box,
    )  # fmt: skip
    q_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES, CHUNK, WIDE], box)
    k_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES, CHUNK, WIDE], box)
    v_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES, CHUNK, WIDE], box)
    do_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES, CHUNK, WIDE], box)
    kept_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, WIDE, WIDE], box)
    state_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, WIDE, WIDE], box)
    out_buffer = gl.allocate_shared_memory(gl.bfloat16, [3, CHUNK, WIDE], box)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kept_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kept_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=3)
    for i in gl.static_range(2):
        mbarrier.init(kept_full.index(i), count=1)
        mbarrier.init(kept_empty.index(i), count=1)
        mbarrier.init(given.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_copy_in, (
                q_desc, k_desc, v_desc, do_desc, kept_desc, q_buffer, k_buffer, v_buffer, do_buffer,
                kept_buffer, full, empty, kept_full, kept_empty, start, stop, CHUNK, STAGES,
            )),
            (_queries, (
                dq_desc, k_buffer, v_buffer, do_buffer, kept_buffer, out_buffer.index(0), full,
                empty,
                kept_full, kept_empty, normaliser_row, log2_decay, start, stop, CHUNK, NORMALISE,
                STAGES,
            )),
            (_keys, (
                dk_desc, q_buffer, v_buffer, do_buffer, state_buffer, out_buffer.index(1), full,
                empty,
                given, taken, normaliser_row, log2_decay, start, stop, CHUNK, NORMALISE, STAGES,
            )),
            (_values, (
                dv_desc, q_buffer, k_buffer, do_buffer, state_buffer, out_buffer.index(2), full,
                empty,
                given, taken, initial, final, normaliser_row, log2_decay, segment,
                sums_before, start, stop, CHUNK, NORMALISE, HAS_INITIAL and not JOIN, JOIN,
                HAS_FINAL, STAGES,
            )),
        ],
        [4, 4, 4],
        [168, 136, 176],
    )  # fmt: skip
