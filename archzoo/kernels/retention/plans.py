"""How the retention kernels' work is cut into programs: sizes, measured or worked out.

For speed only: every plan computes the same. `launch` carries them out.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from archzoo.kernels.launching import power_of_2


class Cut(NamedTuple):
    """How a map, the sums of segments, or the fused backward is cut into programs."""

    block: int  # rows of the state that a program holds: columns of a and b
    tile: int  # columns of the state that it holds: columns of c and of the result
    warps: int
    stages: int
    # With warp specialisation: registers a thread, and those of the warps that multiply, which take
    # some over from the one that copies by TMA (0: none).
    warp_specialised: tuple[int, int] | None = None


class Pair(NamedTuple):
    """The two maps that share a state's shape and a chunk's own weights."""

    chunk: int  # tokens that a loop step takes
    scores: bool  # the chunk's own weights are made ahead, once for all tiles and both maps
    forward: Cut
    reverse: Cut


class Plan(NamedTuple):
    """How the work is cut: for speed only, every plan computes the same."""

    by_key: Pair  # o and dv: a and b are as wide as k
    by_value: Pair  # dq and dk: a and b are as wide as v
    sums: tuple[int, Cut]  # of segments: tokens a loop step, cut
    # dq, dk and dv in one kernel: tokens a loop step, as many as o's map takes, and cut
    fused_backward: tuple[int, Cut] | None = None

    @property
    def warp_specialised(self) -> bool:
        """Whether a kernel of it is."""
        cuts = [
            cut for pair in (self.by_key, self.by_value) for cut in (pair.forward, pair.reverse)
        ]
        cuts += [self.sums[1], (self.fused_backward or self.sums)[1]]
        return any(cut.warp_specialised for cut in cuts)


# Measured on an H200: docs/kernels/diary.md. Keys: the widths (dk, dv) up to which a row holds.
_BFLOAT16_PLANS: dict[tuple[int, int], Plan] = {
    (64, 64): Plan(
        *(Pair(64, False, Cut(64, 64, 4, 3), Cut(64, 64, 4, 3)),) * 2,
        sums=(64, Cut(64, 64, 4, 4)),
        fused_backward=(64, Cut(64, 64, 4, 2)),
    ),
    (128, 128): Plan(
        *(Pair(64, False, Cut(128, 128, 8, 3), Cut(128, 128, 8, 3)),) * 2,
        sums=(64, Cut(128, 128, 8, 3)),
    ),
    (128, 256): Plan(
        Pair(64, True, Cut(128, 128, 8, 3), Cut(128, 128, 8, 3)),
        Pair(32, True, Cut(256, 128, 8, 3), Cut(256, 128, 8, 3)),
        sums=(64, Cut(128, 128, 8, 3)),
    ),
    (256, 512): Plan(
        *(Pair(32, True, Cut(256, 128, 8, 3), Cut(256, 128, 8, 3)),) * 2,
        sums=(64, Cut(128, 128, 8, 3)),
    ),
}
# Bytes of shared memory that a program of these takes at most. An A100 has as many, others of its
# generation and GPUs for games have 99 KiB.
ROOM = 152 * 1024
# The same with warp specialisation, for whole rows of one document; by exact widths. Three groups
# of four warps, the backward's four: what a chunk of 64 leaves over goes to the group that makes
# its weights, and a narrow state alone leaves space for two programs on a multiprocessor.
_NARROW, _WIDE, _SUMS = (168, 200), (168, 216), (168, 240)
_WARP_SPECIALISED_PLANS: dict[tuple[int, int], Plan] = {
    (64, 64): _BFLOAT16_PLANS[64, 64]._replace(fused_backward=(64, Cut(64, 64, 12, 5, (128, 0)))),
    (128, 256): Plan(
        Pair(64, False, *(Cut(128, 128, 8, 4, _NARROW),) * 2),
        Pair(32, False, *(Cut(256, 128, 8, 5, _WIDE),) * 2),
        sums=(32, Cut(128, 128, 8, 6, (80, 104))),
    ),
    (256, 512): Plan(
        Pair(32, False, *(Cut(256, 128, 8, 5, _WIDE),) * 2),
        Pair(32, False, *(Cut(256, 128, 8, 4, _WIDE),) * 2),
        sums=(64, Cut(256, 128, 8, 4, _SUMS)),
    ),
}
# Segments are cut until the programs of dq and dk number this many: about one for each of the
# 132 multiprocessors of an H100 or H200, twice that where the heads are narrow.
_FILL = 128
_MULTIPROCESSORS = 132
_SEGMENT_LEAST = 512
_SEGMENT_MULTIPLE = 256  # of every chunk, so that they divide a segment
# Up to this many segments the maps of narrow heads join the sums themselves, instead of a kernel
# ahead of them. That kernel is a launch, some 6 us, and moves 2 s - 1 states of each of the (batch,
# head) rows, s segments; joining, a program reads (s - 1) / 2 states on average where it had read
# one. Of wide heads four maps would, 128 KB at a time: 30 us lost at 8 x 128 x 256 with 4 segments.
_JOINED = 8


def block_of(width: int) -> int:
    """The least power of two that holds a width and that tensor cores take."""
    return max(16, power_of_2(width))


@functools.lru_cache(maxsize=64)
def find_plan(
    dk: int, dv: int, dtype: torch.dtype, warp_specialised: bool = False, little: bool = False
) -> Plan:
    """The plan of these widths.

    Args:
        dk: Of keys.
        dv: Of values.
        dtype: Of the products.
        warp_specialised: On Hopper, for whole rows of one document.
        little: For a GPU whose programs have less shared memory than `ROOM`.
    """
    if warp_specialised and dtype == torch.bfloat16 and (dk, dv) in _WARP_SPECIALISED_PLANS:
        return _WARP_SPECIALISED_PLANS[dk, dv]
    wide_k, wide_v = block_of(dk), block_of(dv)
    if dtype == torch.float32:
        # Exact float32 has no tensor cores: small tiles, so that the products fit in registers.
        cut = Cut(64, 32, 4, 1)
        plan = Plan(*(Pair(32, wide_k > 64 or wide_v > 64, cut, cut),) * 2, sums=(32, cut))
    else:
        plan = next(
            plan
            for (limit_k, limit_v), plan in _BFLOAT16_PLANS.items()
            if wide_k <= limit_k and wide_v <= limit_v
        )

    def fit(cut: Cut, rows: int, columns: int) -> Cut:
        cut = cut._replace(block=min(cut.block, rows), tile=min(cut.tile, columns))
        if little:  # nothing is fetched ahead, and a large state is held in narrower parts
            cut = cut._replace(stages=1, tile=min(cut.tile, 64) if cut.block > 128 else cut.tile)
        return cut

    key, value, sums, fused = plan
    return plan._replace(
        by_key=key._replace(
            forward=fit(key.forward, wide_k, wide_v), reverse=fit(key.reverse, wide_k, wide_v)
        ),
        by_value=value._replace(
            forward=fit(value.forward, wide_v, wide_k), reverse=fit(value.reverse, wide_v, wide_k)
        ),
        sums=(sums[0], fit(sums[1], wide_k, wide_v)),
        fused_backward=fused and (fused[0], fit(fused[1], wide_k, wide_v)),
    )


def _fill(cut: Cut) -> int:
    """Programs that fill the chip: two fit on a multiprocessor where they are of four warps."""
    return _FILL if cut.warps > 4 else 2 * _FILL


def cut_segments(
    plan: Plan, rows: int, time: int, dk: int, backward: bool = False
) -> tuple[int, int]:
    """Cuts time so that every map fills the chip: (tokens a segment, segments).

    A fused backward has segments of its own, since it reads no state of the forward's.
    """
    cut = plan.by_value.forward
    if backward and plan.fused_backward is not None:
        _, cut = plan.fused_backward
    programs = rows * -(-dk // cut.tile)
    wanted = max(min(_fill(cut) // programs, time // _SEGMENT_LEAST), 1)
    if wanted == 1:
        return max(time, 1), 1
    segment = -(-time // wanted)
    segment = -(-segment // _SEGMENT_MULTIPLE) * _SEGMENT_MULTIPLE
    return segment, -(-time // segment)


def segments_per_program(plan: Plan, segments: int, dk: int, dv: int) -> int:
    """Segments that a program of o or dv takes, one after the other.

    Those maps have more tiles than dq and dk where values are wider than keys, and fill the chip
    with fewer segments. The first level leaves out what is taken last: half, not a quarter, of four
    segments.
    """
    if not plan.by_key.forward.warp_specialised:
        return 1
    each = max(-(-dv // plan.by_key.forward.tile) // -(-dk // plan.by_value.forward.tile), 1)
    return each if segments % each == 0 else 1


def fills_better_beside(plan: Plan, rows: int, segments: int, dk: int, dv: int) -> bool:
    """Whether dv, dk and dq take fewer turns of all multiprocessors if none waits for another.

    A program of a warp-specialised map takes a multiprocessor for itself. 16 rows of 3 heads are
    192 programs of dv and 96 of each half of dk and dq: 2 + 4 turns one after the other, and 5
    beside each other. Where a program of dv takes several segments it stores the states between
    them, which dk reads: then dk has to wait.
    """
    if plan.fused_backward is not None or not plan.by_key.reverse.warp_specialised:
        return False
    if segments_per_program(plan, segments, dk, dv) > 1:
        return False
    of_v = rows * -(-dv // plan.by_key.reverse.tile) * segments
    of_qk = rows * -(-dk // plan.by_value.reverse.tile) * segments
    programs = [of_v] * -(-dk // plan.by_key.reverse.block)
    programs += [of_qk] * (2 * -(-dv // plan.by_value.reverse.block))
    turns = sum(-(-count // _MULTIPROCESSORS) for count in programs)
    return -(-sum(programs) // _MULTIPROCESSORS) < turns


def sums_per_segment(plan: Plan, rows: int, segment: int, segments: int) -> int:
    """Sums of a segment that every program of a map joins itself; 0 where it joins none.

    More than one where whole segments would leave the chip idle.
    """
    if plan.fused_backward is None or not 1 < segments <= _JOINED:
        return 0
    _, cut = plan.sums
    sums = max(_fill(cut) // (rows * (segments - 1)), 1)
    while segment % (sums * _SEGMENT_MULTIPLE):
        sums -= 1
    return sums


@functools.lru_cache(maxsize=64)
def plan_step(
    state: tuple[int, ...], normalise: bool, positions: bool, starts: bool, valid: bool
) -> tuple[tuple[int, int], tuple[tuple[str, int], ...]]:
    """The programs of a step, by columns of the state and rows, and what `launch` takes by name."""
    batch, heads, dk, dv = state
    size, rows = batch * heads * dk * dv, batch * heads
    tile = 16 if size <= 2**21 else 32 if size <= 2**22 or rows < 1024 else 64
    tile = min(tile, block_of(dv))
    warps = 1 if block_of(dk) * tile <= 2048 else 4
    options = {"DK": dk, "DV": dv, "BLOCK_K": block_of(dk), "TILE": tile, "NORMALISE": normalise,
               "HAS_POSITIONS": positions, "HAS_STARTS": starts, "HAS_VALID": valid,
               "num_warps": warps}  # fmt: skip
    return (-(-dv // tile), rows), tuple(options.items())
