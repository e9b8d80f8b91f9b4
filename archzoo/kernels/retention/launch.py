"""How the retention kernels are launched: the host's side.

`archzoo.kernels.retention` is what others call. Here work of one kind, that is of the same sizes,
strides and flags, is planned once (`plans`) and its launches are kept ready (`Work`);
`forward`, `backward` and `step` allocate and launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archzoo.kernels.launching import (
    Launch,
    aligned,
    known_triton,
    on_its_device,
    padded_width,
    room,
    stream_of,
    strides_fit,
)
from archzoo.kernels.retention.plans import (
    Cut,
    Pair,
    Plan,
    cut_segments,
    find_plan,
    joined_sums,
    power_of_2,
    walked_through,
)


@functools.lru_cache(maxsize=64)
def _has_apart(device: torch.device) -> bool:
    """Whether kernels with copying and multiplying apart run there.

    They are Hopper's, and written in Gluon, which renames its functions from one Triton to the
    next: only with those that they were run with. The others' kernels are `triton`'s.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return hopper and known_triton()


def _unit_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _state_like(tensor: Tensor | None) -> Tensor | None:
    """A state as the kernels read it: float32, contiguous, its base at 16 bytes."""
    if tensor is None:
        return None
    tensor = tensor.float().contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class Facts(NamedTuple):
    """All that the work depends on but what its tensors hold."""

    shape: tuple[int, int, int, int]  # batch, time, heads, dk
    dv: int
    strides: tuple[tuple[int, ...], ...]  # of q, k and v
    dtype: torch.dtype
    device: torch.device
    decay_dtype: torch.dtype
    state: bool  # one is given
    positions: bool
    documents: bool
    ranges: bool
    scale: bool
    leave: bool  # the last state is wanted

    def plan(self) -> Plan:
        apart = not (self.documents or self.ranges) and _has_apart(self.device)
        return find_plan(self.dk, self.dv, self.dtype, apart)

    @property
    def time(self) -> int:
        return self.shape[1]

    @property
    def heads(self) -> int:
        return self.shape[2]

    @property
    def dk(self) -> int:
        return self.shape[3]

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[2]

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


def _room(facts: Facts, strides: tuple[int, ...], width: int) -> Callable[[Tensor], Tensor]:
    """What makes room for a result like a tensor of these strides, see `room`."""
    if facts.ranges:
        return functools.partial(room, padded=True)
    # What does the same for contiguous tensors takes a third of `room`'s time, 0.6 us of 1.9.
    contiguous = strides == (*_contiguous(width, facts), 1)
    return torch.empty_like if contiguous and width == padded_width(width, facts.dtype) else room


def _contiguous(width: int, facts: Facts) -> tuple[int, int, int]:
    """Strides of a result, see `room`."""
    padded = padded_width(width, facts.dtype)
    return facts.time * facts.heads * padded, facts.heads * padded, padded


class Segments(NamedTuple):
    """The two levels: sums, None where no map needs one, and joining, None where the maps join."""

    sum: Launch | None
    join: Launch | None
    room: tuple[int, ...]  # of the sums, and of the states that enter
    leave: bool


def _form(facts: Facts, cut: Cut, name: str) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """The kernel of this name that a cut asks for, constants that it needs, and options."""
    if cut.apart and name == "backward_kernel":
        from archzoo.kernels.retention import gluon_backward

        # The copying warp and three multiplying groups share out 128 registers a thread.
        options = {"num_warps": 4, "maxnreg": 128}
        constants = facts.constants("SCALE") | {"STAGES": cut.stages}
        return gluon_backward.backward_kernel, constants, options
    if cut.apart:
        from archzoo.kernels.retention import gluon

        # Three groups of four warps, of which the copying one gives its registers to the others.
        # A narrow state alone leaves room for two programs on a multiprocessor.
        two = name == "segment_sums_kernel" and cut.block == 128
        constants = facts.constants("SCALE") | {"STAGES": cut.stages}
        if name == "segment_sums_kernel":
            constants["REGISTERS"] = 104 if two else 240
        else:
            # What a chunk of 64 leaves over goes to the group that makes its weights.
            constants["REGISTERS"] = 200 if cut.block == 128 else 216
        options = {"num_warps": 4, "maxnreg": 80 if two else 168}
        return getattr(gluon, name), constants, options
    from archzoo.kernels.retention import triton

    constants = facts.constants()
    if name == "backward_kernel":
        constants |= {"K": facts.dk, "V": facts.dv, "BLOCK_K": cut.block, "BLOCK_V": cut.tile}
    else:
        constants |= {"TILE": cut.tile}
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return getattr(triton, name), constants, options


def _prepare_segments(
    facts: Facts,
    plan: Plan,
    segment: int,
    segments: int,
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    reverse: bool,
    initial: bool,
    leave: bool,
    joined: int,
    each: int,
) -> Segments:
    """The two-level pass over (k, v), or over (q, do) backward in time.

    `strides` are theirs; `initial`: a state enters; `leave`: the last one is wanted; `joined`: how
    many sums to a segment the maps join, 0 where `join_kernel` does; `each`: segments that a
    program of the map that follows walks.
    """
    from archzoo.kernels.retention import triton as kernels

    chunk, cut = plan.sums
    pieces = max(joined, 1)
    tiles = -(-facts.dk // cut.block) * -(-facts.dv // cut.tile)
    kernel, constants, options = _form(facts, cut, "segment_sums_kernel")
    # What one program walks last needs no sum: that counts only towards the last state.
    left_out = 0 if leave else each * pieces
    summed = segments * pieces - left_out
    sums = None if summed == 0 else Launch(
        kernel,
        (tiles, facts.rows, summed),
        (*strides[0], *strides[1], facts.time, segment // pieces, segments * pieces, facts.heads,
         max(facts.normaliser_rows, 1)),
        {"B": facts.dk, "C": facts.dv, "BLOCK_B": cut.block, "CHUNK": chunk, "REVERSE": reverse,
         "SKIP": left_out if reverse else 0, **constants},
        **options,
    )  # fmt: skip
    batch, _, heads, dk = facts.shape
    room = batch, heads, segments * pieces, dk, facts.dv
    if joined:
        return Segments(sums, None, room, leave)
    elements = facts.dk * facts.dv
    join = Launch(
        kernels.join_kernel,
        (-(-elements // 1024), facts.rows, 1),
        (facts.time, segment, segments, facts.heads, elements),
        {"BLOCK": 1024, "REVERSE": reverse, "HAS_INITIAL": initial, "HAS_FINAL": leave,
         "EACH": each, **facts.constants("HAS_DOCUMENTS", "HAS_RANGES")},
    )  # fmt: skip
    return Segments(sums, join, room, leave)


def _prepare_scores(
    facts: Facts,
    pair: Pair,
    width: int,
    strides_a: tuple[int, ...],
    strides_b: tuple[int, ...],
) -> Launch | None:
    """The chunks' own weights, where a pair of maps has them made ahead."""
    from archzoo.kernels.retention import triton as kernels

    if not pair.scores:
        return None
    chunks = -(-facts.time // pair.chunk)
    return Launch(
        kernels.scores_kernel,
        (chunks, facts.rows, 1),
        (*strides_a, *strides_b, facts.time, facts.heads, chunks, max(facts.normaliser_rows, 1)),
        {"A": width, "BLOCK_A": min(64, pair.forward.block), "CHUNK": pair.chunk,
         **facts.constants()},
        num_warps=4, num_stages=3,
    )  # fmt: skip


def _prepare_map(
    facts: Facts,
    pair: Pair,
    segment: int,
    segments: int,
    widths: tuple[int, int],
    strides: tuple[tuple[int, ...], ...],
    reverse: bool,
    transposed: bool,
    entering: bool,
    leaving: bool,
    joined: int = 0,
    each: int = 1,
    kept: bool = False,
) -> tuple[Launch, ...]:
    """out_i = sum_{j <= i} gamma^(i-j) (a_i . b_j) c_j, see `triton`: its splits.

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
        joined: how many sums make up a segment, where it joins them itself; else 0.
        each: segments that a program walks, one after the other.
        kept: whether that before every second chunk is.
    """
    width, columns = widths
    cut = pair.reverse if reverse else pair.forward
    kernel, constants, options = _form(facts, cut, "stream_kernel")
    if cut.apart:
        constants |= {"EACH": each}
    else:
        constants |= {"HAS_SCORES": pair.scores, "HAS_KEPT": kept, "JOIN": joined}
    stride_a, stride_c = (1, width) if transposed else (columns, 1)
    return tuple(
        Launch(
            kernel,
            (-(-columns // cut.tile), facts.rows, segments // each),
            (*strides[0], *strides[1], *strides[2], *_contiguous(columns, facts),
             facts.time, segment, segments, facts.heads, -(-facts.time // pair.chunk), split,
             stride_a, stride_c, max(facts.normaliser_rows, 1), _pairs(facts.time, pair.chunk)),
            {"A": width, "C": columns, "BLOCK_A": cut.block, "CHUNK": pair.chunk,
             "REVERSE": reverse, "HAS_ENTERING": entering, "HAS_LEAVING": leaving,
             "ADD": split > 0, **constants},
            **options,
        )
        for split in range(-(-width // cut.block))
    )  # fmt: skip


def _prepare_together(
    facts: Facts,
    plan: Plan,
    segment: int,
    segments: int,
    do: tuple[int, ...],
    entering: bool,
    joined: int,
    leaving: bool,
) -> Launch:
    """The launch of all gradients in one walk, where a program holds the whole state."""
    assert plan.together is not None
    chunk, cut = plan.together
    kernel, constants, options = _form(facts, cut, "backward_kernel")
    key, value = _contiguous(facts.dk, facts), _contiguous(facts.dv, facts)
    strides = sum((*facts.strides, do, key, key, value), ())
    return Launch(
        kernel,
        (facts.rows, segments, 1),
        (*strides, facts.time, segment, segments, facts.heads, _pairs(facts.time, chunk),
         max(facts.normaliser_rows, 1)),
        {"CHUNK": chunk, "HAS_ENTERING": entering, "JOIN": joined, "HAS_LEAVING": leaving,
         **constants},
        **options,
    )  # fmt: skip


def kept_sizes(
    batch: int,
    time: int,
    heads: int,
    dk: int,
    dv: int,
    dtype: torch.dtype,
    device: torch.device,
    whole: bool,
) -> tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]:
    """What a forward keeps: shape and dtype of the states, shape of the scores; (0,) where none.

    `whole`: rows hold no padding and one document.
    """
    plan = find_plan(dk, dv, dtype, whole and _has_apart(device))
    _, segments = cut_segments(plan, batch * heads, time, dk)
    chunk = plan.by_key.chunk
    scores = (batch * heads * -(-time // chunk) * chunk, chunk) if plan.by_key.scores else (0,)
    if plan.together is not None:
        return (batch, heads, _pairs(time, chunk), dv, dk), dtype, scores
    return (batch, heads, segments, dk, dv) if segments > 1 else (0,), torch.float32, scores


def _pairs(time: int, chunk: int) -> int:
    """Pairs of chunks: so many states `backward_kernel` reads."""
    return -(-time // (2 * chunk))


def _scores_shape(facts: Facts, pair: Pair) -> tuple[int, ...]:
    """Room for the chunks' own weights, see `scores_kernel`."""
    return facts.rows * -(-facts.time // pair.chunk) * pair.chunk, pair.chunk


class Work:
    """What is prepared for tensors of one kind: how the work is cut, and the launches."""

    def __init__(self, facts: Facts) -> None:
        from archzoo.kernels.retention import triton as kernels

        widths = facts.dk, facts.dk, facts.dv
        self.rooms = [_room(facts, *of) for of in zip(facts.strides, widths, strict=True)]
        facts = facts._replace(strides=tuple(strides[:3] for strides in facts.strides))
        self.facts, self.plan = facts, facts.plan()
        self.cut = cut_segments(self.plan, facts.rows, facts.time, facts.dk)
        self.many = self.cut[1] > 1
        # Where rows are whole and all begin and end with nothing, the maps join segments.
        self.whole = not (facts.documents or facts.ranges or facts.state)
        self.joined = 0 if facts.leave else self._joined(*self.cut)
        self.each = walked_through(self.plan, self.cut[1], facts.dk, facts.dv)
        batch, _, heads, dk = facts.shape
        self.state = batch, heads, dk, facts.dv
        self.float32 = functools.partial(torch.empty, dtype=torch.float32, device=facts.device)
        self.backward = functools.lru_cache(maxsize=16)(self._prepare_backward)
        q, k, v = facts.strides
        self.table = facts.normaliser_rows, facts.time
        self.table_kept: tuple[tuple[Any, ...], Tensor, Tensor] | None = None
        self.normaliser = Launch(
            kernels.normaliser_kernel,
            (-(-facts.time // 512), facts.normaliser_rows, 1),
            (facts.time, facts.heads),
            {"BLOCK": 512, "HAS_POSITIONS": facts.positions, **facts.constants("HAS_RANGES")},
        )
        self.kept = None
        if self.plan.together is not None:
            chunk, _ = self.plan.together
            self.kept = batch, heads, _pairs(facts.time, chunk), facts.dv, dk
        self.segments = None
        if self.many:
            self.segments = _prepare_segments(
                facts, self.plan, *self.cut, (k, v), False, facts.state, facts.leave, self.joined,
                self.each,
            )  # fmt: skip
        self.scores = _prepare_scores(facts, self.plan.by_key, dk, q, k)
        of_o = functools.partial(
            _prepare_map, facts, self.plan.by_key, *self.cut, (dk, facts.dv), (q, k, v), False,
            False, self.many or facts.state, facts.leave and not self.many, self.joined,
            self.each,
        )  # fmt: skip
        self.of_o = functools.lru_cache(maxsize=2)(of_o)

    def _joined(self, segment: int, segments: int) -> int:
        return joined_sums(self.plan, self.facts.rows, segment, segments) if self.whole else 0

    def normalisers(
        self,
        stream: int | None,
        log_decay: Tensor,
        positions: Tensor | None,
        ranges: Tensor | None,
        reuse: bool,
    ) -> Tensor:
        """The table of normalisers; of a call before, where that counted likewise and may be.

        It is of the decays alone where rows are counted from 0. A graph being captured gets its
        own: it lives longer than what is kept here.
        """
        reuse = reuse and positions is None and ranges is None
        reuse = reuse and not (log_decay.is_cuda and torch.cuda.is_current_stream_capturing())
        key = None
        # What is made in inference mode cannot be saved for a backward to come.
        if reuse and not (torch.is_inference_mode_enabled() or log_decay.is_inference()):
            key = stream, log_decay.data_ptr(), log_decay._version
            kept = self.table_kept  # once: another thread may put its own there
            if kept is not None and kept[0] == key:
                return kept[2]
        table = self.float32(self.table)
        if self.facts.scale:
            self.normaliser(stream, table, log_decay, positions, ranges)
        if key is not None:  # with the decays, so that no other tensor comes to lie there
            self.table_kept = key, log_decay.detach(), table
        return table

    def _prepare_backward(self, do: tuple[int, ...], arriving: bool) -> Backward | None:
        """The backward's launches; `arriving`: the last state has a gradient.

        None where the copy engine does not take the strides of do.
        """
        facts, plan = self.facts, self.plan
        if not strides_fit((do,), facts.dtype.itemsize):
            return None
        cut = cut_segments(plan, facts.rows, facts.time, facts.dk, backward=True)
        many = cut[1] > 1
        do = do[:3]
        q, k, v = facts.strides
        dk, dv = facts.dk, facts.dv
        joined = 0 if arriving else self._joined(*cut)
        segments = None
        if many:
            segments = _prepare_segments(
                facts, plan, *cut, (q, do), True, arriving, facts.state, joined, self.each
            )
        prepare = functools.partial(_prepare_map, facts)
        arrives, leaves = many or arriving, facts.state and not many
        together = None
        of_v: tuple[Launch, ...] = ()
        of_k: tuple[Launch, ...] = ()
        of_q: tuple[Launch, ...] = ()
        if plan.together is not None:
            together = _prepare_together(facts, plan, *cut, do, arrives, joined, leaves)
        else:
            of_v = prepare(plan.by_key, *cut, (dk, dv), (k, q, do), True, False, arrives, leaves,
                           each=self.each)  # fmt: skip
            of_k = prepare(plan.by_value, *cut, (dv, dk), (v, do, q), True, True, arrives, False)
            entering = many or facts.state
            of_q = prepare(plan.by_value, *cut, (dv, dk), (do, v, k), False, True, entering, False)
        scores = _prepare_scores(facts, plan.by_value, dv, do, v)
        return Backward(segments, scores, together, of_v, of_k, of_q)


class Backward(NamedTuple):
    """The launches of a backward; the maps by their splits, empty where `together` does them."""

    segments: Segments | None
    scores: Launch | None
    together: Launch | None
    of_v: tuple[Launch, ...]
    of_k: tuple[Launch, ...]
    of_q: tuple[Launch, ...]


Shape = tuple[int, ...]


@functools.lru_cache(maxsize=256)
def work(
    q: Shape,
    k: Shape,
    v: Shape,
    log_decay: Shape,
    state: Shape | None,
    positions: Shape | None,
    documents: Shape | None,
    strides: tuple[Shape, ...],
    dtype: torch.dtype,
    decay_dtype: torch.dtype,
    device: torch.device,
    ranges: bool,
    scale: bool,
    leave: bool,
) -> Work | None:
    """The work of tensors of these shapes, kept; None where the copy engine takes no such strides.

    `strides` and `dtype` are those of q, k and v.

    Raises:
        ValueError: shapes that do not belong together; the kernels would read what lies beside.
    """
    batch, time, heads, dk = q
    for name, shape, wanted in (
        ("k", k, q),
        ("v", v, (batch, time, heads, v[-1])),
        ("log_decay", log_decay, (heads,)),
        ("state", state, (batch, heads, dk, v[-1])),
        ("positions", positions, (batch, time)),
        ("starts", documents, (batch, time)),
    ):
        if shape not in (None, wanted):
            raise ValueError(f"{name} has shape {tuple(shape)}, beside q of {tuple(q)}")
    if not strides_fit(strides, dtype.itemsize):
        return None
    facts = Facts(
        (batch, time, heads, dk), v[-1], strides, dtype, device, decay_dtype, state is not None,
        positions is not None, documents is not None, ranges, scale, leave,
    )  # fmt: skip
    return Work(facts)


def find_work(
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
) -> tuple[Work, Tensor, Tensor, Tensor]:
    """The work, and q, k, v as the copy engine wants them."""
    shapes = (
        q.shape,
        k.shape,
        v.shape,
        log_decay.shape,
        None if state is None else state.shape,
        None if positions is None else positions.shape,
        None if documents is None else documents.shape,
    )
    rest = q.dtype, log_decay.dtype, q.device, ranges is not None, scale, leave
    found = None
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0:
        found = work(*shapes, (q.stride(), k.stride(), v.stride()), *rest)
    if found is None:
        q, k, v = aligned(q), aligned(k), aligned(v)
        found = work(*shapes, (q.stride(), k.stride(), v.stride()), *rest)
        assert found is not None
    return found, q, k, v


def _run_segments(
    work: Work,
    segments: Segments,
    stream: int | None,
    b: Tensor,
    c: Tensor,
    initial: Tensor | None,
    facts: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor | None]:
    """The two-level pass: the state that enters each segment, and the last one if wanted.

    Where the maps join segments, what each adds stands for the states that enter.
    """
    sums = work.float32(segments.room)
    if segments.sum is not None:
        segments.sum(stream, b, c, sums, *facts)
    if segments.join is None:
        return sums, None
    entering = work.float32(segments.room)
    final = work.float32(work.state) if segments.leave else None
    log_decay, _, documents, ranges = facts
    segments.join(stream, sums, entering, initial, final, log_decay, documents, ranges)
    return entering, final


@on_its_device
def forward(
    q: Tensor,
    work: Work,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    positions: Tensor | None,
    documents: Tensor | None,
    ranges: Tensor | None,
    keep: bool = True,
    reuse: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Output and last state; and, for a backward to come (keep): states, normalisers, scores.

    The states are those entering segments, float32, or those that `backward_kernel` reads. What
    there is no use for is None; without `scale` the normalisers are empty. `reuse`: they may be
    those of a call before, which nobody else may write to.
    """
    stream = stream_of(q)
    normaliser = work.normalisers(stream, log_decay, positions, ranges, reuse)
    facts = log_decay, normaliser, documents, ranges
    source = _state_like(state)
    states = final = leaving = scores = kept = None
    if work.segments is not None:
        source, final = states, _ = _run_segments(work, work.segments, stream, k, v, source, facts)
    elif work.facts.leave:
        final = leaving = work.float32(work.state)
    if work.scores is not None:
        scores = q.new_empty(_scores_shape(work.facts, work.plan.by_key))
        work.scores(stream, q, k, scores, *facts)
    if keep and work.kept is not None:
        states = kept = q.new_empty(work.kept)
    o = work.rooms[2](v)
    for launch in work.of_o(kept is not None):
        launch(stream, q, k, v, o, scores, *facts, source, leaving, kept)
    return o, final, states, normaliser, scores


@on_its_device
def backward(
    do: Tensor,
    d_final: Tensor | None,
    work: Work,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    states: Tensor | None,
    normaliser: Tensor,
    scores: Tensor | None,
    documents: Tensor | None,
    ranges: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and the gradient of the entering state (None without one)."""
    launches = None if do.data_ptr() % 16 else work.backward(do.stride(), d_final is not None)
    if launches is None:
        do = aligned(do)
        launches = work.backward(do.stride(), d_final is not None)
        assert launches is not None
    stream = stream_of(q)
    facts = log_decay, normaliser, documents, ranges
    source, arriving = _state_like(state), _state_like(d_final)
    leaving = d_state = None
    if launches.segments is not None:
        source = states
        arriving, d_state = _run_segments(work, launches.segments, stream, q, do, arriving, facts)
    elif state is not None:
        leaving = d_state = work.float32(work.state)
    room_q, room_k, room_v = work.rooms
    grad_q, grad_k, grad_v = room_q(q), room_k(k), room_v(v)
    if launches.together is not None:
        launches.together(
            stream, q, k, v, do, grad_q, grad_k, grad_v, states, *facts, arriving, leaving
        )
    else:
        for launch in launches.of_v:
            launch(stream, k, q, do, grad_v, scores, *facts, arriving, leaving, None)
        if launches.scores is not None:
            scores = q.new_empty(_scores_shape(work.facts, work.plan.by_value))
            launches.scores(stream, do, v, scores, *facts)
        for launch in launches.of_k:
            launch(stream, v, do, q, grad_k, scores, *facts, arriving, None, None)
        for launch in launches.of_q:
            launch(stream, do, v, k, grad_q, scores, *facts, source, None, None)
    if d_state is not None and documents is not None:
        # A row that opens with a new document never looked at the state that entered.
        at = torch.zeros_like(documents[:, :1]) if ranges is None else ranges[:, :1]
        unread = documents.gather(1, at.long()) != 0
        d_state.masked_fill_(unread[:, :, None, None], 0.0)
    return grad_q, grad_k, grad_v, d_state


def _step_cut(rows: int, dk: int, dv: int) -> tuple[int, int]:
    """Columns of the state that a program takes, and its warps: measured, docs/kernels/diary.md."""
    size = rows * dk * dv
    tile = 16 if size <= 2**21 else 32 if size <= 2**22 or rows < 1024 else 64
    tile = min(tile, power_of_2(dv))
    return tile, 1 if power_of_2(dk) * tile <= 2048 else 4


@functools.lru_cache(maxsize=256)
def _prepare_step(
    shape: tuple[int, int, int, int],
    strides: tuple[int, ...],
    dtypes: tuple[Any, ...],
    device: torch.device,
    aligned: bool,
    scale: bool,
) -> Launch:
    """The launch of a step; `dtypes` (None where a tensor is absent) and `aligned` are its key."""
    from archzoo.kernels.retention import triton as kernels

    batch, heads, dk, dv = shape
    positions, starts, valid, *_ = dtypes
    tile, warps = _step_cut(batch * heads, dk, dv)
    return Launch(
        kernels.step_kernel,
        (-(-dv // tile), batch * heads, 1),
        (*strides, heads),
        {"DK": dk, "DV": dv, "BLOCK_K": power_of_2(dk), "TILE": tile, "SCALE": scale,
         "HAS_POSITIONS": positions is not None, "HAS_STARTS": starts is not None,
         "HAS_VALID": valid is not None},
        num_warps=warps,
    )  # fmt: skip


@on_its_device
def step(
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
    """One token, see `archzoo.kernels.retention.retention_step`."""
    if state.stride(-1) != 1:  # a copy would not be updated in place
        raise ValueError(f"the state needs a unit last stride, it has {state.stride()}")
    q, k, v, log_decay = _unit_last(q), _unit_last(k), _unit_last(v), log_decay.contiguous()
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    facts = (positions, starts, valid)
    strides = (
        *(x.stride(i) for x in (q, k, v, o) for i in (0, -2)),
        *(0 if x is None else x.stride(0) for x in facts),
        *state.stride()[:3],
    )
    dtypes = (
        *(x if x is None else x.dtype for x in facts),
        q.dtype, k.dtype, v.dtype, log_decay.dtype, state.dtype,
    )  # fmt: skip
    aligned = state.data_ptr() % 16 == 0
    launch = _prepare_step(tuple(state.shape), strides, dtypes, q.device, aligned, scale)
    positions, starts, valid = (
        x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x for x in facts
    )
    launch(stream_of(q), q, k, v, o, state, log_decay, positions, starts, valid)
    return o
