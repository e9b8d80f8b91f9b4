"""The Triton side of `archzoo.kernels.routers`: imported only once a kernel is to run.

A program takes some tokens' scores (`largest`, `choose`, `attend`, `survey`) or a tile of a
router's product; none waits for another, and every sum has a fixed order.
"""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def largest_kernel(
    x, values, indices, tokens, n, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The K largest of each row, one after the other; of equals the first."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < n)[None, :]
    row = tl.load(x + token[:, None] * n + column[None, :], mask=inside, other=float("-inf"))
    for j in tl.static_range(K):
        found = tl.argmax(row, axis=1)
        # Where numbers are nan nothing is largest; what is returned must still be an index.
        found = tl.minimum(found, n - 1)
        here = column[None, :] == found[:, None]
        value = tl.max(tl.where(here, row, float("-inf")), axis=1)
        tl.store(values + token * K + j, value, mask=token < tokens)
        tl.store(indices + token * K + j, found.to(tl.int64), mask=token < tokens)
        row = tl.where(here, float("-inf"), row)


@triton.jit
def _gate(logits, inside, chosen, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr):
    """Scores, probabilities, and the weight of each expert if it is chosen; 0 where not `inside`.

    A softmax over the chosen alone keeps its weights where the others' underflow.
    """
    if SIGMOID:
        scores = tl.where(inside, tl.sigmoid(logits), 0.0)
        probabilities = scores / tl.sum(scores, axis=1)[:, None]
        weights = scores
    else:
        kept = tl.where(inside, logits, float("-inf"))
        scores = tl.exp(kept - tl.max(kept, axis=1)[:, None])
        scores = scores / tl.sum(scores, axis=1)[:, None]
        probabilities = scores
        weights = scores
        if RENORMALISE:
            kept = tl.where(chosen, logits, float("-inf"))
            weights = tl.exp(kept - tl.max(kept, axis=1)[:, None])
    weights = tl.where(chosen, weights, 0.0)
    if RENORMALISE:
        weights = weights / tl.sum(weights, axis=1)[:, None]
    return scores, probabilities, weights


@triton.jit
def choose_kernel(
    logits, bias, weights, indices, probabilities, tokens, n,
    K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr, BIASED: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A router's decision: the K largest, their weights, and all probabilities."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    there = (column < n)[None, :]
    inside = (token < tokens)[:, None] & there
    at = token[:, None] * n + column[None, :]
    value = tl.load(logits + at, mask=inside, other=0.0)
    order = value
    if BIASED:  # added to the scores; without one, logits are in the same order and never tie
        if SIGMOID:
            order = tl.sigmoid(value)
        else:
            order = tl.where(there, value, float("-inf"))
            order = tl.exp(order - tl.max(order, axis=1)[:, None])
            order = order / tl.sum(order, axis=1)[:, None]
        order += tl.load(bias + column, mask=column < n, other=0.0)[None, :]
    order = tl.where(there, order, float("-inf"))
    rank = tl.full((TOKENS, BLOCK), K, tl.int32)  # among the chosen
    for j in tl.static_range(K):
        # Where numbers are nan nothing is largest; what is returned must still be an index.
        found = tl.minimum(tl.argmax(order, axis=1), n - 1)
        tl.store(indices + token * K + j, found.to(tl.int64), mask=token < tokens)
        here = column[None, :] == found[:, None]
        rank = tl.where(here, j, rank)
        order = tl.where(here, float("-inf"), order)
    _, probability, weight = _gate(value, there, rank < K, SIGMOID, RENORMALISE)
    tl.store(probabilities + at, probability, mask=inside)
    for j in tl.static_range(K):
        mine = tl.sum(tl.where(rank == j, weight, 0.0), axis=1)
        tl.store(weights + token * K + j, mine, mask=token < tokens)


@triton.jit
def choose_backward_kernel(
    logits, indices, d_weights, d_probabilities, d_logits, tokens, n, stride,
    K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr,
    WEIGHTS: tl.constexpr, PROBABILITIES: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of y = a / sum a: da = (dy - sum dy y) / sum a; of y = softmax z: dz = y (dy - sum dy y).

    Rows of d_probabilities have the stride `stride`: 0 where all tokens have the same.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    there = (column < n)[None, :]
    inside = (token < tokens)[:, None] & there
    at = token[:, None] * n + column[None, :]
    value = tl.load(logits + at, mask=inside, other=0.0)
    chosen = tl.zeros((TOKENS, BLOCK), tl.int32)
    of_weights = tl.zeros((TOKENS, BLOCK), tl.float32)
    for j in tl.static_range(K):
        found = tl.load(indices + token * K + j, mask=token < tokens, other=0)
        here = column[None, :] == found[:, None]
        chosen = tl.where(here, 1, chosen)
        if WEIGHTS:
            gradient = tl.load(d_weights + token * K + j, mask=token < tokens, other=0.0)
            of_weights += tl.where(here, gradient[:, None], 0.0)
    scores, probability, weight = _gate(value, there, chosen > 0, SIGMOID, RENORMALISE)
    of_probability = tl.zeros((TOKENS, BLOCK), tl.float32)
    if PROBABILITIES:
        pointers = d_probabilities + token[:, None] * stride + column[None, :]
        of_probability = tl.load(pointers, mask=inside, other=0.0)
    if RENORMALISE:
        of_weights -= tl.sum(of_weights * weight, axis=1)[:, None]
    if SIGMOID:
        of_probability -= tl.sum(of_probability * probability, axis=1)[:, None]
        result = of_probability / tl.sum(scores, axis=1)[:, None]
        if RENORMALISE:
            kept = tl.where(chosen > 0, scores, 0.0)
            of_weights = tl.where(chosen > 0, of_weights, 0.0) / tl.sum(kept, axis=1)[:, None]
        result = (result + of_weights) * scores * (1.0 - scores)
    else:
        result = tl.zeros((TOKENS, BLOCK), tl.float32)
        if RENORMALISE:
            result = of_weights * weight
        else:
            of_probability += of_weights
        result += probability * (
            of_probability - tl.sum(of_probability * probability, axis=1)[:, None]
        )
    tl.store(d_logits + at, result, mask=inside)


@triton.jit
def survey_kernel(
    probabilities, indices, counts, sums, tokens,
    N: tl.constexpr, K: tl.constexpr, RATIOS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of some tokens: counts (N) of assignments; sums of probabilities (N), of ratios (RATIOS).

    Ratios are those of a token's largest probabilities, each to the next.
    """
    program = tl.program_id(0)
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    there = token < tokens
    inside = there[:, None] & (column < N)[None, :]
    row = tl.load(probabilities + token[:, None] * N + column[None, :], mask=inside, other=0.0)
    chosen = tl.zeros((TOKENS, BLOCK), tl.int32)
    for j in range(K):
        found = tl.load(indices + token * K + j, mask=there, other=-1)
        chosen += (column[None, :] == found[:, None]).to(tl.int32)
    tl.store(counts + program * N + column, tl.sum(chosen, axis=0), mask=column < N)
    base = sums + program * (N + RATIOS)
    tl.store(base + column, tl.sum(row, axis=0), mask=column < N)
    if RATIOS > 0:
        rest = tl.where(inside, row, -1.0)
        above = tl.max(rest, axis=1)
        for j in tl.static_range(RATIOS):
            first = tl.argmax(rest, axis=1)
            rest = tl.where(column[None, :] == first[:, None], -1.0, rest)
            largest = tl.max(rest, axis=1)
            # A ratio above 1e7 says no more, and would swamp the mean.
            ratio = tl.where(there, above / tl.maximum(largest, 1e-7), 0.0)
            tl.store(base + N + j, tl.sum(ratio))
            above = largest


@triton.jit
def summarise_kernel(
    counts, sums, alpha, assignments, loss, seen, slope,
    programs, tokens, total, capacity, log_experts, coefficient,
    N: tl.constexpr, RATIOS: tl.constexpr, KIND: tl.constexpr, ADAPTIVE: tl.constexpr,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The balancing loss and its slope, both by the coefficient, and what is looked at.

    That is [max violation, entropy, unused, drop rate, loss alone, ratios].
    """
    expert = tl.arange(0, BLOCK)
    inside = expert < N
    taken = tl.zeros((STEP, BLOCK), tl.int32)
    added = tl.zeros((STEP, BLOCK), tl.float32)
    ratios = tl.zeros((STEP, 2), tl.float32)
    of_ratio = tl.arange(0, 2)
    for start in range(0, programs, STEP):
        program = (start + tl.arange(0, STEP))[:, None]
        here = (program < programs) & inside[None, :]
        taken += tl.load(counts + program * N + expert[None, :], mask=here, other=0)
        base = program * (N + RATIOS)
        added += tl.load(sums + base + expert[None, :], mask=here, other=0.0)
        if RATIOS > 0:
            here = (program < programs) & (of_ratio < RATIOS)[None, :]
            ratios += tl.load(sums + base + N + of_ratio[None, :], mask=here, other=0.0)
    count = tl.sum(taken, axis=0)
    tl.store(assignments + expert, count.to(tl.int64), mask=inside)
    fraction = count.to(tl.float32) / total
    if KIND > 0:
        probability = tl.sum(added, axis=0) / tokens
        if KIND == 1:  # n sum f P
            value = tl.sum(fraction * probability) * N
            change = fraction * N
        else:  # sum (P - 1/n)^2
            centred = tl.where(inside, probability - 1.0 / N, 0.0)
            value = tl.sum(centred * centred)
            change = 2.0 * centred
        if ADAPTIVE:
            coefficient = tl.load(alpha)
        tl.store(loss, coefficient * value)
        tl.store(slope + expert, coefficient * change / tokens, mask=inside)
        tl.store(seen + 4, value)
    tl.store(seen, tl.max(fraction) * N - 1.0)
    entropy = -tl.sum(tl.where(fraction > 0.0, fraction * tl.log(tl.maximum(fraction, 1e-30)), 0.0))
    tl.store(seen + 1, entropy / log_experts)
    unused = tl.sum((inside & (count == 0)).to(tl.float32))
    tl.store(seen + 2, unused / N)
    over = tl.sum(tl.where(inside, tl.maximum(count - capacity, 0), 0))
    tl.store(seen + 3, over.to(tl.float32) / total)
    if RATIOS > 0:
        mean = tl.sum(ratios, axis=0) / tokens
        tl.store(seen + 5 + of_ratio, mean, mask=of_ratio < RATIOS)


# A thread holds one expert of a token and all that it is multiplied by, along the first axis: sums
# over these are additions of its own, where a sum along the last axis passes every score through
# five exchanges between threads. The backward pass needs both sums, and makes the scores twice.


@triton.jit
def _attending(projected, tokens, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Where q is, which of it is there, q, k, v, log2(e) q, and its product with k at most.

    (TOKENS, BLOCK) all. A product with k_j is largest where k_j is, or smallest where q_i < 0.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, BLOCK)
    there = (expert < EXPERTS)[None, :]
    inside = (token < tokens)[:, None] & there
    at = token[:, None] * 3 * EXPERTS + expert[None, :]
    q = tl.load(projected + at, mask=inside, other=0.0)
    k = tl.load(projected + at + EXPERTS, mask=inside, other=0.0)
    v = tl.load(projected + at + 2 * EXPERTS, mask=inside, other=0.0)
    highest = tl.max(tl.where(there, k, float("-inf")), axis=1)[:, None]
    lowest = tl.min(tl.where(there, k, float("inf")), axis=1)[:, None]
    q_log2 = q * 1.4426950408889634  # scores are powers of 2
    return at, inside, q, k, v, q_log2, q_log2 * tl.where(q < 0.0, lowest, highest)


@triton.jit
def _along(x):
    """(TOKENS, BLOCK) for the first axis and the tokens of a tile."""
    return tl.trans(x)[:, :, None]


@triton.jit
def _sums(q_log2, k, v, top, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """exp(q_i k_j - max) as (BLOCK of j, TOKENS, BLOCK of i), its sum over j, and with v."""
    scores = tl.exp2(q_log2[None, :, :] * _along(k) - top[None, :, :])
    if EXPERTS < BLOCK:
        scores = tl.where((tl.arange(0, BLOCK) < EXPERTS)[:, None, None], scores, 0.0)
    return scores, tl.sum(scores, axis=0), tl.sum(scores * _along(v), axis=0)


@triton.jit
def attend_kernel(
    projected, z, tokens, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """z_i = sum_j A_ij v_j with A = softmax_j(q_i k_j)."""
    _, inside, _, k, v, q_log2, top = _attending(projected, tokens, EXPERTS, TOKENS, BLOCK)
    _, total, mixed = _sums(q_log2, k, v, top, EXPERTS, BLOCK)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    at = token[:, None] * EXPERTS + tl.arange(0, BLOCK)[None, :]
    tl.store(z + at, mixed / total, mask=inside)


@triton.jit
def attend_backward_kernel(
    projected, dz, d_projected, tokens,
    EXPERTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With D_ij = A_ij dz_i (v_j - z_i): dq_i = sum_j D_ij k_j, dk_j = sum_i D_ij q_i.

    And dv_j = sum_i A_ij dz_i.
    """
    at, inside, q, k, v, q_log2, top = _attending(projected, tokens, EXPERTS, TOKENS, BLOCK)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    offsets = token[:, None] * EXPERTS + tl.arange(0, BLOCK)[None, :]
    gradient = tl.load(dz + offsets, mask=inside, other=0.0)
    scores, total, mixed = _sums(q_log2, k, v, top, EXPERTS, BLOCK)
    z = mixed / total
    scaled = gradient / total  # dz_i A_ij is a score by this; 0 where there is no expert i
    centred = _along(v) - z[None, :, :]
    d_q = scaled * tl.sum(scores * centred * _along(k), axis=0)
    tl.store(d_projected + at, d_q, mask=inside)
    # The scores again, the tile the other way round: (BLOCK of i, TOKENS, BLOCK of j).
    scores = tl.exp2(_along(q_log2) * k[None, :, :] - _along(top))
    d_v = tl.sum(scores * _along(scaled), axis=0)
    centred = v[None, :, :] - _along(z)
    d_k = tl.sum(scores * centred * _along(scaled * q), axis=0)
    tl.store(d_projected + at + EXPERTS, d_k, mask=inside)
    tl.store(d_projected + at + 2 * EXPERTS, d_v, mask=inside)


# A float32 number is the sum of two that tensor cores take: tf32 keeps 11 of 24 bits. Of their four
# products the smallest is below float32's own rounding and omitted. Tensor cores also truncate what
# they add up, so their sums are kept to STEP terms, small products first, and those are added as
# float32 numbers are.


@triton.jit
def _split(x):
    """Two tf32 numbers whose sum is x to 22 bits; of nan the second is nan."""
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -8192).to(tl.float32, bitcast=True)  # to nearest
    low = (x - high).to(tl.int32, bitcast=True) & -8192
    return high, low.to(tl.float32, bitcast=True)


@triton.jit
def _dot(a_high, a_low, b_high, b_low):
    """(a_high + a_low) (b_high + b_low), but for a_low b_low."""
    total = tl.dot(a_low, b_high, input_precision="tf32")
    total = tl.dot(a_high, b_low, total, input_precision="tf32")
    return tl.dot(a_high, b_high, total, input_precision="tf32")


@triton.jit
def split_kernel(
    weight, high, low, high_t, low_t,
    COLUMNS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight (columns, dim) in two; and transposed, (dim, padded), with zeros after them."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (column < COLUMNS) & (channel < DIM)
    value = tl.load(weight + column * DIM + channel, mask=inside, other=0.0)
    first, second = _split(value)
    tl.store(high + column * DIM + channel, first, mask=inside)
    tl.store(low + column * DIM + channel, second, mask=inside)
    at = tl.trans(channel * PADDED + column)
    inside = tl.trans((column < PADDED) & (channel < DIM))
    tl.store(high_t + at, tl.trans(first), mask=inside)
    tl.store(low_t + at, tl.trans(second), mask=inside)


@triton.jit
def product_kernel(
    a, high, low, extra, y, rows,
    INNER: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As y = a (high + low)^T + extra: a is (rows, inner), high and low (columns, padded)."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, INNER, STEP, num_stages=STAGES):
        inner = start + tl.arange(0, STEP)
        inside = there & (inner < INNER)[None, :]
        left = tl.load(a + row[:, None] * INNER + inner[None, :], mask=inside, other=0.0)
        at = column[:, None] * PADDED + inner[None, :]
        inside = (column < COLUMNS)[:, None] & (inner < PADDED)[None, :]
        first = tl.load(high + at, mask=inside, other=0.0)
        second = tl.load(low + at, mask=inside, other=0.0)
        a_high, a_low = _split(left)
        total += _dot(a_high, a_low, tl.trans(first), tl.trans(second))
    at = row[:, None] * COLUMNS + column[None, :]
    inside = there & (column < COLUMNS)[None, :]
    if ADD:
        total += tl.load(extra + at, mask=inside, other=0.0)
    tl.store(y + at, total, mask=inside)
