"""The Triton side of `archzoo.kernels.cache_attention`: imported only once the kernel is to run."""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

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
def attend_kernel(
    q, k, v, keys, values, length, arrivals, documents, document, table, partial, y,
    q_row, q_head, k_row, k_head, v_row, v_head, table_row, document_row,
    kv_heads, group, capacity, splits, scale,
    SIZE: tl.constexpr, PAIRS: tl.constexpr, PACKED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token of a row against some of the keys of one key head, for GROUP of its queries.

    Program (p, s) of `splits` takes every `splits`-th run of BLOCK_N keys from the s-th on, so that
    all have as much to do whatever the length is; those for which no run is left return at once.
    The last of p's programs to be done joins what all found. The last of all adds 1 to the length:
    by then everyone has read it. Both count arrivals, and leave the counters at 0.

    Each lane keeps the softmax of its own keys, so that the programs' threads meet once, at the
    end. The token's own key and value come from registers; split 0 starts from them.
    """
    place = tl.program_id(0)
    split = tl.program_id(1)
    places = tl.num_programs(0)
    parts = (group + GROUP - 1) // GROUP
    part = place % parts
    pair = place // parts  # of a row and a key head
    head = pair % kv_heads
    row = pair // kv_heads
    count = tl.load(length).to(tl.int32)
    before = tl.minimum(count, capacity)  # a full cache takes no more: nothing is written past it
    used = tl.minimum((before + BLOCK_N - 1) // BLOCK_N, splits)
    used = tl.maximum(used, 1)
    lane = tl.arange(0, BLOCK_N)
    of_group = part * GROUP + tl.arange(0, GROUP)
    if split < used:
        channel = tl.arange(0, BLOCK_D)[None, None, :]
        inside = channel < SIZE
        counts = (of_group < group)[:, None, None] & inside
        at = q + row * q_row + (head * group + of_group[:, None, None]) * q_head
        turn = table + row * table_row
        asked = read_rotated(at, turn, channel, counts, PAIRS) * scale
        base = pair.to(tl.int64) * capacity * SIZE

        own = channel < tl.where(split == 0, SIZE, 0)
        new_key = read_rotated(k + row * k_row + head * k_head, turn, channel, own, PAIRS)
        new_key = new_key.to(keys.dtype.element_ty)
        new_value = tl.load(v + row * v_row + head * v_head + channel, mask=own, other=0.0)
        new_value = new_value.to(values.dtype.element_ty)
        if PACKED:
            number = tl.load(document + row * document_row)
            marks = documents + row.to(tl.int64) * capacity
        if split + part == 0 and count < capacity:
            end = base + count.to(tl.int64) * SIZE + channel
            tl.store(keys + end, new_key, mask=own)
            tl.store(values + end, new_value, mask=own)
            if PACKED and head == 0:
                tl.store(marks + count, number)

        mine = lane[None, :] == tl.where(split == 0, 0, -1)
        own_score = tl.sum(asked * new_key.to(tl.float32), 2)  # (GROUP, 1)
        largest = tl.where(mine, own_score, NOTHING)  # (GROUP, BLOCK_N)
        total = tl.where(mine, 1.0, 0.0) + tl.zeros((GROUP, BLOCK_N), tl.float32)
        weighted = tl.where(mine[:, :, None], new_value.to(tl.float32), 0.0)
        weighted += tl.zeros((GROUP, BLOCK_N, BLOCK_D), tl.float32)

        for begin in range(split * BLOCK_N, before, splits * BLOCK_N):
            index = begin + lane
            seen = index < before
            if PACKED:
                seen = seen & (tl.load(marks + index, mask=seen, other=-2) == number)
            cell = base + index.to(tl.int64)[None, :, None] * SIZE + channel
            needed = seen[None, :, None] & inside
            key = tl.load(keys + cell, mask=needed, other=0.0)
            value = tl.load(values + cell, mask=needed, other=0.0)
            score = tl.sum(asked * key.to(tl.float32), 2)
            score = tl.where(seen[None, :], score, NOTHING)
            reached = tl.maximum(largest, score)
            kept = tl.exp2(largest - reached)
            weight = tl.where(seen[None, :], tl.exp2(score - reached), 0.0)
            total = total * kept + weight
            weighted = weighted * kept[:, :, None] + weight[:, :, None] * value.to(tl.float32)
            largest = reached

        most = tl.max(largest, 1)  # (GROUP,)
        here = tl.exp2(largest - most[:, None])
        whole = tl.sum(total * here, 1)
        found = tl.sum(weighted * here[:, :, None], 1)  # (GROUP, BLOCK_D)

        depth = tl.arange(0, BLOCK_D)[None, :]
        out = y + (pair.to(tl.int64) * group + of_group[:, None]) * SIZE + depth
        answered = (of_group < group)[:, None] & (depth < SIZE)
        if used == 1:
            tl.store(out, (found / whole[:, None]).to(y.dtype.element_ty), mask=answered)
        else:
            query = tl.arange(0, GROUP)
            first = (place * splits).to(tl.int64) * GROUP
            slot = first + split * GROUP + query
            softmaxes = partial + places.to(tl.int64) * splits * GROUP * BLOCK_D
            tl.store(partial + slot[:, None] * BLOCK_D + depth, found)
            tl.store(softmaxes + 2 * slot, most)
            tl.store(softmaxes + 2 * slot + 1, whole)
            tl.debug_barrier()  # all of this program's numbers are there before it arrives
            if tl.atomic_add(arrivals + place, 1) == used - 1:
                tl.store(arrivals + place, 0)
                tops = tl.full((GROUP, BLOCK_N), NOTHING, tl.float32)
                totals = tl.zeros((GROUP, BLOCK_N), tl.float32)
                sums = tl.zeros((GROUP, BLOCK_N, BLOCK_D), tl.float32)
                for start in range(0, used, BLOCK_N):
                    there = (start + lane < used)[None, :]
                    slots = first + (start + lane)[None, :] * GROUP + query[:, None]
                    # Not from the first-level cache, which knows nothing of other programs.
                    their_top = tl.load(
                        softmaxes + 2 * slots, mask=there, other=NOTHING, cache_modifier=".cg"
                    )
                    their_total = tl.load(
                        softmaxes + 2 * slots + 1, mask=there, other=0.0, cache_modifier=".cg"
                    )
                    their_sum = tl.load(
                        partial + slots[:, :, None] * BLOCK_D + channel,
                        mask=there[:, :, None], other=0.0, cache_modifier=".cg",
                    )  # fmt: skip
                    higher = tl.maximum(tops, their_top)
                    ours, theirs = tl.exp2(tops - higher), tl.exp2(their_top - higher)
                    totals = totals * ours + their_total * theirs
                    sums = sums * ours[:, :, None] + their_sum * theirs[:, :, None]
                    tops = higher
                ours_last = tl.exp2(tops - tl.max(tops, 1)[:, None])
                joined = tl.sum(sums * ours_last[:, :, None], 1)
                joined = joined / tl.sum(totals * ours_last, 1)[:, None]
                tl.store(out, joined.to(y.dtype.element_ty), mask=answered)
    tl.debug_barrier()  # all of this program's threads have read the length
    if tl.atomic_add(arrivals + places, 1) == places * splits - 1:
        tl.store(arrivals + places, 0)
        tl.store(length, (count + 1).to(tl.int64))
