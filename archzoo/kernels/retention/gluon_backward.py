"""All gradients of retention in one walk, for Hopper, by groups of warps with a task each.

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
reference as its twin.
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

from archzoo.kernels.retention.gluon import WIDE, log2_decay_of, power, slices_of

# How a group's four warps hold 64 x 64 numbers: as products give them, and as a left factor.
TILE: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT: gl.constexpr = gl.constexpr(gl.DotOperandLayout(0, TILE.value, 2))


@gluon.jit
def _walk(walked, walk, start, stop, CHUNK: gl.constexpr):
    """First token and size of the chunk that is walked as number `walked`, backward in time.

    Chunks are walked in pairs; the very last one of a row may lie beyond its end. The copy engine
    fills it with zeros and writes nothing of it, and its size is 0.
    """
    begin = start + (walk - 1 - walked) * CHUNK
    return begin, gl.maximum(gl.minimum(CHUNK, stop - begin), 0)


@gluon.jit
def _store(desc, room, begin, result):
    """Hands a result to the copy engine, once it has read the one before."""
    tma.store_wait(0)
    gl.thread_barrier()
    room.store(result.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(desc, [begin, 0], room)


@gluon.jit
def _copy_in(
    q_desc, k_desc, v_desc, do_desc, kept_desc, q_room, k_room, v_room, do_room, kept_room,
    full, empty, kept_full, kept_empty, start, stop, CHUNK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    pairs = gl.cdiv(stop - start, 2 * CHUNK)
    for pair in range(pairs):
        slot = pair % 2
        mbarrier.wait(kept_empty.index(slot), (pair // 2 & 1) ^ 1)
        mbarrier.expect(kept_full.index(slot), 2 * WIDE * WIDE)
        at = (start // (2 * CHUNK) + pairs - 1 - pair) * WIDE
        tma.async_copy_global_to_shared(
            kept_desc, [at, 0], kept_full.index(slot), kept_room.index(slot)
        )
        for half in gl.static_range(2):
            walked = 2 * pair + half
            begin, _ = _walk(walked, 2 * pairs, start, stop, CHUNK)
            stage = walked % STAGES
            mbarrier.wait(empty.index(stage), (walked // STAGES & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, 8 * CHUNK * WIDE)
            tma.async_copy_global_to_shared(v_desc, [begin, 0], ready, v_room.index(stage))
            tma.async_copy_global_to_shared(do_desc, [begin, 0], ready, do_room.index(stage))
            tma.async_copy_global_to_shared(k_desc, [begin, 0], ready, k_room.index(stage))
            tma.async_copy_global_to_shared(q_desc, [begin, 0], ready, q_room.index(stage))


@gluon.jit
def _row_normaliser(normaliser_row, begin, size, index, SCALE: gl.constexpr):
    """1 / sqrt(s_n) of a chunk's tokens; 1 without SCALE."""
    if SCALE:
        return gl.load(normaliser_row + begin + index, mask=index < size, other=0.0)
    else:
        return gl.full(index.shape, 1.0, gl.float32, index.type.layout)


@gluon.jit
def _queries(
    dq_desc, k_room, v_room, do_room, kept_room, out_room, full, empty, kept_full, kept_empty,
    normaliser_row, log2_decay, start, stop,
    CHUNK: gl.constexpr, SCALE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The group of dq: rows are n, columns of the weights m."""
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, TILE))
    column = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, TILE))
    gap = row[:, None] - column[None, :]
    decay = gl.where(gap >= 0, power(log2_decay, gap), 0.0)
    arrive = power(log2_decay, row + 1)
    remember = power(log2_decay, CHUNK - 1 - column)
    across = gl.exp2(CHUNK * log2_decay)
    zeros = gl.zeros([CHUNK, CHUNK], gl.float32, TILE)
    pairs = gl.cdiv(stop - start, 2 * CHUNK)
    for pair in range(pairs):
        begin, size = _walk(2 * pair, 2 * pairs, start, stop, CHUNK)
        normaliser = _row_normaliser(normaliser_row, begin, size, row, SCALE)
        before = begin - CHUNK
        size = gl.minimum(CHUNK, stop - before)
        normaliser_before = _row_normaliser(normaliser_row, before, size, row, SCALE)
        slot = pair % 2
        second = 2 * pair % STAGES
        first = (2 * pair + 1) % STAGES
        kept = kept_room.index(slot)

        # The pair's second chunk: itself, the first one, and what was before both.
        mbarrier.wait(full.index(second), 2 * pair // STAGES & 1)
        do = do_room.index(second)
        own = warpgroup_mma(
            do, v_room.index(second).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(kept_full.index(slot), pair // 2 & 1)
        out = warpgroup_mma(do, kept, zeros, use_acc=False, is_async=True)
        mbarrier.wait(full.index(first), (2 * pair + 1) // STAGES & 1)
        other = warpgroup_mma(
            do, v_room.index(first).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        own = warpgroup_mma_wait(2, deps=(own,))
        weights = gl.convert_layout((own * decay).to(gl.bfloat16), LEFT)
        out, other = warpgroup_mma_wait(0, deps=(out, other))
        out *= (arrive * across)[:, None]
        out = warpgroup_mma(weights, k_room.index(second), out, is_async=True)
        other = other * arrive[:, None] * remember[None, :]
        others = gl.convert_layout(other.to(gl.bfloat16), LEFT)
        out = warpgroup_mma(others, k_room.index(first), out, is_async=True)
        out, weights, others = warpgroup_mma_wait(0, deps=(out, weights, others))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(second), count=1)
        _store(dq_desc, out_room, begin, out * normaliser[:, None])

        # The first.
        do = do_room.index(first)
        own = warpgroup_mma(
            do, v_room.index(first).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        out = warpgroup_mma(do, kept, zeros, use_acc=False, is_async=True)
        own = warpgroup_mma_wait(1, deps=(own,))
        weights = gl.convert_layout((own * decay).to(gl.bfloat16), LEFT)
        out = warpgroup_mma_wait(0, deps=(out,))
        out *= arrive[:, None]
        out = warpgroup_mma(weights, k_room.index(first), out, is_async=True)
        out, weights = warpgroup_mma_wait(0, deps=(out, weights))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(first), count=1)
        mbarrier.arrive(kept_empty.index(slot), count=1)
        _store(dq_desc, out_room, before, out * normaliser_before[:, None])
    tma.store_wait(0)


@gluon.jit
def _keys(
    dk_desc, q_room, v_room, do_room, state_room, out_room, full, empty, given, taken,
    normaliser_row, log2_decay, start, stop,
    CHUNK: gl.constexpr, SCALE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The group of dk: rows are m, columns of the weights n."""
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, TILE))
    column = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, TILE))
    gap = column[None, :] - row[:, None]
    decay = gl.where(gap >= 0, power(log2_decay, gap), 0.0)
    zeros = gl.zeros([CHUNK, CHUNK], gl.float32, TILE)
    walk = 2 * gl.cdiv(stop - start, 2 * CHUNK)
    for walked in range(walk):
        begin, size = _walk(walked, walk, start, stop, CHUNK)
        normaliser = _row_normaliser(normaliser_row, begin, size, column, SCALE)
        stage, slot = walked % STAGES, walked % 2
        mbarrier.wait(full.index(stage), walked // STAGES & 1)
        v = v_room.index(stage)
        own = warpgroup_mma(
            v, do_room.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(given.index(slot), walked // 2 & 1)
        out = warpgroup_mma(v, state_room.index(slot), zeros, use_acc=False, is_async=True)
        own = warpgroup_mma_wait(1, deps=(own,))
        own = own * decay * normaliser[None, :]
        weights = gl.convert_layout(own.to(gl.bfloat16), LEFT)
        out = warpgroup_mma_wait(0, deps=(out,))
        out *= power(log2_decay, size - 1 - row)[:, None]
        out = warpgroup_mma(weights, q_room.index(stage), out, is_async=True)
        out, weights = warpgroup_mma_wait(0, deps=(out, weights))
        gl.thread_barrier()
        mbarrier.arrive(taken.index(slot), count=1)
        mbarrier.arrive(empty.index(stage), count=1)
        _store(dk_desc, out_room, begin, out)
    tma.store_wait(0)


@gluon.jit
def _values(
    dv_desc, q_room, k_room, do_room, state_room, out_room, full, empty, given, taken,
    entering_ptr, leaving_ptr, normaliser_row, log2_decay, segment, pieces_before, start, stop,
    CHUNK: gl.constexpr, SCALE: gl.constexpr, HAS_ENTERING: gl.constexpr, JOIN: gl.constexpr,
    HAS_LEAVING: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The group of dv, rows m and columns of the weights n; it carries D^T, (dv, dk)."""
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, TILE))
    column = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, TILE))
    gap = column[None, :] - row[:, None]
    decay = gl.where(gap >= 0, power(log2_decay, gap), 0.0)
    leave = power(log2_decay, column + 1)
    zeros = gl.zeros([CHUNK, CHUNK], gl.float32, TILE)
    offset = row[:, None] + column[None, :] * WIDE
    if HAS_ENTERING:
        state = gl.load(entering_ptr + offset)
    else:
        state = gl.zeros([WIDE, WIDE], gl.float32, TILE)
    if JOIN:
        # What the segments walked before add, see `triton._entering_state`.
        keep = gl.exp2((segment // JOIN).to(gl.float32) * log2_decay)
        for walked in range(pieces_before):
            sums = entering_ptr + (pieces_before - walked) * (WIDE * WIDE)
            state = state * keep + gl.load(sums + offset)
    walk = 2 * gl.cdiv(stop - start, 2 * CHUNK)
    for walked in range(walk):
        begin, size = _walk(walked, walk, start, stop, CHUNK)
        normaliser = _row_normaliser(normaliser_row, begin, size, column, SCALE)
        stage, slot = walked % STAGES, walked % 2
        mbarrier.wait(taken.index(slot), (walked // 2 & 1) ^ 1)
        state_room.index(slot).store(state.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(given.index(slot), count=1)
        mbarrier.wait(full.index(stage), walked // STAGES & 1)
        k, q = k_room.index(stage), q_room.index(stage)
        own = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        out = warpgroup_mma(
            k, state_room.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        own = warpgroup_mma_wait(1, deps=(own,))
        own = own * decay * normaliser[None, :]
        weights = gl.convert_layout(own.to(gl.bfloat16), LEFT)
        out = warpgroup_mma_wait(0, deps=(out,))
        out *= power(log2_decay, size - 1 - row)[:, None]
        out = warpgroup_mma(weights, do_room.index(stage), out, is_async=True)
        # Meanwhile D before the chunk.
        do = do_room.index(stage).permute((1, 0)).load(TILE)
        scaled = (do.to(gl.float32) * (leave * normaliser)[None, :]).to(gl.bfloat16)
        scaled = gl.convert_layout(scaled, LEFT)
        state *= gl.exp2(size.to(gl.float32) * log2_decay)
        state = warpgroup_mma(scaled, q, state, is_async=True)
        out, state, weights, scaled = warpgroup_mma_wait(0, deps=(out, state, weights, scaled))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        _store(dv_desc, out_room, begin, out)
    if HAS_LEAVING:
        gl.store(leaving_ptr + offset, state)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["segments", "heads", "pairs", "normaliser_rows"],
    do_not_specialize_on_alignment=["log_decay_ptr"],
)
def backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, kept_ptr, log_decay_ptr, normaliser_ptr,
    documents_ptr, ranges_ptr, entering_ptr, leaving_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    do_batch, do_time, do_head, dq_batch, dq_time, dq_head, dk_batch, dk_time, dk_head,
    dv_batch, dv_time, dv_head,
    time, segment, segments, heads, pairs, normaliser_rows,
    CHUNK: gl.constexpr, SCALE: gl.constexpr, HAS_ENTERING: gl.constexpr, JOIN: gl.constexpr,
    HAS_LEAVING: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq, dk and dv of a segment; see `triton.backward_kernel`.

    Rows are whole, of one document, bfloat16; dk = dv = CHUNK = 64, and a segment is a multiple of
    two chunks.
    """
    program = gl.program_id(0)
    piece = gl.program_id(1)
    program_wide = program.to(gl.int64)
    batch = (program // heads).to(gl.int64)
    head = (program % heads).to(gl.int64)
    log2_decay = log2_decay_of(log_decay_ptr, head)
    start = piece * segment
    stop = gl.minimum(start + segment, time)
    normaliser_row = normaliser_ptr + (program % normaliser_rows).to(gl.int64) * time
    # A state a segment; where they are joined here, JOIN sums, of which its last is meant.
    PIECES: gl.constexpr = JOIN if JOIN else 1
    own = (program_wide * segments + piece) * PIECES + PIECES - 1
    entering = entering_ptr + own * WIDE * WIDE
    pieces_before = (segments - 1 - piece) * PIECES
    leaving = leaving_ptr + program_wide * WIDE * WIDE

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
    q_room = gl.allocate_shared_memory(gl.bfloat16, [STAGES, CHUNK, WIDE], box)
    k_room = gl.allocate_shared_memory(gl.bfloat16, [STAGES, CHUNK, WIDE], box)
    v_room = gl.allocate_shared_memory(gl.bfloat16, [STAGES, CHUNK, WIDE], box)
    do_room = gl.allocate_shared_memory(gl.bfloat16, [STAGES, CHUNK, WIDE], box)
    kept_room = gl.allocate_shared_memory(gl.bfloat16, [2, WIDE, WIDE], box)
    state_room = gl.allocate_shared_memory(gl.bfloat16, [2, WIDE, WIDE], box)
    out_room = gl.allocate_shared_memory(gl.bfloat16, [3, CHUNK, WIDE], box)
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
                q_desc, k_desc, v_desc, do_desc, kept_desc, q_room, k_room, v_room, do_room,
                kept_room, full, empty, kept_full, kept_empty, start, stop, CHUNK, STAGES,
            )),
            (_queries, (
                dq_desc, k_room, v_room, do_room, kept_room, out_room.index(0), full, empty,
                kept_full, kept_empty, normaliser_row, log2_decay, start, stop, CHUNK, SCALE,
                STAGES,
            )),
            (_keys, (
                dk_desc, q_room, v_room, do_room, state_room, out_room.index(1), full, empty,
                given, taken, normaliser_row, log2_decay, start, stop, CHUNK, SCALE, STAGES,
            )),
            (_values, (
                dv_desc, q_room, k_room, do_room, state_room, out_room.index(2), full, empty,
                given, taken, entering, leaving, normaliser_row, log2_decay, segment,
                pieces_before, start, stop, CHUNK, SCALE, HAS_ENTERING and not JOIN, JOIN,
                HAS_LEAVING, STAGES,
            )),
        ],
        [4, 4, 4],
        [168, 136, 176],
    )  # fmt: skip
