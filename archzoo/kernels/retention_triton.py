"""The Triton side of `archzoo.kernels.retention`: imported only once a kernel is to run.

One observation carries the whole file. Retention's forward and its three gradients are the same
map, fed with other tensors and run in one of the two directions of time:

    out_i = sum_{j <= i} gamma^(i-j) (a_i . b_j) c_j

    | result | a  | b  | c  | direction | state                    |
    |--------|----|----|----|-----------|--------------------------|
    | o      | q  | k  | v  | forward   | S   = sum k^T v  (dk, dv) |
    | dq     | do | v  | k  | forward   | S^T = sum v^T k  (dv, dk) |
    | dk     | v  | do | q  | backward  | D^T = sum do^T q (dv, dk) |
    | dv     | k  | q  | do | backward  | D   = sum q^T do (dk, dv) |

so `_stream` is written once. It walks over time in chunks and holds its tile of the state in
registers from the first chunk to the last: a chunk's state never goes through memory. Only where
there are fewer (batch, head, tile) triples than the chip can run at once is time cut into
segments; `_segment_sums` then adds up each segment by itself and `_join` combines the sums by
powers of gamma, which are known because gamma is one constant per head.

The derivation, the floors and the measurements are in docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(x, y, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """x @ y + accumulator in float32. The interpreter multiplies bfloat16 wrongly: upcast there."""
    if UPCAST:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, accumulator, input_precision=PRECISION)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, accurate near 0 (Triton has no expm1 that its interpreter knows)."""
    series = 1.0 + x * (1.0 / 6.0) * (1.0 + x * (1.0 / 7.0))
    series = 1.0 + x * (1.0 / 2.0) * (
        1.0 + x * (1.0 / 3.0) * (1.0 + x * (1.0 / 4.0) * (1.0 + x * (1.0 / 5.0) * series))
    )
    return tl.where(x > -0.35, x * series, tl.exp2(x * LOG2_E) - 1.0)


@triton.jit
def _normaliser(position, log_decay):
    """1 / sqrt(s_n) with s_n = sum_{j <= n} gamma^j, n = position."""
    count = position.to(tl.float32) + 1.0
    one = log_decay == 0.0
    denominator = tl.where(one, -1.0, _expm1(log_decay))
    total = tl.where(one, count, _expm1(count * log_decay) / denominator)
    return 1.0 / tl.sqrt(total)


@triton.jit
def _load_log_decay(log_decay_ptr, head):
    """log gamma of one head. Far under any float32 it stays finite, so that 0 * it is 0."""
    return tl.maximum(tl.load(log_decay_ptr + head).to(tl.float32), -1.0e4)


@triton.jit
def _row_range(ranges_ptr, batch, time, HAS_RANGES: tl.constexpr):
    """First valid token of a row and the number of valid tokens."""
    if HAS_RANGES:
        first = tl.load(ranges_ptr + 2 * batch)
        length = tl.load(ranges_ptr + 2 * batch + 1) - first
    else:
        first = 0
        length = time
    return first, length


@triton.jit
def _inside(live, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Mask of a tile; no comparison of columns where the width needs none."""
    if WIDTH % BLOCK == 0:
        return live[:, None]
    return live[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def _chunk_facts(
    positions_row, documents_row, origin, first, length, start, log_decay, before,
    CHUNK: tl.constexpr, REVERSE: tl.constexpr, SCALE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """What a chunk needs to know of its tokens besides their vectors.

    Returns the normaliser (CHUNK,), the documents (CHUNK,) and the document of the last token.
    `origin` is the time of the chunk's first token in walking order.
    """
    index = tl.arange(0, CHUNK)
    live = start + index < length
    if REVERSE:
        time_index = origin - index
    else:
        time_index = origin + index
    if SCALE:
        if HAS_POSITIONS:
            position = tl.load(positions_row + time_index, mask=live, other=0)
        else:
            position = tl.where(live, time_index - first, 0)
        normaliser = _normaliser(position, log_decay)
    else:
        normaliser = tl.full((CHUNK,), 1.0, tl.float32)
    if HAS_DOCUMENTS:
        document = tl.load(documents_row + time_index, mask=live, other=-2)
        last = tl.minimum(CHUNK, length - start) - 1
        if REVERSE:
            document_last = tl.load(documents_row + origin - last)
        else:
            document_last = tl.load(documents_row + origin + last)
    else:
        document = index * 0
        document_last = before
    return normaliser, document, document_last


@triton.jit
def _stream(
    a_ptr, b_ptr, c_ptr, out_ptr, scores_ptr, a_stride, b_stride, c_stride, out_stride,
    positions_row, documents_row, entering_ptr, leaving_ptr, state_stride_a, state_stride_c,
    leaving_stride_a, leaving_stride_c,
    first, length, start, stop, tile, log_decay,
    A: tl.constexpr, C: tl.constexpr, BLOCK_A: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, REVERSE: tl.constexpr, SCALE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_ENTERING: tl.constexpr, HAS_LEAVING: tl.constexpr, HAS_SCORES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of columns of out_i = sum_{j <= i} gamma^(i-j) (a_i . b_j) c_j over [start, stop).

    Indices count in walking order: token i is at time first + i, or, with REVERSE, at
    first + length - 1 - i. With REVERSE the normaliser belongs to b and c (they are q and do),
    else to the output. The state enters decayed by gamma^(i+1) (forward: it is the sum *before*
    the first token) or gamma^i (reverse: the gradient of the sum *after* it).
    """
    dtype = c_ptr.dtype.element_ty
    index = tl.arange(0, CHUNK)
    columns = tile * TILE + tl.arange(0, TILE)
    log2_decay = log_decay * LOG2_E
    shift: tl.constexpr = 0 if REVERSE else 1

    # gamma^(i-j) below and on the diagonal; the same for all chunks, so it lives in registers.
    if not HAS_SCORES:
        gap = index[:, None] - index[None, :]
        decay = tl.where(gap >= 0, tl.exp2(tl.maximum(gap, 0).to(tl.float32) * log2_decay), 0.0)
    arrive = tl.exp2((index + shift).to(tl.float32) * log2_decay)

    splits: tl.constexpr = (A + BLOCK_A - 1) // BLOCK_A
    for split in tl.range(0, splits, num_stages=1):
        rows = split * BLOCK_A + tl.arange(0, BLOCK_A)
        rows_inside = rows < A
        columns_inside = columns < C
        if HAS_ENTERING:
            state = tl.load(
                entering_ptr + rows[:, None] * state_stride_a + columns[None, :] * state_stride_c,
                mask=rows_inside[:, None] & columns_inside[None, :],
                other=0.0,
            ).to(tl.float32)
        else:
            state = tl.zeros((BLOCK_A, TILE), tl.float32)

        before = 0
        if HAS_DOCUMENTS:
            # The document that the entering state belongs to; a row's own state is of document 0,
            # and the gradient of the row's last state of its last token's document.
            walked = tl.minimum(start, length)
            if REVERSE:
                before_time = tl.where(walked > 0, first + length - walked, first + length - 1)
                before = tl.load(documents_row + tl.maximum(before_time, 0))
            else:
                before = tl.load(documents_row + tl.maximum(first + walked - 1, 0))
                before = tl.where(walked > 0, before, 0)

        for chunk_start in range(start, stop, CHUNK):
            if REVERSE:
                origin = first + length - 1 - chunk_start
                step = -1
            else:
                origin = first + chunk_start
                step = 1
            origin_wide = origin.to(tl.int64)
            live = chunk_start + index < stop
            offset = (index * step)[:, None]
            a = tl.load(
                a_ptr + origin_wide * a_stride + offset * a_stride + rows[None, :],
                mask=_inside(live, rows, A, BLOCK_A), other=0.0,
            )  # fmt: skip
            b = tl.load(
                b_ptr + origin_wide * b_stride + offset * b_stride + rows[None, :],
                mask=_inside(live, rows, A, BLOCK_A), other=0.0,
            )  # fmt: skip
            c = tl.load(
                c_ptr + origin_wide * c_stride + offset * c_stride + columns[None, :],
                mask=_inside(live, columns, C, TILE), other=0.0,
            )  # fmt: skip
            normaliser, document, document_last = _chunk_facts(
                positions_row, documents_row, origin, first, length, chunk_start, log_decay,
                before, CHUNK, REVERSE, SCALE, HAS_POSITIONS, HAS_DOCUMENTS,
            )  # fmt: skip

            # The past: what the state holds for each token.
            past = _dot(a, state.to(dtype), None, PRECISION, UPCAST)
            if HAS_DOCUMENTS:
                past *= tl.where(document == before, arrive, 0.0)[:, None]
            else:
                past *= arrive[:, None]

            # The chunk itself.
            if HAS_SCORES:
                # Computed once for all tiles by `_scores`; only one split may add them.
                weights = tl.load(
                    scores_ptr + (chunk_start.to(tl.int64) * CHUNK)
                    + index[:, None] * CHUNK + index[None, :],
                    mask=(live & (split == 0))[:, None] & live[None, :], other=0.0,
                )  # fmt: skip
            else:
                weights = _dot(a, tl.trans(b), None, PRECISION, UPCAST) * decay
                if HAS_DOCUMENTS:
                    weights = tl.where(document[:, None] == document[None, :], weights, 0.0)
                if REVERSE and SCALE:
                    weights *= normaliser[None, :]
                weights = weights.to(dtype)
            out = _dot(weights, c, None, PRECISION, UPCAST) + past
            if SCALE and not REVERSE:
                out *= normaliser[:, None]

            out_pointers = (
                out_ptr + origin_wide * out_stride + offset * out_stride + columns[None, :]
            )
            out_inside = _inside(live, columns, C, TILE)
            if splits > 1:
                if split > 0:
                    out += tl.load(out_pointers, mask=out_inside, other=0.0).to(tl.float32)
            tl.store(out_pointers, out.to(out_ptr.dtype.element_ty), mask=out_inside)

            # The state after the chunk.
            size = tl.minimum(CHUNK, stop - chunk_start)
            leave = tl.exp2(tl.maximum(size - shift - index, 0).to(tl.float32) * log2_decay)
            if REVERSE and SCALE:
                leave *= normaliser
            keep = tl.exp2(size.to(tl.float32) * log2_decay)
            if HAS_DOCUMENTS:
                leave = tl.where(document == document_last, leave, 0.0)
                keep = tl.where(document_last == before, keep, 0.0)
                before = document_last
            c = (c.to(tl.float32) * leave[:, None]).to(dtype)
            state = _dot(tl.trans(b), c, state * keep, PRECISION, UPCAST)

        if HAS_LEAVING:
            tl.store(
                leaving_ptr
                + rows[:, None] * leaving_stride_a
                + columns[None, :] * leaving_stride_c,
                state,
                mask=rows_inside[:, None] & columns_inside[None, :],
            )
        if splits > 1:
            # The next split adds to what other threads of this program have just stored.
            tl.debug_barrier()


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, scores_ptr, log_decay_ptr, positions_ptr, documents_ptr,
    ranges_ptr, entering_ptr, leaving_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    o_batch, o_time, o_head,
    time, segment, segments, heads, chunks,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_A: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, SCALE: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_RANGES: tl.constexpr, HAS_ENTERING: tl.constexpr,
    HAS_LEAVING: tl.constexpr, HAS_SCORES: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """o for one (tile of dv, batch and head, segment)."""
    tile = tl.program_id(0)
    row = tl.program_id(1)
    piece = tl.program_id(2)
    batch = (row // heads).to(tl.int64)
    head = row % heads
    log_decay = _load_log_decay(log_decay_ptr, head)
    first, length = _row_range(ranges_ptr, batch, time, HAS_RANGES)
    start = piece * segment
    stop = tl.minimum(start + segment, length)
    state_offset = (row.to(tl.int64) * segments + piece) * DK * DV
    _stream(
        q_ptr + batch * q_batch + head * q_head,
        k_ptr + batch * k_batch + head * k_head,
        v_ptr + batch * v_batch + head * v_head,
        o_ptr + batch * o_batch + head * o_head,
        scores_ptr + row.to(tl.int64) * chunks * (CHUNK * CHUNK),
        q_time, k_time, v_time, o_time,
        positions_ptr + batch * time, documents_ptr + batch * time,
        entering_ptr + state_offset, leaving_ptr + row.to(tl.int64) * DK * DV,
        DV, 1, DV, 1,
        first, length, start, stop, tile, log_decay,
        DK, DV, BLOCK_A, TILE, CHUNK, False, SCALE, HAS_POSITIONS, HAS_DOCUMENTS,
        HAS_ENTERING, HAS_LEAVING, HAS_SCORES, PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, scores_ptr, log_decay_ptr,
    positions_ptr, documents_ptr, ranges_ptr, entering_ptr, arriving_ptr, leaving_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    do_batch, do_time, do_head, dq_batch, dq_time, dq_head, dv_batch, dv_time, dv_head,
    time, segment, segments, heads, chunks, scores_role,
    DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_A_K: tl.constexpr, TILE_K: tl.constexpr, BLOCK_A_V: tl.constexpr, TILE_V: tl.constexpr,
    CHUNK: tl.constexpr, SCALE: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_RANGES: tl.constexpr, HAS_ENTERING: tl.constexpr,
    HAS_ARRIVING: tl.constexpr, HAS_LEAVING: tl.constexpr, HAS_SCORES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv and dq in one launch: programs that read the same tokens sit beside each other.

    `entering` holds S before each segment, `arriving` the gradient of S after it (segments
    counted from the end). TILE_K and BLOCK_A_K belong to the results as wide as k (dk, dq),
    TILE_V and BLOCK_A_V to dv.
    """
    tiles_k: tl.constexpr = (DK + TILE_K - 1) // TILE_K
    tiles_v: tl.constexpr = (DV + TILE_V - 1) // TILE_V
    tile = tl.program_id(0)
    row = tl.program_id(1)
    piece = tl.program_id(2)
    row_wide = row.to(tl.int64)
    batch = (row // heads).to(tl.int64)
    head = row % heads
    log_decay = _load_log_decay(log_decay_ptr, head)
    first, length = _row_range(ranges_ptr, batch, time, HAS_RANGES)
    start = piece * segment
    stop = tl.minimum(start + segment, length)
    state_offset = (row_wide * segments + piece) * DK * DV
    q = q_ptr + batch * q_batch + head * q_head
    k = k_ptr + batch * k_batch + head * k_head
    v = v_ptr + batch * v_batch + head * v_head
    do = do_ptr + batch * do_batch + head * do_head
    scores = scores_ptr + row_wide * chunks * (CHUNK * CHUNK)
    positions = positions_ptr + batch * time
    documents = documents_ptr + batch * time
    if tile < tiles_k:
        _stream(
            v, do, q, dk_ptr + batch * dq_batch + head * dq_head, scores,
            v_time, do_time, q_time, dq_time, positions, documents,
            arriving_ptr + state_offset, leaving_ptr, 1, DV, 1, DV,
            first, length, start, stop, tile, log_decay,
            DV, DK, BLOCK_A_K, TILE_K, CHUNK, True, SCALE, HAS_POSITIONS, HAS_DOCUMENTS,
            HAS_ARRIVING, False, HAS_SCORES, PRECISION, UPCAST,
        )  # fmt: skip
    elif tile < tiles_k + tiles_v:
        _stream(
            k, q, do, dv_ptr + batch * dv_batch + head * dv_head, scores + scores_role,
            k_time, q_time, do_time, dv_time, positions, documents,
            arriving_ptr + state_offset, leaving_ptr + row_wide * DK * DV, DV, 1, DV, 1,
            first, length, start, stop, tile - tiles_k, log_decay,
            DK, DV, BLOCK_A_V, TILE_V, CHUNK, True, SCALE, HAS_POSITIONS, HAS_DOCUMENTS,
            HAS_ARRIVING, HAS_LEAVING, HAS_SCORES, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        _stream(
            do, v, k, dq_ptr + batch * dq_batch + head * dq_head, scores + 2 * scores_role,
            do_time, v_time, k_time, dq_time, positions, documents,
            entering_ptr + state_offset, leaving_ptr, 1, DV, 1, DV,
            first, length, start, stop, tile - tiles_k - tiles_v, log_decay,
            DV, DK, BLOCK_A_K, TILE_K, CHUNK, False, SCALE, HAS_POSITIONS, HAS_DOCUMENTS,
            HAS_ENTERING, False, HAS_SCORES, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def _scores(
    a_ptr, b_ptr, scores_ptr, a_stride, b_stride, positions_row, documents_row,
    first, length, start, log_decay,
    A: tl.constexpr, BLOCK_A: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
    SCALE: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """gamma^(i-j) (a_i . b_j) of one chunk, once for all the tiles that use it."""
    index = tl.arange(0, CHUNK)
    if REVERSE:
        origin = first + length - 1 - start
        step = -1
    else:
        origin = first + start
        step = 1
    origin_wide = origin.to(tl.int64)
    live = start + index < length
    offset = (index * step)[:, None]
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    for block in range(0, A, BLOCK_A):
        rows = block + tl.arange(0, BLOCK_A)
        inside = _inside(live, rows, A, BLOCK_A)
        a = tl.load(
            a_ptr + origin_wide * a_stride + offset * a_stride + rows[None, :],
            mask=inside, other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + origin_wide * b_stride + offset * b_stride + rows[None, :],
            mask=inside, other=0.0,
        )  # fmt: skip
        weights = _dot(a, tl.trans(b), weights, PRECISION, UPCAST)
    normaliser, document, _ = _chunk_facts(
        positions_row, documents_row, origin, first, length, start, log_decay, 0,
        CHUNK, REVERSE, SCALE, HAS_POSITIONS, HAS_DOCUMENTS,
    )  # fmt: skip
    gap = index[:, None] - index[None, :]
    decay = tl.exp2(tl.maximum(gap, 0).to(tl.float32) * (log_decay * LOG2_E))
    seen = gap >= 0
    if HAS_DOCUMENTS:
        seen = seen & (document[:, None] == document[None, :])
    weights = tl.where(seen, weights * decay, 0.0)
    if REVERSE and SCALE:
        weights *= normaliser[None, :]
    tl.store(
        scores_ptr + index[:, None] * CHUNK + index[None, :],
        weights.to(scores_ptr.dtype.element_ty),
    )


@triton.jit
def scores_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, scores_ptr, log_decay_ptr, positions_ptr, documents_ptr,
    ranges_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    do_batch, do_time, do_head,
    time, heads, chunks, scores_role,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_A: tl.constexpr, CHUNK: tl.constexpr,
    BACKWARD: tl.constexpr, SCALE: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_RANGES: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The chunk's own weights, for the forward (q, k) or the three gradients (dk, dv, dq)."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    batch = (row // heads).to(tl.int64)
    head = row % heads
    log_decay = _load_log_decay(log_decay_ptr, head)
    first, length = _row_range(ranges_ptr, batch, time, HAS_RANGES)
    start = chunk * CHUNK
    if start < length:
        q = q_ptr + batch * q_batch + head * q_head
        k = k_ptr + batch * k_batch + head * k_head
        v = v_ptr + batch * v_batch + head * v_head
        do = do_ptr + batch * do_batch + head * do_head
        positions = positions_ptr + batch * time
        documents = documents_ptr + batch * time
        scores = scores_ptr + (row.to(tl.int64) * chunks + chunk) * (CHUNK * CHUNK)
        if BACKWARD:
            role = tl.program_id(2)
            if role == 0:
                _scores(
                    v, do, scores, v_time, do_time, positions, documents, first, length, start,
                    log_decay, DV, BLOCK_A, CHUNK, True, SCALE, HAS_POSITIONS, HAS_DOCUMENTS,
                    PRECISION, UPCAST,
                )  # fmt: skip
            elif role == 1:
                _scores(
                    k, q, scores + scores_role, k_time, q_time, positions, documents, first,
                    length, start, log_decay, DK, BLOCK_A, CHUNK, True, SCALE, HAS_POSITIONS,
                    HAS_DOCUMENTS, PRECISION, UPCAST,
                )  # fmt: skip
            else:
                _scores(
                    do, v, scores + 2 * scores_role, do_time, v_time, positions, documents,
                    first, length, start, log_decay, DV, BLOCK_A, CHUNK, False, SCALE,
                    HAS_POSITIONS, HAS_DOCUMENTS, PRECISION, UPCAST,
                )  # fmt: skip
        else:
            _scores(
                q, k, scores, q_time, k_time, positions, documents, first, length, start,
                log_decay, DK, BLOCK_A, CHUNK, False, SCALE, HAS_POSITIONS, HAS_DOCUMENTS,
                PRECISION, UPCAST,
            )  # fmt: skip


@triton.jit
def segment_sums_kernel(
    b_ptr, c_ptr, sums_ptr, log_decay_ptr, positions_ptr, documents_ptr, ranges_ptr,
    b_batch, b_time, b_head, c_batch, c_time, c_head,
    time, segment, segments, heads,
    B: tl.constexpr, C: tl.constexpr, BLOCK_B: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, REVERSE: tl.constexpr, SCALE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, HAS_RANGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """First level: the state that each segment alone would leave, sum_j gamma^(L-1-j) b_j^T c_j.

    With REVERSE (b, c are q, do): sum_j gamma^(L-j) r_j b_j^T c_j, see `_stream`.
    """
    tiles_c: tl.constexpr = (C + TILE - 1) // TILE
    tile = tl.program_id(0)
    row = tl.program_id(1)
    piece = tl.program_id(2)
    batch = (row // heads).to(tl.int64)
    head = row % heads
    log_decay = _load_log_decay(log_decay_ptr, head)
    log2_decay = log_decay * LOG2_E
    first, length = _row_range(ranges_ptr, batch, time, HAS_RANGES)
    start = piece * segment
    stop = tl.minimum(start + segment, length)
    shift: tl.constexpr = 0 if REVERSE else 1
    index = tl.arange(0, CHUNK)
    rows = (tile // tiles_c) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = (tile % tiles_c) * TILE + tl.arange(0, TILE)
    b_row = b_ptr + batch * b_batch + head * b_head
    c_row = c_ptr + batch * c_batch + head * c_head
    positions = positions_ptr + batch * time
    documents = documents_ptr + batch * time
    document_last = 0
    if HAS_DOCUMENTS:
        if stop > start:
            if REVERSE:
                document_last = tl.load(documents + (first + length - stop))
            else:
                document_last = tl.load(documents + (first + stop - 1))
    state = tl.zeros((BLOCK_B, TILE), tl.float32)
    for chunk_start in range(start, stop, CHUNK):
        if REVERSE:
            origin = first + length - 1 - chunk_start
            step = -1
        else:
            origin = first + chunk_start
            step = 1
        origin_wide = origin.to(tl.int64)
        live = chunk_start + index < stop
        offset = (index * step)[:, None]
        b = tl.load(
            b_row + origin_wide * b_time + offset * b_time + rows[None, :],
            mask=_inside(live, rows, B, BLOCK_B), other=0.0,
        )  # fmt: skip
        c = tl.load(
            c_row + origin_wide * c_time + offset * c_time + columns[None, :],
            mask=_inside(live, columns, C, TILE), other=0.0,
        )  # fmt: skip
        normaliser, document, _ = _chunk_facts(
            positions, documents, origin, first, length, chunk_start, log_decay, 0,
            CHUNK, REVERSE, SCALE, HAS_POSITIONS, HAS_DOCUMENTS,
        )  # fmt: skip
        size = tl.minimum(CHUNK, stop - chunk_start)
        leave = tl.exp2(tl.maximum(size - shift - index, 0).to(tl.float32) * log2_decay)
        if REVERSE and SCALE:
            leave *= normaliser
        if HAS_DOCUMENTS:
            # Only the segment's last document goes on, so earlier ones need no chain of resets.
            leave = tl.where(document == document_last, leave, 0.0)
        keep = tl.exp2(size.to(tl.float32) * log2_decay)
        c = (c.to(tl.float32) * leave[:, None]).to(c_ptr.dtype.element_ty)
        state = _dot(tl.trans(b), c, state * keep, PRECISION, UPCAST)
    tl.store(
        sums_ptr + (row.to(tl.int64) * segments + piece) * B * C
        + rows[:, None] * C + columns[None, :],
        state,
        mask=(rows < B)[:, None] & (columns < C)[None, :],
    )  # fmt: skip


@triton.jit
def join_kernel(
    sums_ptr, initial_ptr, final_ptr, log_decay_ptr, documents_ptr, ranges_ptr,
    time, segment, segments, heads, size,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_RANGES: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Second level: sums of segments become, in place, the states that enter them.

    E_0 = initial; E_(p+1) = gamma^(L_p) E_p + sums_p; final = E_segments.
    """
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    row = tl.program_id(1)
    batch = (row // heads).to(tl.int64)
    log2_decay = _load_log_decay(log_decay_ptr, row % heads) * LOG2_E
    first, length = _row_range(ranges_ptr, batch, time, HAS_RANGES)
    documents = documents_ptr + batch * time
    if HAS_INITIAL:
        state = tl.load(
            initial_ptr + row.to(tl.int64) * size + element, mask=inside, other=0.0
        ).to(tl.float32)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    before = 0
    if HAS_DOCUMENTS and REVERSE:
        before = tl.load(documents + tl.maximum(first + length - 1, 0))
    for piece in range(0, segments):
        pointers = sums_ptr + (row.to(tl.int64) * segments + piece) * size + element
        sums = tl.load(pointers, mask=inside, other=0.0)
        tl.store(pointers, state, mask=inside)
        start = tl.minimum(piece * segment, length)
        stop = tl.minimum(start + segment, length)
        keep = tl.exp2((stop - start).to(tl.float32) * log2_decay)
        if HAS_DOCUMENTS:
            if stop > start:
                if REVERSE:
                    document_last = tl.load(documents + (first + length - stop))
                else:
                    document_last = tl.load(documents + (first + stop - 1))
                keep = tl.where(document_last == before, keep, 0.0)
                before = document_last
        state = state * keep + sums
    if HAS_FINAL:
        tl.store(final_ptr + row.to(tl.int64) * size + element, state, mask=inside)


@triton.jit
def step_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, state_ptr, log_decay_ptr, positions_ptr, starts_ptr, valid_ptr,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, o_batch, o_head,
    positions_stride, starts_stride, valid_stride, state_batch, state_head, state_row, heads,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One token: S <- gamma S + k^T v in place, o = q S / sqrt(s_n). Reads and writes S once."""
    tile = tl.program_id(0)
    row = tl.program_id(1)
    batch = (row // heads).to(tl.int64)
    head = row % heads
    log_decay = _load_log_decay(log_decay_ptr, head)
    rows = tl.arange(0, BLOCK_K)
    columns = tile * TILE + tl.arange(0, TILE)
    state_pointers = (
        state_ptr + batch * state_batch + head * state_head
        + rows[:, None] * state_row + columns[None, :]
    )  # fmt: skip
    inside = (rows < DK)[:, None] & (columns < DV)[None, :]
    state = tl.load(state_pointers, mask=inside, other=0.0)
    q = tl.load(q_ptr + batch * q_batch + head * q_head + rows, mask=rows < DK, other=0.0)
    k = tl.load(k_ptr + batch * k_batch + head * k_head + rows, mask=rows < DK, other=0.0)
    v = tl.load(v_ptr + batch * v_batch + head * v_head + columns, mask=columns < DV, other=0.0)
    decay = tl.exp2(log_decay * LOG2_E)
    if HAS_STARTS:
        decay = tl.where(tl.load(starts_ptr + batch * starts_stride) != 0, 0.0, decay)
    updated = state * decay + k.to(tl.float32)[:, None] * v.to(tl.float32)[None, :]
    out = tl.sum(q.to(tl.float32)[:, None] * updated, axis=0)
    if SCALE:
        position = 0
        if HAS_POSITIONS:
            position = tl.load(positions_ptr + batch * positions_stride)
        out *= _normaliser(position + tl.zeros((TILE,), tl.int32), log_decay)
    if HAS_VALID:
        valid = tl.load(valid_ptr + batch * valid_stride) != 0
        out = tl.where(valid, out, 0.0)
        updated = tl.where(valid, updated, state)
    tl.store(state_pointers, updated, mask=inside)
    tl.store(
        o_ptr + batch * o_batch + head * o_head + columns,
        out.to(o_ptr.dtype.element_ty),
        mask=columns < DV,
    )
