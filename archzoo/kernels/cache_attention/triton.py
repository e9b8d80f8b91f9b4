"""The Triton side of `archzoo.kernels.cache_attention`: imported only once the kernel is to run."""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

#: Whether this Triton can say where a kernel waits for the one before it.
CAN_BEGIN_EARLY = hasattr(cuda, "gdc_wait") and hasattr(cuda, "gdc_launch_dependents")

NOTHING = tl.constexpr(-1e30)  # below every score; finite, so that the difference of two is 0


@triton.jit
def read_rotated(x, table, channel, inside, PAIRS: tl.constexpr):
    """Channels of one head in float32, the first 2 * PAIRS of them turned by the table.

    A table holds cosine and sine of each pair in turn.
    """
    value = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    if PAIRS > 0:
        turns = inside & (channel < 2 * PAIRS)
        partner = tl.load(x + (channel ^ 1), mask=turns, other=0.0).to(tl.float32)
        cos = tl.load(table + (channel // 2) * 2, mask=turns, other=1.0)
        sin = tl.load(table + (channel // 2) * 2 + 1, mask=turns, other=0.0)
        value = value * cos + tl.where(channel % 2 == 0, -partner, partner) * sin
    return value


@triton.jit
def wait_for_last(EARLY: tl.constexpr):
    """Wait until the kernel before this one has ended; then the next may begin."""
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def read_keys(
    keys, values, marks, base, index, before, number, channel,
    SIZE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Keys and values at index (LANES, RUN), both (1, LANES, RUN, BLOCK_D), and which are seen."""
    seen = index < before
    if PACKED:
        seen = seen & (tl.load(marks + index, mask=seen, other=-2) == number)
    cell = base + index.to(tl.int64)[None, :, :, None] * SIZE + channel
    needed = seen[None, :, :, None] & (channel < SIZE)
    key = tl.load(keys + cell, mask=needed, other=0.0)
    value = tl.load(values + cell, mask=needed, other=0.0)
    return key, value, seen[None, :, :]


@triton.jit
def attend_kernel(
    q, k, v, keys, values, length, arrivals, documents, document, table, partial, y,
    q_row, q_head, k_row, k_head, v_row, v_head, table_row, document_row,
    kv_heads, group, capacity, splits, least, scale,
    SIZE: tl.constexpr, PAIRS: tl.constexpr, PACKED: tl.constexpr, EARLY: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, JOIN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token of a row against some of the keys of one key head, for GROUP of its queries.

    Of the `splits` programs of a place (a row, a key head and GROUP of its queries) as many work as
    have `least` blocks of LANES * RUN keys each, one at least; the s-th takes every so many-th
    block from the s-th on. So all have as much to do, whatever the length is, and the others return
    at once. The last that worked joins what all found. The last of all adds 1 to the place's
    length: by then everyone has read it. Both know from one counter, whose lower half counts those
    that worked; it is left at 0.

    A lane is some neighbouring threads, and keeps the softmax of its own keys, RUN of each block:
    so all threads meet once, at the end. The token's own key and value come from registers; the
    first lane of split 0 starts from them.

    With EARLY it begins while the kernel before it still runs, which makes q, k and v and has
    nothing to do with the cache: the first keys are loaded at once, all else once that has ended.
    """
    place = tl.program_id(0)
    split = tl.program_id(1)
    parts = (group + GROUP - 1) // GROUP
    part = place % parts
    pair = place // parts  # of a row and a key head
    head = pair % kv_heads
    row = pair // kv_heads
    block = LANES * RUN
    count = tl.load(arrivals + 2 * place + 1)
    before = tl.minimum(count, capacity)  # a full cache takes no more: nothing is written past it
    used = (before + block * least - 1) // (block * least)
    used = tl.maximum(tl.minimum(used, splits), 1)
    lane = tl.arange(0, LANES)
    of_group = part * GROUP + tl.arange(0, GROUP)
    depth = tl.arange(0, BLOCK_D)[None, :]
    out = y + (pair.to(tl.int64) * group + of_group[:, None]) * SIZE + depth
    answered = (of_group < group)[:, None] & (depth < SIZE)
    first = (place * splits).to(tl.int64) * GROUP
    softmaxes = partial + tl.num_programs(0).to(tl.int64) * splits * GROUP * BLOCK_D
    arrives = 1
    if split < used:
        channel = tl.arange(0, BLOCK_D)[None, None, None, :]
        inside = channel < SIZE
        base = pair.to(tl.int64) * capacity * SIZE
        number = tl.full((), 0, tl.int64)
        marks = documents
        if PACKED:
            wait_for_last(EARLY)
            number = tl.load(document + row * document_row)
            marks += row.to(tl.int64) * capacity
        index = split * block + lane[:, None] + LANES * tl.arange(0, RUN)[None, :]
        key, value, seen = read_keys(
            keys, values, marks, base, index, before, number, channel, SIZE, PACKED
        )
        if not PACKED:
            wait_for_last(EARLY)

        query = of_group[:, None, None, None]
        turn = table + row * table_row
        at = q + row * q_row + (head * group + query) * q_head
        asked = read_rotated(at, turn, channel, (query < group) & inside, PAIRS) * scale
        own = channel < tl.where(split == 0, SIZE, 0)
        new_key = read_rotated(k + row * k_row + head * k_head, turn, channel, own, PAIRS)
        new_key = new_key.to(keys.dtype.element_ty)
        new_value = tl.load(v + row * v_row + head * v_head + channel, mask=own, other=0.0)
        new_value = new_value.to(values.dtype.element_ty)
        if split + part == 0 and count < capacity:
            end = base + count.to(tl.int64) * SIZE + channel
            tl.store(keys + end, new_key, mask=own)
            tl.store(values + end, new_value, mask=own)
            if PACKED and head == 0:
                tl.store(marks + count, number)

        mine = lane[None, :] == tl.where(split == 0, 0, -1)
        own_score = tl.sum(tl.sum(asked * new_key.to(tl.float32), 3), 2)  # (GROUP, 1)
        own_value = tl.sum(new_value.to(tl.float32), 2)  # (1, 1, BLOCK_D)
        largest = tl.where(mine, own_score, NOTHING)  # (GROUP, LANES)
        total = tl.where(mine, 1.0, 0.0) + tl.zeros((GROUP, LANES), tl.float32)
        weighted = tl.where(mine[:, :, None], own_value, 0.0)
        weighted += tl.zeros((GROUP, LANES, BLOCK_D), tl.float32)

        for _ in range(split * block, before, used * block):
            score = tl.sum(asked * key.to(tl.float32), 3)  # (GROUP, LANES, RUN)
            score = tl.where(seen, score, NOTHING)
            reached = tl.maximum(largest, tl.max(score, 2))
            kept = tl.exp2(largest - reached)
            weight = tl.where(seen, tl.exp2(score - reached[:, :, None]), 0.0)
            total = total * kept + tl.sum(weight, 2)
            some = tl.sum(weight[:, :, :, None] * value.to(tl.float32), 2)
            weighted = weighted * kept[:, :, None] + some
            largest = reached
            index += used * block
            key, value, seen = read_keys(
                keys, values, marks, base, index, before, number, channel, SIZE, PACKED
            )

        most = tl.max(largest, 1)  # (GROUP,)
        here = tl.exp2(largest - most[:, None])
        whole = tl.sum(total * here, 1)
        found = tl.sum(weighted * here[:, :, None], 1)  # (GROUP, BLOCK_D)
        if used == 1:
            tl.store(out, (found / whole[:, None]).to(y.dtype.element_ty), mask=answered)
        else:
            slot = first + split * GROUP + tl.arange(0, GROUP)
            tl.store(partial + slot[:, None] * BLOCK_D + depth, found)
            tl.store(softmaxes + 2 * slot, most)
            tl.store(softmaxes + 2 * slot + 1, whole)
    else:
        arrives = 65536
    tl.debug_barrier()  # all of this program's threads have read the length, and written
    counted = tl.atomic_add(arrivals + 2 * place, arrives) + arrives
    if counted == used + (splits - used) * 65536:
        tl.store(arrivals + 2 * place, 0)
        tl.store(arrivals + 2 * place + 1, count + 1)
        if place == 0:
            tl.store(length, (count + 1).to(tl.int64))
    if used > 1 and split < used and counted % 65536 == used:
        source = tl.arange(0, JOIN)
        tops = tl.full((GROUP, JOIN), NOTHING, tl.float32)
        totals = tl.zeros((GROUP, JOIN), tl.float32)
        sums = tl.zeros((GROUP, JOIN, BLOCK_D), tl.float32)
        for start in range(0, used, JOIN):
            there = (start + source < used)[None, :]
            slots = first + (start + source)[None, :] * GROUP + tl.arange(0, GROUP)[:, None]
            # Not from the first-level cache, which knows nothing of other programs.
            their_top = tl.load(
                softmaxes + 2 * slots, mask=there, other=NOTHING, cache_modifier=".cg"
            )
            their_total = tl.load(
                softmaxes + 2 * slots + 1, mask=there, other=0.0, cache_modifier=".cg"
            )
            their_sum = tl.load(
                partial + slots[:, :, None] * BLOCK_D + depth[:, None, :],
                mask=there[:, :, None], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            higher = tl.maximum(tops, their_top)
            ours, theirs = tl.exp2(tops - higher), tl.exp2(their_top - higher)
            totals = totals * ours + their_total * theirs
            sums = sums * ours[:, :, None] + their_sum * theirs[:, :, None]
            tops = higher
        last = tl.exp2(tops - tl.max(tops, 1)[:, None])
        joined = tl.sum(sums * last[:, :, None], 1) / tl.sum(totals * last, 1)[:, None]
        tl.store(out, joined.to(y.dtype.element_ty), mask=answered)
