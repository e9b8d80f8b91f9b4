"""Retention as a fused kernel, and the facts by which it is chosen.

    S_n = gamma S_(n-1) + k_n^T v_n        o_n = q_n S_n / sqrt(s_n)        s_n = sum_{j<=n} gamma^j

`retention` computes this for a whole piece of a sequence, forward and backward, in Triton;
`retention_step` computes it for one token and updates the state in place. The plain PyTorch form
in `archzoo.mixers.retention` is the twin that both are tested against, and what runs wherever
`unavailable` names a reason. Derivation and measurements: docs/kernels.md; the method: Retentive
Network, arXiv 2307.08621.

Importing this module needs neither Triton nor a GPU: both are looked for at the first call.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["available", "retention", "retention_step", "unavailable"]

MAX_KEY_WIDTH = 256
MAX_VALUE_WIDTH = 512
_TRITON_FOUND = importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    """True where Triton's kernels run on the CPU through its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> str | None:
    """Why the kernels cannot take these tensors; None where they can.

    Args:
        q: queries, (batch, time, heads, dk).
        k: keys, (batch, time, heads, dk).
        v: values, (batch, time, heads, dv).
        log_decay: log gamma, (heads,); one that wants a gradient is refused.
    """
    if not _TRITON_FOUND:
        return "triton is not installed"
    if q.device.type != "cuda" and not (_interpreting() and q.device.type == "cpu"):
        return f"the kernels need a CUDA device, the tensors are on {q.device.type}"
    if torch.version.hip is not None:
        return "the kernels were never run on ROCm"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v have different dtypes: {q.dtype}, {k.dtype}, {v.dtype}"
    if q.dtype not in (torch.bfloat16, torch.float32):
        return f"the kernels take bfloat16 and float32, not {q.dtype}"
    if q.shape[-1] > MAX_KEY_WIDTH or v.shape[-1] > MAX_VALUE_WIDTH:
        return (
            f"the kernels take dk up to {MAX_KEY_WIDTH} and dv up to {MAX_VALUE_WIDTH}, "
            f"not {q.shape[-1]} and {v.shape[-1]}"
        )
    if log_decay is not None and log_decay.requires_grad and torch.is_grad_enabled():
        return "the kernels give no gradient to the decay"
    return None


def available(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> bool:
    """True where the kernels can take these tensors, see `unavailable`."""
    return unavailable(q, k, v, log_decay) is None


class Cut(NamedTuple):
    """How one of the four maps is cut into programs."""

    block: int  # rows of the state that a program holds: columns of a and b
    tile: int  # columns of the state that it holds: columns of c and of the result
    warps: int
    stages: int


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
    sums: tuple[int, Cut, int]  # of segments: tokens a loop step, cut, pieces to a segment
    together: tuple[int, Cut] | None = None  # dk and dv in one walk: tokens a loop step, cut


# Measured on an H200, see docs/kernels.md. Keys: the widths (dk, dv) up to which a row holds.
_BFLOAT16_PLANS: dict[tuple[int, int], Plan] = {
    (64, 64): Plan(
        *(Pair(64, False, Cut(64, 64, 4, 3), Cut(64, 64, 4, 3)),) * 2,
        sums=(64, Cut(64, 64, 4, 4), 1),
        together=(64, Cut(64, 64, 4, 3)),
    ),
    (128, 128): Plan(
        *(Pair(64, False, Cut(128, 128, 8, 3), Cut(128, 128, 8, 3)),) * 2,
        sums=(64, Cut(128, 128, 8, 3), 1),
    ),
    (128, 256): Plan(
        Pair(64, True, Cut(128, 128, 8, 3), Cut(128, 128, 8, 3)),
        Pair(32, True, Cut(256, 128, 8, 3), Cut(256, 128, 8, 3)),
        sums=(64, Cut(128, 128, 8, 3), 1),
    ),
    (256, 512): Plan(
        *(Pair(32, True, Cut(256, 128, 8, 3), Cut(256, 128, 8, 3)),) * 2,
        sums=(64, Cut(128, 128, 8, 3), 1),
    ),
}
# Segments are cut until the programs of dq and dk number this many: about one for each of the
# 132 multiprocessors of an H100 or H200, twice that where the heads are narrow.
_FILL = 128
_SEGMENT_LEAST = 512
_SEGMENT_MULTIPLE = 256  # of every chunk and piece, so that they divide a segment
_PREPARED = 256  # shapes whose launches are kept ready


def _power_of_2(number: int) -> int:
    """The least power of two that holds `number` and that a matrix unit takes."""
    return max(16, 1 << (number - 1).bit_length())


@functools.lru_cache(maxsize=64)
def _plan(dk: int, dv: int, dtype: torch.dtype) -> Plan:
    wide_k, wide_v = _power_of_2(dk), _power_of_2(dv)
    if dtype == torch.float32:
        # Exact float32 has no matrix unit: small tiles, so that the products fit in registers.
        cut = Cut(64, 32, 4, 1)
        plan = Plan(*(Pair(32, wide_k > 64 or wide_v > 64, cut, cut),) * 2, sums=(32, cut, 1))
    else:
        plan = next(
            plan
            for (limit_k, limit_v), plan in _BFLOAT16_PLANS.items()
            if wide_k <= limit_k and wide_v <= limit_v
        )

    def fit(cut: Cut, rows: int, columns: int) -> Cut:
        return cut._replace(block=min(cut.block, rows), tile=min(cut.tile, columns))

    key, value, sums, together = plan
    return Plan(
        key._replace(
            forward=fit(key.forward, wide_k, wide_v), reverse=fit(key.reverse, wide_k, wide_v)
        ),
        value._replace(
            forward=fit(value.forward, wide_v, wide_k), reverse=fit(value.reverse, wide_v, wide_k)
        ),
        (sums[0], fit(sums[1], wide_k, wide_v), sums[2]),
        together and (together[0], fit(together[1], wide_k, wide_v)),
    )


def _segments(plan: Plan, rows: int, time: int, dk: int) -> tuple[int, int]:
    """Cuts time so that every map fills the chip: (tokens a segment, segments)."""
    cut = plan.by_value.forward
    programs = rows * -(-dk // cut.tile)
    fill = _FILL if cut.warps > 4 else 2 * _FILL
    wanted = max(min(fill // programs, time // _SEGMENT_LEAST), 1)
    if wanted == 1:
        return max(time, 1), 1
    segment = -(-time // wanted)
    segment = -(-segment // _SEGMENT_MULTIPLE) * _SEGMENT_MULTIPLE
    return segment, -(-time // segment)


def _unit_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """As the copy engine wants it: unit last stride, every other stride and the base 16 bytes."""
    size = 16 // tensor.element_size()
    batch, time, heads, unit = tensor.stride()
    if (
        unit == 1
        and batch % size == time % size == heads % size == 0
        and min(batch, time, heads) > 0
        and tensor.data_ptr() % 16 == 0
    ):
        return tensor
    *shape, width = tensor.shape
    room = tensor.new_empty((*shape, -(-width // size) * size))
    room[..., :width] = tensor
    return room[..., :width]


def _state_like(tensor: Tensor | None) -> Tensor | None:
    """A state as the kernels read it: float32, contiguous, its base at 16 bytes."""
    if tensor is None:
        return None
    tensor = tensor.float().contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _allocate(size: int, _alignment: int, _stream: int | None) -> Tensor:
    """Scratch memory in which a launch's programs put their descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a launcher where its first tensor lies, with scratch memory for its kernels."""

    @functools.wraps(function)
    def launch(first: Tensor, *arguments: Any) -> Any:
        if not first.is_cuda:
            return function(first, *arguments)
        import triton

        triton.set_allocator(_allocate)
        if first.device.index == torch.cuda.current_device():
            return function(first, *arguments)
        with torch.cuda.device(first.device):
            return function(first, *arguments)

    return launch


def _stream_of(tensor: Tensor) -> int | None:
    """The stream to launch on, None where the interpreter runs."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


class _Launch:
    """A kernel whose grid, numbers and constants are settled: a call hands over pointers alone.

    Triton finds the compiled kernel anew at every launch, from the type, value and alignment of
    each argument, which takes longer than most of these kernels run. Here it does so once. So an
    instance must see the same dtypes and alignments at every call.

    Args:
        kernel: with parameters in the order pointers, numbers, constants.
        grid: programs.
        numbers: strides and sizes, in the kernel's order.
        constants: compile-time parameters by name.
        options: `num_warps` and `num_stages`.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: tuple[int, ...],
        constants: dict[str, Any],
        **options: int,
    ) -> None:
        self.kernel, self.grid, self.numbers = kernel, grid, numbers
        self.constants, self.options = constants, options
        self.compiled: Callable[..., None] | None = None
        names = kernel.arg_names[-len(constants) :]
        self.rest = (*numbers, *(constants[name] for name in names))

    def __call__(self, stream: int | None, *tensors: Tensor) -> None:
        if self.compiled is None:
            handle = self.kernel[self.grid](
                *tensors, *self.numbers, **self.constants, **self.options
            )
            if handle is not None:  # the interpreter compiles nothing
                self.compiled = handle[self.grid]
        else:
            # As plain numbers, for Triton asks the driver about every tensor it is given.
            self.compiled(*[x.data_ptr() for x in tensors], *self.rest, stream=stream)


class _Facts(NamedTuple):
    """All that a pass depends on but the contents of its tensors: the key of what is prepared."""

    batch: int
    time: int
    heads: int
    dk: int
    dv: int
    dtype: torch.dtype
    device: torch.device
    decay_dtype: torch.dtype
    strides: tuple[tuple[int, ...], ...]  # of q, k, v, and backward do
    state: bool  # one is given
    positions: bool
    documents: bool
    ranges: bool
    scale: bool
    leave: bool  # the last state is wanted; backward: its gradient is given

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def normaliser_rows(self) -> int:
        """Rows of the table of normalisers: one a head where all batch rows count alike."""
        if not self.scale:
            return 0
        return self.rows if self.positions or self.ranges else self.heads

    def constants(self, *names: str) -> dict[str, Any]:
        """Compile-time parameters that many kernels share, those of the given names."""
        every = {
            "SCALE": self.scale,
            "HAS_DOCUMENTS": self.documents,
            "HAS_RANGES": self.ranges,
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
            "UPCAST": self.device.type == "cpu",
        }
        return {name: every[name] for name in names} if names else every


class _Prepared(NamedTuple):
    """The launches of one pass; empty ones are not needed."""

    plan: Plan
    segment: int
    segments: int
    normaliser: _Launch | None
    sums: tuple[_Launch, _Launch] | None  # of segments, and their joining
    pieces: int
    scores: _Launch | None
    maps: tuple[tuple[_Launch, ...], ...]  # each by its splits: o; dv, dk, dq; or together, dq


def _contiguous(width: int, facts: _Facts) -> tuple[int, int, int]:
    """Strides of a result, see `_output`."""
    size = 16 // facts.dtype.itemsize
    padded = -(-width // size) * size
    return facts.time * facts.heads * padded, facts.heads * padded, padded


def _prepare_segments(
    facts: _Facts, plan: Plan, segment: int, segments: int, reverse: bool
) -> tuple[tuple[_Launch, _Launch], int]:
    """The two-level pass over (k, v), or over (q, do) backward in time; and its pieces."""
    from archzoo.kernels import retention_triton as kernels

    chunk, cut, parts = plan.sums
    piece = segment // parts
    pieces = -(-facts.time // piece)
    # Nothing follows the segment walked last, so its sum counts only towards the last state.
    first, stop = 0, pieces
    leave = facts.state if reverse else facts.leave
    if not leave:
        first, stop = (parts, pieces) if reverse else (0, (segments - 1) * parts)
    strides = facts.strides[::3] if reverse else facts.strides[1:]
    tiles = -(-facts.dk // cut.block) * -(-facts.dv // cut.tile)
    sums = _Launch(
        kernels.segment_sums_kernel,
        (tiles, facts.rows, stop - first),
        (*strides[0], *strides[1], facts.time, piece, pieces, facts.heads,
         max(facts.normaliser_rows, 1), first),
        {"B": facts.dk, "C": facts.dv, "BLOCK_B": cut.block, "TILE": cut.tile, "CHUNK": chunk,
         "REVERSE": reverse, **facts.constants()},
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    elements = facts.dk * facts.dv
    join = _Launch(
        kernels.join_kernel,
        (-(-elements // 1024), facts.rows, 1),
        (facts.time, piece, segments, pieces, facts.heads, elements),
        {"BLOCK": 1024, "REVERSE": reverse, "PER_SEGMENT": parts,
         "HAS_INITIAL": facts.leave if reverse else facts.state, "HAS_FINAL": leave,
         **facts.constants("HAS_DOCUMENTS", "HAS_RANGES")},
    )  # fmt: skip
    return (sums, join), pieces


def _prepare_scores(
    facts: _Facts,
    pair: Pair,
    width: int,
    strides_a: tuple[int, ...],
    strides_b: tuple[int, ...],
) -> _Launch | None:
    """The chunks' own weights, where a pair of maps has them made ahead."""
    from archzoo.kernels import retention_triton as kernels

    if not pair.scores:
        return None
    chunks = -(-facts.time // pair.chunk)
    return _Launch(
        kernels.scores_kernel,
        (chunks, facts.rows, 1),
        (*strides_a, *strides_b, facts.time, facts.heads, chunks, max(facts.normaliser_rows, 1)),
        {"A": width, "BLOCK_A": min(64, pair.forward.block), "CHUNK": pair.chunk,
         **facts.constants()},
        num_warps=4, num_stages=3,
    )  # fmt: skip


def _prepare_map(
    facts: _Facts,
    pair: Pair,
    segment: int,
    segments: int,
    widths: tuple[int, int],
    strides: tuple[tuple[int, ...], ...],
    reverse: bool,
    transposed: bool,
    entering: bool,
    leaving: bool,
) -> tuple[_Launch, ...]:
    """out_i = sum_{j <= i} gamma^(i-j) (a_i . b_j) c_j, see `retention_triton`: its splits.

    Args:
        facts: of the pass.
        pair: how it is cut.
        segment: tokens a segment.
        segments: their number.
        widths: of a and b, and of c.
        strides: of a, b and c.
        reverse: whether it walks backward in time.
        transposed: whether states are (columns, rows) of this map's.
        entering: whether states enter the segments.
        leaving: whether the last one is wanted.
    """
    from archzoo.kernels import retention_triton as kernels

    width, columns = widths
    cut = pair.reverse if reverse else pair.forward
    stride_a, stride_c = (1, width) if transposed else (columns, 1)
    return tuple(
        _Launch(
            kernels.stream_kernel,
            (-(-columns // cut.tile), facts.rows, segments),
            (*strides[0], *strides[1], *strides[2], *_contiguous(columns, facts),
             facts.time, segment, segments, facts.heads, -(-facts.time // pair.chunk), split,
             stride_a, stride_c, max(facts.normaliser_rows, 1)),
            {"A": width, "C": columns, "BLOCK_A": cut.block, "TILE": cut.tile,
             "CHUNK": pair.chunk, "REVERSE": reverse, "HAS_ENTERING": entering,
             "HAS_LEAVING": leaving, "HAS_SCORES": pair.scores, "ADD": split > 0,
             **facts.constants()},
            num_warps=cut.warps, num_stages=cut.stages,
        )
        for split in range(-(-width // cut.block))
    )  # fmt: skip


def _prepare_together(
    facts: _Facts, plan: Plan, segment: int, segments: int, entering: bool, leaving: bool
) -> tuple[_Launch]:
    """The launch of dk and dv in one walk, where a program holds the whole state."""
    from archzoo.kernels import retention_triton as kernels

    assert plan.together is not None
    chunk, cut = plan.together
    strides = (*facts.strides, _contiguous(facts.dk, facts), _contiguous(facts.dv, facts))
    return (
        _Launch(
            kernels.reverse_kernel,
            (facts.rows, segments, 1),
            (*sum(strides, ()), facts.time, segment, segments, facts.heads,
             max(facts.normaliser_rows, 1)),
            {"K": facts.dk, "V": facts.dv, "BLOCK_K": cut.block, "BLOCK_V": cut.tile,
             "CHUNK": chunk, "HAS_ENTERING": entering, "HAS_LEAVING": leaving,
             **facts.constants()},
            num_warps=cut.warps, num_stages=cut.stages,
        ),
    )  # fmt: skip


@functools.lru_cache(maxsize=_PREPARED)
def _prepare_forward(facts: _Facts) -> _Prepared:
    from archzoo.kernels import retention_triton as kernels

    plan = _plan(facts.dk, facts.dv, facts.dtype)
    segment, segments = _segments(plan, facts.rows, facts.time, facts.dk)
    strides_q, strides_k, strides_v = facts.strides
    normaliser = _Launch(
        kernels.normaliser_kernel,
        (-(-facts.time // 512), facts.normaliser_rows, 1),
        (facts.time, facts.heads),
        {
            "BLOCK": 512,
            "HAS_POSITIONS": facts.positions,
            **facts.constants("HAS_RANGES"),
        },
    )
    many = segments > 1
    sums, pieces = _prepare_segments(facts, plan, segment, segments, False) if many else (None, 0)
    o = _prepare_map(
        facts, plan.by_key, segment, segments, (facts.dk, facts.dv),
        (strides_q, strides_k, strides_v), False, False, many or facts.state,
        facts.leave and not many,
    )  # fmt: skip
    return _Prepared(
        plan,
        segment,
        segments,
        normaliser if facts.scale else None,
        sums,
        pieces,
        _prepare_scores(facts, plan.by_key, facts.dk, strides_q, strides_k),
        (o,),
    )


@functools.lru_cache(maxsize=_PREPARED)
def _prepare_backward(facts: _Facts) -> _Prepared:
    plan = _plan(facts.dk, facts.dv, facts.dtype)
    segment, segments = _segments(plan, facts.rows, facts.time, facts.dk)
    q, k, v, do = facts.strides
    many = segments > 1
    sums, pieces = _prepare_segments(facts, plan, segment, segments, True) if many else (None, 0)
    prepare = functools.partial(_prepare_map, facts)
    by_key, by_value = (facts.dk, facts.dv), (facts.dv, facts.dk)
    arriving, leaving = many or facts.leave, facts.state and not many
    maps: tuple[tuple[_Launch, ...], ...]
    if plan.together is not None:
        maps = (_prepare_together(facts, plan, segment, segments, arriving, leaving),)
    else:
        maps = (
            prepare(plan.by_key, segment, segments, by_key, (k, q, do), True, False, arriving,
                    leaving),
            prepare(plan.by_value, segment, segments, by_value, (v, do, q), True, True, arriving,
                    False),
        )  # fmt: skip
    of_q = prepare(
        plan.by_value, segment, segments, by_value, (do, v, k), False, True, many or facts.state,
        False,
    )  # fmt: skip
    scores = _prepare_scores(facts, plan.by_value, facts.dv, do, v)
    return _Prepared(plan, segment, segments, None, sums, pieces, scores, (*maps, of_q))


def _run_segments(
    prepared: _Prepared,
    facts: _Facts,
    stream: int | None,
    tensors: tuple[Tensor, Tensor],
    initial: Tensor | None,
    leave: bool,
    log_decay: Tensor,
    pointers: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The two-level pass: the state that enters each segment, and the last one (or empty)."""
    assert prepared.sums is not None
    empty = functools.partial(torch.empty, dtype=torch.float32, device=facts.device)
    state = (facts.batch, facts.heads, facts.dk, facts.dv)
    sums = empty((facts.rows, prepared.pieces, facts.dk, facts.dv))
    entering = empty((*state[:2], prepared.segments, *state[2:]))
    final = empty(state if leave else (0,))
    prepared.sums[0](stream, *tensors, sums, log_decay, *pointers)
    prepared.sums[1](
        stream, sums, entering, sums if initial is None else initial, final, log_decay,
        *pointers[1:],
    )  # fmt: skip
    return entering, final


def _scores_shape(facts: _Facts, pair: Pair) -> tuple[int, ...]:
    """Room for the chunks' own weights, see `scores_kernel`."""
    rows = facts.rows * -(-facts.time // pair.chunk) * pair.chunk
    return (rows, pair.chunk) if pair.scores else (0,)


def _output(like: Tensor, padded: bool) -> Tensor:
    """Room for a result, (batch, time, heads, width), aligned for the copy engine.

    Zeros where there is padding: tokens before a row's first are written by nobody.
    """
    make = torch.zeros if padded else torch.empty
    size = 16 // like.element_size()
    *shape, width = like.shape
    if width % size == 0:
        return make((*shape, width), dtype=like.dtype, device=like.device)
    padded_width = -(-width // size) * size
    return make((*shape, padded_width), dtype=like.dtype, device=like.device)[..., :width]


def _run_map(
    launches: tuple[_Launch, ...],
    abc: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    scores: Tensor,
    stream: int | None,
    log_decay: Tensor,
    pointers: tuple[Tensor, Tensor, Tensor],
    entering: Tensor | None,
    leaving: Tensor | None,
) -> None:
    absent = pointers[0]
    for launch in launches:
        launch(
            stream, *abc, out, scores, log_decay, *pointers,
            absent if entering is None else entering,
            absent if leaving is None else leaving,
        )  # fmt: skip


def _facts(
    q: Tensor,
    v: Tensor,
    log_decay: Tensor,
    strides: tuple[tuple[int, ...], ...],
    state: bool,
    positions: bool,
    documents: Tensor | None,
    ranges: Tensor | None,
    scale: bool,
    leave: bool,
) -> _Facts:
    batch, time, heads, dk = q.shape
    return _Facts(
        batch, time, heads, dk, v.shape[-1], q.dtype, q.device, log_decay.dtype, strides, state,
        positions, documents is not None, ranges is not None, scale, leave,
    )  # fmt: skip


@_on_its_device
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    positions: Tensor | None,
    documents: Tensor | None,
    ranges: Tensor | None,
    scale: bool,
    leave: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and last state; and, to keep: states entering segments, normalisers, scores.

    What there is no use for is empty.
    """
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    strides = q.stride()[:3], k.stride()[:3], v.stride()[:3]
    facts = _facts(
        q, v, log_decay, strides, state is not None, positions is not None, documents, ranges,
        scale, leave,
    )  # fmt: skip
    prepared = _prepare_forward(facts)
    stream = _stream_of(q)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    normaliser = empty((facts.normaliser_rows, facts.time))
    # Tensors that are absent are never read.
    pointers = (
        normaliser,
        normaliser if documents is None else documents,
        normaliser if ranges is None else ranges,
    )
    if prepared.normaliser is not None:
        prepared.normaliser(
            stream, normaliser, log_decay, normaliser if positions is None else positions,
            pointers[2],
        )  # fmt: skip
    source = _state_like(state)
    leaving = None
    if prepared.sums is not None:
        entering, final = _run_segments(
            prepared, facts, stream, (k, v), source, leave, log_decay, pointers
        )
        source = entering
    else:
        entering = empty((0,))
        final = empty((facts.batch, facts.heads, facts.dk, facts.dv) if leave else (0,))
        leaving = final if leave else None
    scores = q.new_empty(_scores_shape(facts, prepared.plan.by_key))
    if prepared.scores is not None:
        prepared.scores(stream, q, k, scores, log_decay, *pointers)
    o = _output(v, facts.ranges)
    _run_map(prepared.maps[0], (q, k, v), o, scores, stream, log_decay, pointers, source, leaving)
    return o, final, entering, normaliser, scores


@_on_its_device
def _backward(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    entering: Tensor,
    normaliser: Tensor,
    scores: Tensor,
    documents: Tensor | None,
    ranges: Tensor | None,
    scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of the entering state (empty without one)."""
    q, k, v, do = _aligned(q), _aligned(k), _aligned(v), _aligned(do)
    strides = q.stride()[:3], k.stride()[:3], v.stride()[:3], do.stride()[:3]
    facts = _facts(
        q, v, log_decay, strides, state is not None, normaliser.shape[0] > q.shape[2], documents,
        ranges, scale, d_final is not None,
    )  # fmt: skip
    prepared = _prepare_backward(facts)
    stream = _stream_of(q)
    pointers = (
        normaliser,
        normaliser if documents is None else documents,
        normaliser if ranges is None else ranges,
    )
    source, arriving = _state_like(state), _state_like(d_final)
    leaving = None
    empty = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    if prepared.sums is not None:
        source = entering
        arriving, d_state = _run_segments(
            prepared, facts, stream, (q, do), arriving, facts.state, log_decay, pointers
        )
    elif facts.state:
        leaving = d_state = empty((facts.batch, facts.heads, facts.dk, facts.dv))
    else:
        d_state = empty((0,))
    absent = normaliser
    grad_q, grad_k, grad_v = (_output(x, facts.ranges) for x in (q, k, v))
    *reverse, of_q = prepared.maps
    run = functools.partial(_run_map, stream=stream, log_decay=log_decay, pointers=pointers)
    if prepared.plan.together is None:
        run(reverse[0], (k, q, do), grad_v, scores, entering=arriving, leaving=leaving)
    else:
        reverse[0][0](
            stream, q, k, v, do, grad_k, grad_v, log_decay, *pointers,
            absent if arriving is None else arriving, absent if leaving is None else leaving,
        )  # fmt: skip
    if prepared.scores is not None:
        scores = q.new_empty(_scores_shape(facts, prepared.plan.by_value))
        prepared.scores(stream, do, v, scores, log_decay, *pointers)
    if prepared.plan.together is None:
        run(reverse[1], (v, do, q), grad_k, scores, entering=arriving, leaving=None)
    run(of_q, (do, v, k), grad_q, scores, entering=source, leaving=None)
    if state is not None and documents is not None:
        # A row that opens with a new document never looked at the state that entered.
        at = torch.zeros_like(documents[:, :1]) if ranges is None else ranges[:, :1]
        unread = documents.gather(1, at.long()) != 0
        d_state.masked_fill_(unread[:, :, None, None], 0.0)
    return grad_q, grad_k, grad_v, d_state


_library = torch.library.Library("archzoo", "FRAGMENT")
_library.define(
    "retention(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? positions, "
    "Tensor? documents, Tensor? ranges, bool scale, bool leave) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "retention_backward(Tensor do, Tensor? d_final, Tensor q, Tensor k, Tensor v, "
    "Tensor log_decay, Tensor? state, Tensor entering, Tensor normaliser, Tensor scores, "
    "Tensor? documents, Tensor? ranges, bool scale) -> (Tensor, Tensor, Tensor, Tensor)"
)
for _key in ("CPU", "CUDA"):
    _library.impl("retention", _forward, _key)
    _library.impl("retention_backward", _backward, _key)


@torch.library.register_fake("archzoo::retention", lib=_library)
def _forward_fake(  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, positions, documents, ranges, scale, leave
):
    batch, time, heads, dk = q.shape
    dv = v.shape[-1]
    plan = _plan(dk, dv, q.dtype)
    _, segments = _segments(plan, batch * heads, time, dk)
    chunk = plan.by_key.chunk
    scores = (batch * heads * -(-time // chunk) * chunk, chunk) if plan.by_key.scores else (0,)
    empty = functools.partial(q.new_empty, dtype=torch.float32)
    rows = heads if positions is None and ranges is None else batch * heads
    return (
        _output(v, False),
        empty((batch, heads, dk, dv) if leave else (0,)),
        empty((batch, heads, segments, dk, dv) if segments > 1 else (0,)),
        empty((rows if scale else 0, time)),
        q.new_empty(scores),
    )


@torch.library.register_fake("archzoo::retention_backward", lib=_library)
def _backward_fake(  # type: ignore[no-untyped-def]
    do, d_final, q, k, v, log_decay, state, entering, normaliser, scores, documents, ranges, scale
):
    batch, _, heads, dk = q.shape
    dv = v.shape[-1]
    shape = (0,) if state is None else (batch, heads, dk, dv)
    return (
        _output(q, False),
        _output(k, False),
        _output(v, False),
        q.new_empty(shape, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, _, documents, ranges, scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_decay, state, *output[2:], documents, ranges)
    ctx.scale = scale


def _gradients(  # type: ignore[no-untyped-def]
    ctx, do: Tensor | None, d_final: Tensor | None, backward: Callable[..., Any]
):
    """Of every argument of `_forward`."""
    q, k, v, log_decay, state, *kept, documents, ranges = ctx.saved_tensors
    if torch.is_grad_enabled():
        raise NotImplementedError("the retention kernels have no second derivative")
    if do is None:
        do = torch.zeros_like(v)
    grad_q, grad_k, grad_v, d_state = backward(
        do, d_final, q, k, v, log_decay, state, *kept, documents, ranges, ctx.scale
    )
    d_state = None if state is None else d_state.to(state.dtype)
    return grad_q, grad_k, grad_v, None, d_state, None, None, None, None, None


def _operator_gradients(ctx, do, d_final, *_):  # type: ignore[no-untyped-def]
    return _gradients(ctx, do, d_final, torch.ops.archzoo.retention_backward)


torch.library.register_autograd(
    "archzoo::retention", _operator_gradients, setup_context=_setup_context, lib=_library
)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher, whose way into Python costs more than the launches."""

    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[no-untyped-def]
        output = _forward(*arguments)
        _setup_context(ctx, arguments, output)
        return output[:2]

    @staticmethod
    def backward(ctx, do, d_final):  # type: ignore[no-untyped-def]
        return _gradients(ctx, do, d_final, _backward)


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and last state of `_forward`'s arguments, by the shortest way there is."""
    if torch.compiler.is_compiling() or type(arguments[0]) is not Tensor:  # fake ones, say
        o, final, *_ = torch.ops.archzoo.retention(*arguments)
        return o, final
    if torch.is_grad_enabled():
        o, final = _Eager.apply(*arguments)
        return o, final
    return _forward(*arguments)[:2]


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    starts: Tensor | None = None,
    valid: Tensor | None = None,
    scale: bool = True,
    return_state: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention over a piece of a sequence, fused, differentiable in q, k, v and state.

        S_n = gamma S_(n-1) + k_n^T v_n,   o_n = q_n S_n / sqrt(s_n),   s_n = sum_{j<=n} gamma^j

    Memory: the backward keeps q, k, v and at most one state per 512 tokens and head.
    Deterministic, and never waits for the device.

    Args:
        q: rotated queries, (batch, time, heads, dk), any strides with a unit last one.
        k: rotated keys, already scaled, (batch, time, heads, dk).
        v: values, (batch, time, heads, dv).
        log_decay: log gamma <= 0 of each head, (heads,), float32 or float64; 0 is no decay.
        state: S before the first token, (batch, heads, dk, dv) float32, or None for zero.
        positions: n, the position of each token in its document, (batch, time) int. None: counted
            from the row's first valid token, which is right for one document a row and no state.
        starts: True at the first token of a document: S is zero before it. (batch, time) bool.
        valid: False at padding, which may stand only at the ends of a row: it leaves S as it is
            and its output is 0. (batch, time) bool.
        scale: divide by sqrt(s_n).
        return_state: whether the last S is wanted. None: where a state was given.

    Returns:
        o, (batch, time, heads, dv) in v's dtype, and S after the last valid token,
        (batch, heads, dk, dv) float32, or None where it is not wanted.

    Raises:
        RuntimeError: the kernels cannot take these tensors; the message says why.
        ValueError: packed documents without positions.
    """
    reason = unavailable(q, k, v, log_decay)
    if reason is not None:
        raise RuntimeError(f"no retention kernel: {reason}")
    if starts is not None and positions is None and scale:
        raise ValueError("packed documents (starts) need positions within the document")
    leave = state is not None if return_state is None else return_state
    documents = ranges = None
    if positions is not None:
        positions = positions.to(torch.int32).contiguous()
    if valid is not None:
        last = valid.shape[1] - valid.flip(1).to(torch.uint8).argmax(1)
        first = valid.to(torch.uint8).argmax(1)
        ranges = torch.stack((first, torch.where(valid.any(1), last, first)), 1).to(torch.int32)
        if starts is not None:
            starts = starts & valid
    if starts is not None:
        # Equal numbers, equal documents; 0 is the document that the entering state belongs to.
        documents = starts.cumsum(1, dtype=torch.int32)
    o, final = _run(q, k, v, log_decay.detach(), state, positions, documents, ranges, scale, leave)
    return o, final if leave else None


def retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    positions: Tensor | None = None,
    starts: Tensor | None = None,
    valid: Tensor | None = None,
    scale: bool = True,
) -> tuple[Tensor, Tensor]:
    """One token of retention in one kernel; `state` is updated in place. No gradients.

    Args:
        q: rotated query, (batch, 1, heads, dk) or (batch, heads, dk), unit last stride.
        k: rotated, scaled key, shaped like q.
        v: value, (batch, 1, heads, dv) or (batch, heads, dv).
        log_decay: log gamma of each head, (heads,).
        state: S, (batch, heads, dk, dv) float32 with a unit last stride; overwritten.
        positions: position of the token in its document, (batch,) or (batch, 1) int; None: 0.
        starts: True where the token opens a document, (batch,) or (batch, 1) bool.
        valid: False where the token is padding: S stays, the output is 0. Like `starts`.
        scale: divide by sqrt(s_n).

    Returns:
        o, shaped like v and of its dtype, and `state` itself.
    """
    return _step(q, k, v, log_decay, state, positions, starts, valid, scale), state


def _step_cut(rows: int, dk: int, dv: int) -> tuple[int, int]:
    """Columns of the state that a program takes, and its warps. Measured, see docs/kernels.md."""
    elements = rows * dk * dv
    tile = 16 if elements <= 2**21 else 32 if rows < 1024 else 64
    tile = min(tile, _power_of_2(dv))
    return tile, max(1, min(_power_of_2(dk) * tile // 2048, 4))


@functools.lru_cache(maxsize=_PREPARED)
def _prepare_step(
    shape: tuple[int, int, int, int],
    strides: tuple[int, ...],
    dtypes: tuple[Any, ...],
    device: torch.device,
    aligned: bool,
    scale: bool,
) -> _Launch:
    """The launch of a step; `dtypes` (None where a tensor is absent) and `aligned` are its key."""
    from archzoo.kernels import retention_triton as kernels

    batch, heads, dk, dv = shape
    _, _, _, positions, starts, valid = dtypes
    tile, warps = _step_cut(batch * heads, dk, dv)
    return _Launch(
        kernels.step_kernel,
        (-(-dv // tile), batch * heads, 1),
        (*strides, heads),
        {"DK": dk, "DV": dv, "BLOCK_K": _power_of_2(dk), "TILE": tile, "SCALE": scale,
         "HAS_POSITIONS": positions is not None, "HAS_STARTS": starts is not None,
         "HAS_VALID": valid is not None},
        num_warps=warps,
    )  # fmt: skip


@_on_its_device
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    positions: Tensor | None,
    starts: Tensor | None,
    valid: Tensor | None,
    scale: bool,
) -> Tensor:
    q, k, v = _unit_last(q), _unit_last(k), _unit_last(v)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    facts = (positions, starts, valid)
    strides = (
        *(x.stride(i) for x in (q, k, v, o) for i in (0, -2)),
        *(0 if x is None else x.stride(0) for x in facts),
        *state.stride()[:3],
    )
    dtypes = (q.dtype, v.dtype, log_decay.dtype, *(x if x is None else x.dtype for x in facts))
    aligned = state.data_ptr() % 16 == 0
    launch = _prepare_step(tuple(state.shape), strides, dtypes, q.device, aligned, scale)
    # Tensors that are absent are never read.
    positions, starts, valid = (
        state if x is None else x.view(torch.uint8) if x.dtype == torch.bool else x for x in facts
    )
    launch(_stream_of(q), q, k, v, o, state, log_decay, positions, starts, valid)
    return o
