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

(i and j count in the direction of the scan), so `stream_kernel` is written once. It scans time in
chunks and holds its tile of the state in registers from the first chunk to the last: a chunk's
state never goes through memory. Only where there are fewer (batch, head, tile) triples than the
chip can run at once is time cut into segments; `segment_sums_kernel` then adds up each segment by
itself, and the maps (`_initial_state`), or `join_kernel` ahead of them, combine the sums by powers
of gamma, which are known because gamma is one constant per head.

Each program describes its head's (time, width) slices to Hopper's TMA, which then reads
tiles without address arithmetic; past the end of time it fills with zeros, so a ragged last chunk
needs no mask. (Descriptors made by the host would go through Triton's argument handling, which kept
launches leave out.)

The derivation, the floors and the measurements are in docs/kernels/.
"""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(x, y, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """X @ y + accumulator in float32. The interpreter multiplies bfloat16 wrongly: upcast there."""
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
    """Log gamma of one head. Far under any float32 it stays finite, so that 0 * it is 0."""
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
def _slices(
    pointer, batch, head, stride_batch, stride_time, stride_head, time, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Descriptor of one head of (batch, time, heads, WIDTH), read in (ROWS, COLUMNS) tiles."""
    return tl.make_tensor_descriptor(
        pointer + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head,
        shape=[time, WIDTH],
        strides=[stride_time, 1],
        block_shape=[ROWS, COLUMNS],
    )


@triton.jit
def _rank(index, size, REVERSE: tl.constexpr):
    """Rank of each token of a chunk in the scan; below 0 past a row's end (REVERSE)."""
    if REVERSE:
        rank = size - 1 - index
    else:
        rank = index
    return rank


@triton.jit
def _power(log2_decay, exponent):
    """gamma^exponent, the exponent cut at 0 from below."""
    return tl.exp2(tl.maximum(exponent, 0).to(tl.float32) * log2_decay)


@triton.jit(
    do_not_specialize=["heads"],
    do_not_specialize_on_alignment=["log_decay_ptr", "positions_ptr"],
)
def normaliser_kernel(
    normaliser_ptr, log_decay_ptr, positions_ptr, ranges_ptr, time, heads,
    BLOCK: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_RANGES: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(s_n) of every token and head, (rows, time): computed once, read by all kernels."""
    row = tl.program_id(1)
    batch = row // heads
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if HAS_POSITIONS:
        position = tl.load(
            positions_ptr + batch.to(tl.int64) * time + index, mask=index < time, other=0
        )
    else:
        first, _ = _row_range(ranges_ptr, batch, time, HAS_RANGES)
        position = index - first
    # Padding may carry any position; its normaliser is multiplied with zeros, so keep it finite.
    normaliser = _normaliser(tl.maximum(position, 0), _load_log_decay(log_decay_ptr, row % heads))
    tl.store(normaliser_ptr + row.to(tl.int64) * time + index, normaliser, mask=index < time)


@triton.jit
def _chunk_normaliser(normaliser_row, row_time, size, CHUNK: tl.constexpr, NORMALISE: tl.constexpr):
    """1 / sqrt(s_n) of a chunk's tokens, (CHUNK,); 1 without NORMALISE."""
    index = tl.arange(0, CHUNK)
    if NORMALISE:
        normaliser = tl.load(normaliser_row + row_time + index, mask=index < size, other=0.0)
    else:
        normaliser = tl.full((CHUNK,), 1.0, tl.float32)
    return normaliser


@triton.jit
def _chunk_documents(
    documents_row, row_time, size, before, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Documents of a chunk's tokens, (CHUNK,), and of the token scanned last."""
    index = tl.arange(0, CHUNK)
    if HAS_DOCUMENTS:
        document = tl.load(documents_row + row_time + index, mask=index < size, other=-1)
        if REVERSE:
            document_last = tl.load(documents_row + row_time)
        else:
            document_last = tl.load(documents_row + row_time + size - 1)
    else:
        document = index * 0
        document_last = before
    return document, document_last


@triton.jit
def _document_before(
    documents_row, first, length, start, stop, REVERSE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr
):
    """The document of the state at the beginning of [start, stop) of a row.

    The state given with a row is of document 0; the gradient of the row's last state is of its
    last token's document.
    """
    before = 0
    if HAS_DOCUMENTS:
        if REVERSE:
            before = tl.load(documents_row + tl.maximum(first + tl.minimum(stop, length - 1), 0))
        else:
            last = tl.minimum(start, length) - 1  # a segment may begin behind a shorter row
            before = tl.load(documents_row + first + tl.maximum(last, 0))
            before = tl.where(start > 0, before, 0)
    return before


@triton.jit
def _initial_state(
    initial_ptr, offset, inside, row, segment_id, segment, segments, size, log2_decay,
    REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """The initial state of a segment: none, one that is given, or joined of sums of segments.

    With JOIN, the sums that make up a segment, `initial` holds these, and those scanned before are
    joined as by `join_kernel`: the arithmetic is the same, so with one sum the bits are. Only the
    last in time may be of less than the others, or of nothing: forward it is before none, in
    reverse its power multiplies a zero.
    """
    state = tl.zeros(offset.shape, tl.float32)
    if HAS_INITIAL and not JOIN:
        given = initial_ptr + (row.to(tl.int64) * segments + segment_id) * size
        state = tl.load(given + offset, mask=inside, other=0.0)
    if JOIN:
        across = tl.exp2((segment // JOIN).to(tl.float32) * log2_decay)
        last = segments * JOIN - 1
        for turn in range((segments - 1 - segment_id if REVERSE else segment_id) * JOIN):
            before = last - turn if REVERSE else turn
            sums = initial_ptr + (row.to(tl.int64) * (last + 1) + before) * size
            state = state * across + tl.load(sums + offset, mask=inside, other=0.0)
    return state


@triton.jit(
    do_not_specialize=["segments", "heads", "chunks", "split", "normaliser_rows", "pairs"],
    do_not_specialize_on_alignment=["log_decay_ptr"],
)
def stream_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, scores_ptr, log_decay_ptr, normaliser_ptr, documents_ptr,
    ranges_ptr, initial_ptr, final_ptr, kept_ptr,
    a_batch, a_time, a_head, b_batch, b_time, b_head, c_batch, c_time, c_head,
    out_batch, out_time, out_head,
    time, segment, segments, heads, chunks, split, stride_a, stride_c, normaliser_rows, pairs,
    A: tl.constexpr, C: tl.constexpr, BLOCK_A: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, REVERSE: tl.constexpr, NORMALISE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_RANGES: tl.constexpr,
    HAS_INITIAL: tl.constexpr, JOIN: tl.constexpr, HAS_FINAL: tl.constexpr,
    HAS_SCORES: tl.constexpr, HAS_KEPT: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out_i = sum_{j <= i} gamma^(i-j) (a_i . b_j) c_j for a tile of columns and a segment.

    The row's tokens are at times first + [0, length); i and j are ranks in the scan. With
    REVERSE the normaliser belongs to b and c (they are q and do), else to the output. The state
    comes in decayed by gamma^(i+1) (forward: it is the sum *before* the first token) or by gamma^i
    (reverse: the gradient of the sum *after* the last).

    Everything is computed transposed: state^T and out^T have the tile's columns as rows. So the
    state, where it stands as the left factor, and the decayed c go from registers straight into
    the tensor cores, whose right factors alone must lie in shared memory, where TMA has put them.

    `split` selects BLOCK_A of a's and b's columns, that is, of the state's rows; a later split
    (ADD) adds its share to what the first one, which also holds the chunk's own part, has stored.
    stride_a, stride_c: strides of the state's rows and columns in `initial`, one state per
    segment, and `final`, one per head; dq and dk read states of (dk, dv) transposed. JOIN:
    `initial` holds what each segment alone adds, and every program joins what it needs.
    HAS_KEPT: the state before every second chunk goes to `kept`, for `backward_kernel`.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1)
    segment_id = tl.program_id(2)
    row_wide = row.to(tl.int64)
    batch = row // heads
    head = row % heads
    log_decay = _load_log_decay(log_decay_ptr, head)
    log2_decay = log_decay * LOG2_E
    first, length = _row_range(ranges_ptr, batch, time, HAS_RANGES)
    start = segment_id * segment
    stop = tl.minimum(start + segment, length)
    normaliser_row = normaliser_ptr + (row % normaliser_rows).to(tl.int64) * time
    documents_row = documents_ptr + batch.to(tl.int64) * time

    a_desc = _slices(a_ptr, batch, head, a_batch, a_time, a_head, time, A, CHUNK, BLOCK_A)
    b_desc = _slices(b_ptr, batch, head, b_batch, b_time, b_head, time, A, CHUNK, BLOCK_A)
    c_desc = _slices(c_ptr, batch, head, c_batch, c_time, c_head, time, C, CHUNK, TILE)
    out_desc = _slices(out_ptr, batch, head, out_batch, out_time, out_head, time, C, CHUNK, TILE)
    if HAS_SCORES and not ADD:
        scores_desc = tl.make_tensor_descriptor(
            scores_ptr + row_wide * chunks * (CHUNK * CHUNK),
            shape=[chunks * CHUNK, CHUNK],
            strides=[CHUNK, 1],
            block_shape=[CHUNK, CHUNK],
        )

    dtype = c_ptr.dtype.element_ty
    index = tl.arange(0, CHUNK)
    SHIFT: tl.constexpr = 0 if REVERSE else 1
    rows = split * BLOCK_A + tl.arange(0, BLOCK_A)
    columns = tile * TILE + tl.arange(0, TILE)
    state_offset = columns[:, None] * stride_c + rows[None, :] * stride_a
    state_inside = (columns < C)[:, None] & (rows < A)[None, :]
    state = _initial_state(
        initial_ptr, state_offset, state_inside, row, segment_id, segment, segments, A * C,
        log2_decay,
        REVERSE, HAS_INITIAL, JOIN,
    )  # fmt: skip
    if not HAS_SCORES and not ADD:
        # gamma^(i-j) at [j, i], 0 where j > i: the same for all chunks, so it stays in registers.
        if REVERSE:
            gap = index[:, None] - index[None, :]
        else:
            gap = index[None, :] - index[:, None]
        decay = tl.where(gap >= 0, _power(log2_decay, gap), 0.0)
    before = _document_before(documents_row, first, length, start, stop, REVERSE, HAS_DOCUMENTS)

    turns = tl.cdiv(stop - start, CHUNK)
    if NORMALISE and not REVERSE:
        # Read one chunk ahead: the compiler prefetches only what leads into a product.
        ahead = _chunk_normaliser(normaliser_row, first + start, stop - start, CHUNK, NORMALISE)
    for turn in range(turns):
        if REVERSE:
            chunk_start = start + (turns - 1 - turn) * CHUNK
        else:
            chunk_start = start + turn * CHUNK
        size = tl.minimum(CHUNK, stop - chunk_start)
        row_time = first + chunk_start
        a = a_desc.load([row_time, split * BLOCK_A])
        b = b_desc.load([row_time, split * BLOCK_A])
        c = c_desc.load([row_time, tile * TILE])
        if HAS_RANGES:
            # Padding after the row's end may hold anything, NaN too.
            live = index < size
            b = tl.where(live[:, None], b, 0.0)
            c = tl.where(live[:, None], c, 0.0)
        document, document_last = _chunk_documents(
            documents_row, row_time, size, before, CHUNK, REVERSE, HAS_DOCUMENTS
        )
        rank = _rank(index, size, REVERSE)
        from_initial = _power(log2_decay, rank + SHIFT)
        to_final = _power(log2_decay, size - SHIFT - rank)
        across = tl.exp2(size.to(tl.float32) * log2_decay)
        if HAS_DOCUMENTS:
            from_initial = tl.where(document == before, from_initial, 0.0)
            to_final = tl.where(document == document_last, to_final, 0.0)
            across = tl.where(document_last == before, across, 0.0)
            before = document_last
        if NORMALISE:
            if REVERSE:
                normaliser = _chunk_normaliser(normaliser_row, row_time, size, CHUNK, NORMALISE)
                to_final *= normaliser
            else:
                normaliser = ahead
                ahead = _chunk_normaliser(
                    normaliser_row, row_time + CHUNK, stop - chunk_start - CHUNK, CHUNK, NORMALISE
                )
                from_initial *= normaliser

        # The past, through the state; the chunk itself, through its weights.
        past = state.to(dtype)
        if HAS_KEPT:  # noqa: SIM102, a constant, and what a program asks as it runs
            if chunk_start % (2 * CHUNK) == 0:
                tl.store(
                    kept_ptr + (row_wide * pairs + chunk_start // (2 * CHUNK)) * A * C
                    + columns[:, None] * A + rows[None, :],
                    past,
                    mask=state_inside,
                )  # fmt: skip
        out = _dot(past, tl.trans(a), None, PRECISION, UPCAST) * from_initial[None, :]
        if ADD:
            stored = out_desc.load([row_time, tile * TILE])
        else:
            if HAS_SCORES:
                weights = scores_desc.load([chunk_start, 0])
                if not REVERSE:
                    weights = tl.trans(weights)
            else:
                weights = _dot(b, tl.trans(a), None, PRECISION, UPCAST) * decay
                if HAS_DOCUMENTS:
                    weights = tl.where(document[:, None] == document[None, :], weights, 0.0)
                if NORMALISE:
                    if REVERSE:
                        weights *= normaliser[:, None]
                    else:
                        weights *= normaliser[None, :]
                weights = weights.to(dtype)
            out = _dot(tl.trans(c), weights, out, PRECISION, UPCAST)
        if ADD:
            out += tl.trans(stored).to(tl.float32)
        if HAS_RANGES:
            out = tl.where(live[None, :], out, 0.0)
        out_desc.store([row_time, tile * TILE], tl.trans(out.to(dtype)))

        # The state after the chunk.
        c = (tl.trans(c).to(tl.float32) * to_final[None, :]).to(dtype)
        state = _dot(c, b, state * across, PRECISION, UPCAST)

    if HAS_FINAL:
        tl.store(final_ptr + row_wide * A * C + state_offset, state, mask=state_inside)


@triton.jit(
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
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, NORMALISE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_RANGES: tl.constexpr, HAS_INITIAL: tl.constexpr, JOIN: tl.constexpr,
    HAS_FINAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All three gradients in one scan backward in time, where one program holds the whole state.

        dq_n = r_n gamma^(i+1) do_n S^T + r_n sum_{m <= n} gamma^(n-m) (do_n . v_m) k_m
        dk_m = gamma^(N-1-m) v_m D^T    + sum_{n >= m} gamma^(n-m) r_n (v_m . do_n) q_n
        dv_m = gamma^(N-1-m) k_m D      + sum_{n >= m} gamma^(n-m) r_n (k_m . q_n) do_n

    They read the same four tensors, and dq shares a chunk's weights with dk. D, the gradient of
    the state, is carried along. S runs the other way, so the forward kept it, in q's dtype as it
    was multiplied there, before every second chunk: with the chunk that follows, which this
    scan meets next and the cache then holds, it makes the one between.
    """
    row = tl.program_id(0)
    segment_id = tl.program_id(1)
    row_wide = row.to(tl.int64)
    batch = row // heads
    head = row % heads
    log2_decay = _load_log_decay(log_decay_ptr, head) * LOG2_E
    first, length = _row_range(ranges_ptr, batch, time, HAS_RANGES)
    start = segment_id * segment
    stop = tl.minimum(start + segment, length)
    normaliser_row = normaliser_ptr + (row % normaliser_rows).to(tl.int64) * time
    documents_row = documents_ptr + batch.to(tl.int64) * time

    q_desc = _slices(q_ptr, batch, head, q_batch, q_time, q_head, time, K, CHUNK, BLOCK_K)
    k_desc = _slices(k_ptr, batch, head, k_batch, k_time, k_head, time, K, CHUNK, BLOCK_K)
    v_desc = _slices(v_ptr, batch, head, v_batch, v_time, v_head, time, V, CHUNK, BLOCK_V)
    do_desc = _slices(do_ptr, batch, head, do_batch, do_time, do_head, time, V, CHUNK, BLOCK_V)
    dq_desc = _slices(dq_ptr, batch, head, dq_batch, dq_time, dq_head, time, K, CHUNK, BLOCK_K)
    dk_desc = _slices(dk_ptr, batch, head, dk_batch, dk_time, dk_head, time, K, CHUNK, BLOCK_K)
    dv_desc = _slices(dv_ptr, batch, head, dv_batch, dv_time, dv_head, time, V, CHUNK, BLOCK_V)

    dtype = q_ptr.dtype.element_ty
    index = tl.arange(0, CHUNK)
    rows = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_V)
    state_offset = rows[:, None] * V + columns[None, :]
    state_inside = (rows < K)[:, None] & (columns < V)[None, :]
    state = _initial_state(
        initial_ptr, state_offset, state_inside, row, segment_id, segment, segments, K * V,
        log2_decay,
        True, HAS_INITIAL, JOIN,
    )  # fmt: skip
    kept_row = kept_ptr + row_wide * pairs * K * V + columns[:, None] * K + rows[None, :]
    kept_inside = (columns < V)[:, None] & (rows < K)[None, :]
    # gamma^(n-m) at [m, n], 0 where n < m.
    gap = index[None, :] - index[:, None]
    decay = tl.where(gap >= 0, _power(log2_decay, gap), 0.0)
    after = _document_before(documents_row, first, length, start, stop, True, HAS_DOCUMENTS)

    turns = tl.cdiv(stop - start, CHUNK)
    for turn in range(turns):
        chunk_start = start + (turns - 1 - turn) * CHUNK
        size = tl.minimum(CHUNK, stop - chunk_start)
        row_time = first + chunk_start
        pair = chunk_start // (2 * CHUNK)
        pair_start = pair * (2 * CHUNK)
        second = chunk_start > pair_start
        past = tl.load(kept_row + pair.to(tl.int64) * K * V, mask=kept_inside, other=0.0)
        k_before = k_desc.load([first + pair_start, 0])
        v_before = v_desc.load([first + pair_start, 0])
        v = v_desc.load([row_time, 0])
        do = do_desc.load([row_time, 0])
        k = k_desc.load([row_time, 0])
        q = q_desc.load([row_time, 0])
        if HAS_RANGES:
            # Padding after the row's end may hold anything, NaN too.
            live = (index < size)[:, None]
            q, k = tl.where(live, q, 0.0), tl.where(live, k, 0.0)
            v, do = tl.where(live, v, 0.0), tl.where(live, do, 0.0)
            live_before = (index < tl.minimum(CHUNK, stop - pair_start))[:, None]
            k_before = tl.where(live_before, k_before, 0.0)
            v_before = tl.where(live_before, v_before, 0.0)
        across = tl.exp2(size.to(tl.float32) * log2_decay)
        of_past = _power(log2_decay, index + 1)
        to_final = of_past
        of_future = _power(log2_decay, size - 1 - index)
        # Of S before the pair, and of the pair's first chunk, in S before the second.
        hold = tl.where(second, tl.exp2(CHUNK * log2_decay), 1.0)
        remember = tl.where(second, _power(log2_decay, CHUNK - 1 - index), 0.0)
        weights = decay
        if HAS_DOCUMENTS:
            document, _ = _chunk_documents(
                documents_row, row_time, size, after, CHUNK, True, HAS_DOCUMENTS
            )
            opens = tl.load(documents_row + row_time)
            of_pair = _document_before(documents_row, first, length, pair_start, stop, False, True)
            before = _document_before(documents_row, first, length, chunk_start, stop, False, True)
            document_before, _ = _chunk_documents(
                documents_row, first + pair_start, tl.minimum(CHUNK, stop - pair_start), 0, CHUNK,
                False, HAS_DOCUMENTS,
            )  # fmt: skip
            of_past = tl.where(document == before, of_past, 0.0)
            of_future = tl.where(document == after, of_future, 0.0)
            to_final = tl.where(document == opens, to_final, 0.0)
            across = tl.where(opens == after, across, 0.0)
            hold = tl.where(of_pair == before, hold, 0.0)
            remember = tl.where(document_before == before, remember, 0.0)
            weights = tl.where(document[:, None] == document[None, :], weights, 0.0)
            after = opens
        if NORMALISE:
            normaliser = _chunk_normaliser(normaliser_row, row_time, size, CHUNK, NORMALISE)
            of_past *= normaliser
            to_final *= normaliser
            weights = weights * normaliser[None, :]

        remembered = (v_before.to(tl.float32) * remember[:, None]).to(dtype)
        past = _dot(
            tl.trans(remembered), k_before, past.to(tl.float32) * hold, PRECISION, UPCAST
        ).to(dtype)  # fmt: skip
        of_values = (_dot(v, tl.trans(do), None, PRECISION, UPCAST) * weights).to(dtype)
        grad_q = _dot(do, past, None, PRECISION, UPCAST) * of_past[:, None]
        grad_q = _dot(tl.trans(of_values), k, grad_q, PRECISION, UPCAST)
        if HAS_RANGES:
            grad_q = tl.where(live, grad_q, 0.0)
        dq_desc.store([row_time, 0], grad_q.to(dtype))
        future = state.to(dtype)
        grad_k = _dot(v, tl.trans(future), None, PRECISION, UPCAST) * of_future[:, None]
        grad_k = _dot(of_values, q, grad_k, PRECISION, UPCAST)
        if HAS_RANGES:
            grad_k = tl.where(live, grad_k, 0.0)
        dk_desc.store([row_time, 0], grad_k.to(dtype))
        of_keys = (_dot(k, tl.trans(q), None, PRECISION, UPCAST) * weights).to(dtype)
        grad_v = _dot(k, future, None, PRECISION, UPCAST) * of_future[:, None]
        grad_v = _dot(of_keys, do, grad_v, PRECISION, UPCAST)
        if HAS_RANGES:
            grad_v = tl.where(live, grad_v, 0.0)
        dv_desc.store([row_time, 0], grad_v.to(dtype))
        scaled = (do.to(tl.float32) * to_final[:, None]).to(dtype)
        state = _dot(tl.trans(q), scaled, state * across, PRECISION, UPCAST)

    if HAS_FINAL:
        tl.store(final_ptr + row_wide * K * V + state_offset, state, mask=state_inside)


@triton.jit(
    do_not_specialize=["heads", "chunks", "normaliser_rows"],
    do_not_specialize_on_alignment=["log_decay_ptr"],
)
def scores_kernel(
    a_ptr, b_ptr, scores_ptr, log_decay_ptr, normaliser_ptr, documents_ptr, ranges_ptr,
    a_batch, a_time, a_head, b_batch, b_time, b_head,
    time, heads, chunks, normaliser_rows,
    A: tl.constexpr, BLOCK_A: tl.constexpr, CHUNK: tl.constexpr, NORMALISE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_RANGES: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """P_nm = gamma^(n-m) (a_n . b_m) / sqrt(s_n) within one chunk, (CHUNK, CHUNK).

    Made once for all the tiles that use it: from (q, k) it serves o and, read transposed, dv;
    from (do, v) it serves dq and, read transposed, dk.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    batch = row // heads
    head = row % heads
    first, length = _row_range(ranges_ptr, batch, time, HAS_RANGES)
    start = chunk * CHUNK
    if start < length:
        log2_decay = _load_log_decay(log_decay_ptr, head) * LOG2_E
        index = tl.arange(0, CHUNK)
        row_time = first + start
        size = tl.minimum(CHUNK, length - start)
        batch_wide, row_time_wide = batch.to(tl.int64), row_time.to(tl.int64)
        a_row = a_ptr + batch_wide * a_batch + head.to(tl.int64) * a_head
        b_row = b_ptr + batch_wide * b_batch + head.to(tl.int64) * b_head
        a_row += row_time_wide * a_time
        b_row += row_time_wide * b_time
        live = index < size
        weights = tl.zeros((CHUNK, CHUNK), tl.float32)
        for column in range(0, A, BLOCK_A):
            columns = column + tl.arange(0, BLOCK_A)
            inside = live[:, None] & (columns < A)[None, :]
            a = tl.load(a_row + index[:, None] * a_time + columns[None, :], mask=inside, other=0.0)
            b = tl.load(b_row + index[:, None] * b_time + columns[None, :], mask=inside, other=0.0)
            weights = _dot(a, tl.trans(b), weights, PRECISION, UPCAST)
        gap = index[:, None] - index[None, :]
        seen = gap >= 0
        if HAS_DOCUMENTS:
            document, _ = _chunk_documents(
                documents_ptr + batch.to(tl.int64) * time, row_time, size, 0, CHUNK, False, True
            )
            seen = seen & (document[:, None] == document[None, :])
        weights = tl.where(seen, weights * _power(log2_decay, gap), 0.0)
        if NORMALISE:
            normaliser_row = normaliser_ptr + (row % normaliser_rows).to(tl.int64) * time
            weights *= _chunk_normaliser(normaliser_row, row_time, size, CHUNK, NORMALISE)[:, None]
        tl.store(
            scores_ptr + (row.to(tl.int64) * chunks + chunk) * (CHUNK * CHUNK)
            + index[:, None] * CHUNK + index[None, :],
            weights.to(scores_ptr.dtype.element_ty),
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["segments", "heads", "normaliser_rows"],
    do_not_specialize_on_alignment=["log_decay_ptr"],
)
def segment_sums_kernel(
    b_ptr, c_ptr, sums_ptr, log_decay_ptr, normaliser_ptr, documents_ptr, ranges_ptr,
    b_batch, b_time, b_head, c_batch, c_time, c_head,
    time, segment, segments, heads, normaliser_rows,
    B: tl.constexpr, C: tl.constexpr, BLOCK_B: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, REVERSE: tl.constexpr, SKIP: tl.constexpr, NORMALISE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_RANGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """First level: what each segment alone adds to the state, sum_j gamma^(L-1-j) b_j^T c_j.

    With REVERSE (b, c are q, do): sum_j gamma^(L-j) r_j b_j^T c_j, see `stream_kernel`. The sum is
    taken against the direction of j: what it reads last, the map that follows reads first, and the
    cache still holds it. SKIP: how many of the first are omitted.
    """
    TILES: tl.constexpr = (C + TILE - 1) // TILE
    tile = tl.program_id(0)
    row = tl.program_id(1)
    segment_id = tl.program_id(2) + SKIP
    batch = row // heads
    head = row % heads
    log_decay = _load_log_decay(log_decay_ptr, head)
    log2_decay = log_decay * LOG2_E
    first, length = _row_range(ranges_ptr, batch, time, HAS_RANGES)
    start = segment_id * segment
    stop = tl.minimum(start + segment, length)
    index = tl.arange(0, CHUNK)
    b_desc = _slices(b_ptr, batch, head, b_batch, b_time, b_head, time, B, CHUNK, BLOCK_B)
    c_desc = _slices(c_ptr, batch, head, c_batch, c_time, c_head, time, C, CHUNK, TILE)
    row_column = (tile // TILES) * BLOCK_B
    column = (tile % TILES) * TILE
    normaliser_row = normaliser_ptr + (row % normaliser_rows).to(tl.int64) * time
    documents = documents_ptr + batch.to(tl.int64) * time
    # Only the document that the segment ends in continues, so earlier ones need no chain of resets.
    last = 0
    if HAS_DOCUMENTS and stop > start:
        last = tl.load(documents + first + (start if REVERSE else stop - 1))
    state = tl.zeros((TILE, BLOCK_B), tl.float32)
    chunks = tl.cdiv(stop - start, CHUNK)
    for turn in range(chunks):
        if REVERSE:
            chunk_start = start + turn * CHUNK
            to_final = _power(log2_decay, chunk_start - start + 1 + index)
        else:
            chunk_start = start + (chunks - 1 - turn) * CHUNK
            to_final = _power(log2_decay, stop - 1 - chunk_start - index)
        size = tl.minimum(CHUNK, stop - chunk_start)
        row_time = first + chunk_start
        b = b_desc.load([row_time, row_column])
        c = c_desc.load([row_time, column])
        if HAS_RANGES:
            live = index < size
            b = tl.where(live[:, None], b, 0.0)
            c = tl.where(live[:, None], c, 0.0)
        if REVERSE and NORMALISE:
            to_final *= _chunk_normaliser(normaliser_row, row_time, size, CHUNK, NORMALISE)
        if HAS_DOCUMENTS:
            document, _ = _chunk_documents(
                documents, row_time, size, 0, CHUNK, REVERSE, HAS_DOCUMENTS
            )
            to_final = tl.where(document == last, to_final, 0.0)
        c = (tl.trans(c).to(tl.float32) * to_final[None, :]).to(c_ptr.dtype.element_ty)
        state = _dot(c, b, state, PRECISION, UPCAST)
    rows = row_column + tl.arange(0, BLOCK_B)
    columns = column + tl.arange(0, TILE)
    tl.store(
        sums_ptr + (row.to(tl.int64) * segments + segment_id) * B * C
        + columns[:, None] + rows[None, :] * C,
        state,
        mask=(columns < C)[:, None] & (rows < B)[None, :],
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["segments", "heads"],
    do_not_specialize_on_alignment=["log_decay_ptr"],
)
def join_kernel(
    sums_ptr, states_ptr, initial_ptr, final_ptr, log_decay_ptr, documents_ptr, ranges_ptr,
    time, segment, segments, heads, size,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_RANGES: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """Second level: from what segments add, their initial states.

    E_first = initial; E_next = gamma^L E + sums; final = the E after the segment scanned last. A
    program of the map that follows takes EACH segments and writes the initial states of all but
    the first of them; of those scanned last there is no sum unless the final state is wanted.
    """
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    row = tl.program_id(1)
    row_wide = row.to(tl.int64)
    batch = row // heads
    log2_decay = _load_log_decay(log_decay_ptr, row % heads) * LOG2_E
    first, length = _row_range(ranges_ptr, batch, time, HAS_RANGES)
    documents = documents_ptr + batch.to(tl.int64) * time
    if HAS_INITIAL:
        state = tl.load(initial_ptr + row_wide * size + element, mask=inside, other=0.0)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    before = _document_before(documents, first, length, 0, length, REVERSE, HAS_DOCUMENTS)
    summed = segments if HAS_FINAL else segments - EACH
    for turn in range(segments):
        segment_id = segments - 1 - turn if REVERSE else turn
        at = (row_wide * segments + segment_id) * size + element
        if turn % EACH == 0:
            tl.store(states_ptr + at, state, mask=inside)
        start = segment_id * segment
        stop = tl.minimum(start + segment, length)
        if (turn < summed) & (stop > start):
            across = tl.exp2((stop - start).to(tl.float32) * log2_decay)
            if HAS_DOCUMENTS:
                last = tl.load(documents + first + (start if REVERSE else stop - 1))
                across = tl.where(last == before, across, 0.0)
                before = last
            state = state * across + tl.load(sums_ptr + at, mask=inside, other=0.0)
    if HAS_FINAL:
        tl.store(final_ptr + row_wide * size + element, state, mask=inside)


@triton.jit(
    do_not_specialize_on_alignment=[
        "q_ptr", "k_ptr", "v_ptr", "o_ptr", "log_decay_ptr", "positions_ptr", "starts_ptr",
        "valid_ptr",
    ]
)  # fmt: skip
def step_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, state_ptr, log_decay_ptr, positions_ptr, starts_ptr, valid_ptr,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, o_batch, o_head,
    positions_stride, starts_stride, valid_stride, state_batch, state_head, state_row, heads,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
    NORMALISE: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_STARTS: tl.constexpr,
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
    if NORMALISE:
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
