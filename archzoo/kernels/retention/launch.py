"""How the retention kernels are launched: the host's side.

`Inputs` are the tensors of a call, and `Problem` is all that its launches depend on but what those
hold: the key by which they are kept. `Forward` and `Backward` are the passes of one problem. Each
is planned once (`plans`), with its launches ready; called, it allocates and launches.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archzoo.kernels.launching import (
    Launch,
    aligned,
    describe,
    on_its_device,
    padded_width,
    result_like,
    stream_of,
    strides_fit,
)
from archzoo.kernels.retention.plans import (
    ROOM,
    Cut,
    Pair,
    Plan,
    cut_segments,
    fills_better_beside,
    find_plan,
    segments_per_program,
    sums_per_segment,
)

Shape = tuple[int, ...]


class Inputs(NamedTuple):
    """What retention is computed of; None is what is absent. See `archzoo.kernels.retention`."""

    q: Tensor  # (batch, time, heads, dk)
    k: Tensor
    v: Tensor  # (batch, time, heads, dv)
    log_decay: Tensor  # (heads,)
    state: Tensor | None  # the initial one, (batch, heads, dk, dv)
    positions: Tensor | None  # (batch, time) int32
    documents: Tensor | None  # (batch, time) int32, 0 is that of the initial state
    ranges: Tensor | None  # (batch, 2) int32, the first valid token of a row and the one after all


class Problem(NamedTuple):
    """All that the launches depend on but what tensors hold; shapes by the names of `Inputs`."""

    q: Shape
    k: Shape
    v: Shape
    log_decay: Shape
    state: Shape | None
    positions: Shape | None
    documents: Shape | None
    ranges: bool  # rows are padded
    strides: tuple[Shape, Shape, Shape]  # of q, k and v
    dtype: torch.dtype
    decay_dtype: torch.dtype
    device: torch.device
    normalise: bool  # o is divided by sqrt(s_n)
    final: bool  # the final state is wanted
    plain: bool = False  # without warp specialisation, on Hopper too

    @classmethod
    def of(cls, inputs: Inputs, normalise: bool, final: bool) -> Problem:
        """The problem of these tensors."""
        q, k, v, log_decay, state, positions, documents, ranges = inputs
        # Past NamedTuple's own constructor, which takes three times as long.
        return tuple.__new__(cls, (
            q.shape, k.shape, v.shape, log_decay.shape,
            None if state is None else state.shape,
            None if positions is None else positions.shape,
            None if documents is None else documents.shape,
            ranges is not None, (q.stride(), k.stride(), v.stride()),
            q.dtype, log_decay.dtype, q.device, normalise, final, False,
        ))  # fmt: skip

    def check(self) -> None:
        """That the shapes belong together, or ValueError: kernels would read what lies beside."""
        batch, time, heads, dk, dv = self.sizes
        for name, shape, wanted in (
            ("k", self.k, self.q),
            ("v", self.v, (batch, time, heads, dv)),
            ("log_decay", self.log_decay, (heads,)),
            ("state", self.state, (batch, heads, dk, dv)),
            ("positions", self.positions, (batch, time)),
            ("starts", self.documents, (batch, time)),
        ):
            if shape not in (None, wanted):
                raise ValueError(f"{name} has shape {tuple(shape)}, beside q of {tuple(self.q)}")

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Batch, time, heads, dk and dv."""
        return *self.q, self.v[-1]  # type: ignore[return-value]

    @property
    def plan(self) -> Plan:
        whole = not (self.plain or self.documents or self.ranges)
        specialised = whole and _warp_specialises(self.device)
        little = _has_little_memory(self.device)
        return find_plan(self.q[-1], self.v[-1], self.dtype, specialised, little)

    def direction(self, reverse: bool, initial: bool, final: bool) -> Direction:
        """How rows are gone through, see `Direction`."""
        (batch, time, heads, dk, dv), plan = self.sizes, self.plan
        segment, segments = cut_segments(plan, batch * heads, time, dk, reverse)
        sums = 0
        # Where rows are whole and begin and end with nothing, the maps join segments.
        if not (initial or final or self.documents or self.ranges):
            sums = sums_per_segment(plan, batch * heads, segment, segments)
        each = segments_per_program(plan, segments, dk, dv)
        return Direction(reverse, segment, segments, initial, final, sums, each)

    @property
    def table_shape(self) -> tuple[int, int]:
        """Of the normalisers: a row for each head where all batch rows count alike; (0, time)."""
        batch, time, heads, *_ = self.sizes
        return (batch * heads if self.positions or self.ranges else heads) * self.normalise, time

    def scores_shape(self, pair: Pair) -> Shape:
        """Of the chunks' own weights, see `scores_kernel`; (0,) where they are not made ahead."""
        batch, time, heads, *_ = self.sizes
        chunks = batch * heads * -(-time // pair.chunk)
        return (chunks * pair.chunk, pair.chunk) if pair.scores else (0,)

    @property
    def states_shape(self) -> Shape | None:
        """Of the states before every second chunk, which a fused backward reads."""
        batch, time, heads, dk, dv = self.sizes
        fused = self.plan.fused_backward
        return None if fused is None else (batch, heads, -(-time // (2 * fused[0])), dv, dk)

    def constants(self, *names: str) -> dict[str, Any]:
        """Compile-time parameters that many kernels share, those of the given names."""
        every = {
            "NORMALISE": self.normalise,
            "HAS_DOCUMENTS": self.documents is not None,
            "HAS_RANGES": self.ranges,
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
            "UPCAST": self.device.type == "cpu",
        }
        return {name: every[name] for name in names} if names else every


class Direction(NamedTuple):
    """A direction of time: how rows are cut for it, and the states, or gradients, at its ends."""

    reverse: bool
    segment: int  # tokens
    segments: int
    initial: bool  # a state is given where it begins
    final: bool  # the state where it ends is wanted
    sums: int  # of a segment, which the maps join themselves; 0 where `join_kernel` does
    each: int  # segments that a program of o or dv takes, one after the other


class Segments(NamedTuple):
    """The states at the segments' beginnings, in two levels: what each adds, and joined."""

    sum: Launch | None  # None where no map needs one
    join: Launch | None  # None where the maps join
    shape: Shape  # of the sums, and of the states
    final: Shape | None  # of the final state, where it is wanted
    empty: Callable[[Shape], Tensor]

    def __call__(self, stream: Any, b: Any, c: Any, initial: Any, shared: Any) -> Any:
        """The states (what each segment adds, where the maps join), and the final one if wanted."""
        sums = self.empty(self.shape)
        if self.sum is not None:
            self.sum(stream, b, c, sums, *shared)
        if self.join is None:
            return sums, None
        states = self.empty(self.shape)
        final = None if self.final is None else self.empty(self.final)
        log_decay, _, documents, ranges = shared
        self.join(stream, sums, states, initial, final, log_decay, documents, ranges)
        return states, final


class Pass:
    """What the launches of a pass are made of. Tensors go by their names.

    Args:
        problem: Of the pass.
        do: Strides of the gradient of o.
        dv: Strides of memory that is given for the gradient of v; (): it is allocated.
    """

    def __init__(self, problem: Problem, do: Shape = (), dv: Shape = ()) -> None:
        self.problem, self.plan = problem, problem.plan
        batch, self.time, self.heads, dk, width = problem.sizes
        self.rows = batch * self.heads
        self.state_shape = batch, self.heads, dk, width
        self.float32 = functools.partial(torch.empty, dtype=torch.float32, device=problem.device)
        q, k, v = problem.strides
        self.widths = {"q": dk, "k": dk, "v": width, "do": width}
        self.strides = {"q": q[:3], "k": k[:3], "v": v[:3], "do": do[:3]}
        self.results = [self._result(*of) for of in ((q, dk), (k, dk), (v, width))]
        self.dv_strides = dv[:3] or self._contiguous(width)
        self.table_rows = max(problem.table_shape[0], 1)

    def _contiguous(self, width: int) -> tuple[int, int, int]:
        """Strides of a result, see `result_like`."""
        padded = padded_width(width, self.problem.dtype)
        return self.time * self.heads * padded, self.heads * padded, padded

    def _result(self, strides: Shape, width: int) -> Callable[[Tensor], Tensor]:
        """What allocates a result like a tensor of these strides, see `result_like`."""
        if self.problem.ranges:
            return functools.partial(result_like, padded=True)
        # What does the same for contiguous tensors takes a third of the time, 0.6 us of 1.9.
        contiguous = strides == (*self._contiguous(width), 1)
        unpadded = width == padded_width(width, self.problem.dtype)
        return torch.empty_like if contiguous and unpadded else result_like

    def _form(self, cut: Cut, name: str) -> tuple[Any, dict[str, Any], dict[str, int]]:
        """The kernel of this name that a cut asks for, constants that it needs, and options."""
        if cut.warp_specialised:
            from archzoo.kernels.retention import gluon, gluon_backward

            limit, registers = cut.warp_specialised
            kernel = getattr(gluon_backward if name == "backward_kernel" else gluon, name)
            constants = {"STAGES": cut.stages, **self.problem.constants("NORMALISE")}
            if registers:
                constants["REGISTERS"] = registers
            return kernel, constants, {"num_warps": 4, "maxnreg": limit}
        from archzoo.kernels.retention import triton

        constants = self.problem.constants()
        if name == "backward_kernel":
            constants |= {"K": self.widths["k"], "V": self.widths["v"]}
            constants |= {"BLOCK_K": cut.block, "BLOCK_V": cut.tile}
        else:
            constants |= {"TILE": cut.tile}
        return getattr(triton, name), constants, {"num_warps": cut.warps, "num_stages": cut.stages}

    def prepare_segments(self, direction: Direction, b: str, c: str) -> Segments | None:
        """The states between segments; None where there is one."""
        from archzoo.kernels.retention import triton

        reverse, segment, segments, initial, final, joined, each = direction
        if segments == 1:
            return None
        batch, heads, dk, dv = self.state_shape
        chunk, cut = self.plan.sums
        sums = max(joined, 1)
        kernel, constants, options = self._form(cut, "segment_sums_kernel")
        # What one program takes last needs no sum: that counts only towards the final state.
        left_out = 0 if final else each * sums
        summed = segments * sums - left_out
        of_segments = None if summed == 0 else Launch(
            kernel,
            (-(-dk // cut.block) * -(-dv // cut.tile), self.rows, summed),
            (*self.strides[b], *self.strides[c], self.time, segment // sums, segments * sums,
             heads, self.table_rows),
            {"B": dk, "C": dv, "BLOCK_B": cut.block, "CHUNK": chunk, "REVERSE": reverse,
             "SKIP": left_out if reverse else 0, **constants},
            **options,
        )  # fmt: skip
        shape = batch, heads, segments * sums, dk, dv
        if joined:
            return Segments(of_segments, None, shape, None, self.float32)
        join = Launch(
            triton.join_kernel,
            (-(-dk * dv // 1024), self.rows, 1),
            (self.time, segment, segments, heads, dk * dv),
            {"BLOCK": 1024, "REVERSE": reverse, "HAS_INITIAL": initial, "HAS_FINAL": final,
             "EACH": each, **self.problem.constants("HAS_DOCUMENTS", "HAS_RANGES")},
        )  # fmt: skip
        return Segments(of_segments, join, shape, self.state_shape if final else None, self.float32)

    def prepare_scores(self, pair: Pair, a: str, b: str) -> Launch | None:
        """The chunks' own weights, where a pair of maps has them made ahead."""
        from archzoo.kernels.retention import triton

        chunks = -(-self.time // pair.chunk)
        return Launch(
            triton.scores_kernel,
            (chunks, self.rows, 1),
            (*self.strides[a], *self.strides[b], self.time, self.heads, chunks, self.table_rows),
            {"A": self.widths[a], "BLOCK_A": min(64, pair.forward.block), "CHUNK": pair.chunk,
             **self.problem.constants()},
            num_warps=4, num_stages=3,
        ) if pair.scores else None  # fmt: skip

    def prepare_map(
        self, direction: Direction, a: str, b: str, c: str, keeps: bool = False
    ) -> tuple[Launch, ...]:
        """out_i = sum_{j <= i} gamma^(i-j) (a_i . b_j) c_j, see `triton`: its splits.

        `keeps`: the state before every second chunk is stored.
        """
        reverse, segment, segments, initial, final, sums, each = direction
        width, columns = self.widths[a], self.widths[c]
        out = self.dv_strides if (a, c) == ("k", "do") else self._contiguous(columns)
        # The state of a map of values is the other's, transposed, which alone is handed on.
        by_key = a in ("q", "k")
        pair = self.plan.by_key if by_key else self.plan.by_value
        each = each if by_key else 1
        cut = pair.reverse if reverse else pair.forward
        kernel, constants, options = self._form(cut, "stream_kernel")
        if cut.warp_specialised:
            constants |= {"EACH": each}
        else:
            constants |= {"HAS_SCORES": pair.scores, "HAS_KEPT": keeps, "JOIN": sums}
        return tuple(
            Launch(
                kernel,
                (-(-columns // cut.tile), self.rows, segments // each),
                (*self.strides[a], *self.strides[b], *self.strides[c], *out,
                 self.time, segment, segments, self.heads, -(-self.time // pair.chunk), split,
                 *((columns, 1) if by_key else (1, width)), self.table_rows,
                 -(-self.time // (2 * pair.chunk))),
                {"A": width, "C": columns, "BLOCK_A": cut.block, "CHUNK": pair.chunk,
                 "REVERSE": reverse, "HAS_INITIAL": segments > 1 or initial,
                 "HAS_FINAL": by_key and final and segments == 1, "ADD": split > 0, **constants},
                **options,
            )
            for split in range(-(-width // cut.block))
        )  # fmt: skip

    def prepare_fused_backward(self, direction: Direction) -> Launch | None:
        """All gradients in one kernel, where a program holds the whole state."""
        if self.plan.fused_backward is None:
            return None
        chunk, cut = self.plan.fused_backward
        _, segment, segments, initial, final, sums, _ = direction
        kernel, constants, options = self._form(cut, "backward_kernel")
        results = *(self._contiguous(self.widths[name]) for name in ("q", "k")), self.dv_strides
        return Launch(
            kernel,
            (self.rows, segments, 1),
            (*sum((*self.strides.values(), *results), ()), self.time, segment, segments,
             self.heads, -(-self.time // (2 * chunk)), self.table_rows),
            {"CHUNK": chunk, "HAS_INITIAL": segments > 1 or initial, "JOIN": sums,
             "HAS_FINAL": final and segments == 1, **constants},
            **options,
        )  # fmt: skip


class Forward(Pass):
    """The pass that makes o, with the normalisers; `backward` finds the one that follows."""

    def __init__(self, problem: Problem) -> None:
        from archzoo.kernels.retention import triton

        super().__init__(problem)
        self.direction = problem.direction(False, problem.state is not None, problem.final)
        self.table_shape = rows, time = problem.table_shape
        self.table_kept: tuple[tuple[Any, ...], Tensor, Tensor] | None = None
        self.normaliser = Launch(
            triton.normaliser_kernel,
            (-(-time // 512), rows, 1),
            (time, self.heads),
            {"BLOCK": 512, "HAS_POSITIONS": problem.positions is not None,
             **problem.constants("HAS_RANGES")},
        )  # fmt: skip
        self.segments = self.prepare_segments(self.direction, "k", "v")
        self.scores = self.prepare_scores(self.plan.by_key, "q", "k")
        self.scores_shape = problem.scores_shape(self.plan.by_key)
        self.states_shape = problem.states_shape
        self.o = [self.prepare_map(self.direction, "q", "k", "v", keeps) for keeps in (False, True)]
        size = problem.dtype.itemsize
        # By the strides of do, and of dv where it is given, and whether the final state has a
        # gradient; None: not for TMA.
        self.find_backward = functools.lru_cache(maxsize=16)(
            lambda do, dv, d_final: (
                Backward(self, do, dv, d_final) if strides_fit((do,), size) else None
            )
        )

    def normalisers(self, stream: int | None, inputs: Inputs, reuse: bool) -> Tensor:
        """The table of normalisers; of a call before, where that counted likewise and may be.

        It is of the decays alone where rows are counted from 0. A graph being captured gets its
        own: it lives longer than what is kept here.
        """
        log_decay, positions, ranges = inputs.log_decay, inputs.positions, inputs.ranges
        reuse = reuse and positions is None and ranges is None
        reuse = reuse and not (log_decay.is_cuda and torch.cuda.is_current_stream_capturing())
        key = None
        # What is made in inference mode cannot be saved for a backward to come.
        if reuse and not (torch.is_inference_mode_enabled() or log_decay.is_inference()):
            key = stream, log_decay.data_ptr(), log_decay._version
            kept = self.table_kept  # once: another thread may put its own there
            if kept is not None and kept[0] == key:
                return kept[2]
        table = self.float32(self.table_shape)
        if self.problem.normalise:
            self.normaliser(stream, table, log_decay, positions, ranges)
        if key is not None:  # with the decays, so that no other tensor comes to lie there
            self.table_kept = key, log_decay.detach(), table
        return table

    @on_its_device
    def __call__(
        self, inputs: Inputs, keep: bool = True, reuse: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Output and final state; and, for a backward to come (keep): states, normalisers, scores.

        The states are those at the segments' beginnings, float32, or those that `backward_kernel`
        reads. What there is no use for is None; where o is not normalised the normalisers are
        empty. `reuse`: they may be those of a call before, which nobody else may write to.
        """
        q, k, v, log_decay, state, _, documents, ranges = inputs
        stream = stream_of(q)
        normaliser = self.normalisers(stream, inputs, reuse)
        shared = log_decay, normaliser, documents, ranges
        initial = None if state is None else _state_like(state)
        states = final = scores = written = kept = None
        if self.segments is not None:
            states, final = self.segments(stream, k, v, initial, shared)
            initial = states
        elif self.problem.final:
            final = written = self.float32(self.state_shape)
        if self.scores is not None:
            scores = q.new_empty(self.scores_shape)
            self.scores(stream, q, k, scores, *shared)
        if keep and self.states_shape is not None:
            states = kept = q.new_empty(self.states_shape)
        o = self.results[2](v)
        for run in self.o[kept is not None]:
            run(stream, q, k, v, o, scores, *shared, initial, written, kept)
        return o, final, states, normaliser, scores

    def takes(self, dv: Tensor) -> bool:
        """Whether the backward pass can write the gradient of v there."""
        # At padding it writes nothing, and what it allocates itself is 0 there.
        fits = not self.problem.ranges and dv.data_ptr() % 16 == 0
        return fits and strides_fit((dv.stride(),), dv.element_size())

    def backward(
        self,
        inputs: Inputs,
        do: Tensor,
        d_final: Tensor | None,
        *kept: Any,
        dv: Tensor | None = None,
    ) -> Any:
        """The gradients of q, k, v and the initial state.

        Args:
            inputs: The forward's.
            do: Gradient of o.
            d_final: Of the final state.
            *kept: The forward's last results.
            dv: Memory for the gradient of v, which `takes` accepts; None: it is allocated.
        """
        how = () if dv is None else dv.stride(), d_final is not None
        found = None if do.data_ptr() % 16 else self.find_backward(do.stride(), *how)
        if found is None:
            do = aligned(do)
            found = self.find_backward(do.stride(), *how)
            assert found is not None
        return found(inputs, do, d_final, dv, *kept)


class Backward(Pass):
    """The pass that makes dq, dk and dv: by one kernel, or by a map each.

    dk and dv go in reverse, dq once more forward.
    """

    def __init__(self, forward: Forward, do: Shape, dv: Shape, d_final: bool) -> None:
        problem = forward.problem
        super().__init__(problem, do, dv)
        reverse = problem.direction(True, d_final, problem.state is not None)
        self.segments = self.prepare_segments(reverse, "q", "do")
        self.fused = self.prepare_fused_backward(reverse)
        self.dv = self.prepare_map(reverse, "k", "q", "do")
        self.dk = self.prepare_map(reverse, "v", "do", "q")
        self.dq = self.prepare_map(forward.direction, "do", "v", "k")
        self.scores = self.prepare_scores(self.plan.by_value, "do", "v")
        self.scores_shape = problem.scores_shape(self.plan.by_value)
        self.beside = problem.device.type == "cuda" and fills_better_beside(
            self.plan, self.rows, reverse.segments, *self.state_shape[2:]
        )

    def _run_maps(self, *chains: Callable[[int | None], None], device: torch.device) -> None:
        """Launch the maps' chains, the last of them on the current stream."""
        now = torch.cuda.current_stream(device)
        sides = _side_streams(device)
        for side, chain in zip(sides, chains, strict=False):
            side.wait_stream(now)
            # What a launch allocates is of its stream, so that no other takes it before it ends.
            with torch.cuda.stream(side):
                chain(side.cuda_stream)
        chains[-1](now.cuda_stream)
        for side in sides:
            now.wait_stream(side)

    @on_its_device
    def __call__(
        self, inputs: Inputs, do: Tensor, d_final: Tensor | None, dv: Tensor | None, *kept: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv, and the gradient of the initial state (None without one)."""
        q, k, v, log_decay, state, _, documents, ranges = inputs
        states, normaliser, scores = kept
        stream = stream_of(q)
        shared = log_decay, normaliser, documents, ranges
        initial = None if state is None else _state_like(state)
        d_last = None if d_final is None else _state_like(d_final)
        written = d_state = None
        if self.segments is not None:
            initial = states
            d_last, d_state = self.segments(stream, q, do, d_last, shared)
        elif state is not None:
            written = d_state = self.float32(self.state_shape)
        like_q, like_k, like_v = self.results
        dq, dk = like_q(q), like_k(k)
        dv = like_v(v) if dv is None else dv
        if self.fused is not None:
            self.fused(stream, q, k, v, do, dq, dk, dv, states, *shared, d_last, written)
        else:
            of_values = None
            if self.scores is not None:
                of_values = q.new_empty(self.scores_shape)
                self.scores(stream, do, v, of_values, *shared)

            def make_dv(stream: int | None) -> None:
                for run in self.dv:
                    run(stream, k, q, do, dv, scores, *shared, d_last, written, None)

            def make_dk(stream: int | None) -> None:
                for run in self.dk:
                    run(stream, v, do, q, dk, of_values, *shared, d_last, None, None)

            def make_dq(stream: int | None) -> None:
                for run in self.dq:
                    run(stream, do, v, k, dq, of_values, *shared, initial, None, None)

            if self.beside:
                self._run_maps(make_dk, make_dq, make_dv, device=q.device)
            else:
                make_dv(stream)
                make_dk(stream)
                make_dq(stream)
        if d_state is not None and documents is not None:
            # A row that opens with a new document never looked at the initial state.
            at = torch.zeros_like(documents[:, :1]) if ranges is None else ranges[:, :1]
            unread = documents.gather(1, at.long()) != 0
            d_state.masked_fill_(unread[:, :, None, None], 0.0)
        return dq, dk, dv, d_state


@functools.lru_cache(maxsize=64)
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Two streams of a device beside the current one."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


_specialises = True  # not after warp specialisation has failed


def _give_up_warp_specialisation(error: Exception) -> None:
    """Said once: from now on the plain kernels run."""
    global _specialises
    if _specialises:
        _specialises = False
        warnings.warn(
            f"the retention kernels with warp specialisation do not run here ({describe(error)}): "
            "those without run instead, and take up to 1.4 times as long",
            stacklevel=3,
        )


class Guarded:
    """A forward pass with warp specialisation, and from the first error on the one without.

    Both keep the same for the backward pass, in the same shapes, as a compiled graph expects: what
    the plain one alone needs is made again.
    """

    def __init__(self, problem: Problem) -> None:
        self.forward = Forward(problem)
        self.find_plain = functools.lru_cache(maxsize=1)(
            lambda: Forward(problem._replace(plain=True))
        )
        self.takes = self.forward.takes

    def __call__(self, *arguments: Any) -> Any:
        """As `Forward`."""
        return self._first(self.forward, self._plain_forward, arguments, {})

    def backward(self, *arguments: Any, **options: Any) -> Any:
        """As `Forward`'s."""
        return self._first(self.forward.backward, self._plain_backward, arguments, options)

    def _first(
        self, run: Callable[..., Any], plain: Callable[..., Any], arguments: Any, options: Any
    ) -> Any:
        if not _specialises:
            return plain(*arguments, **options)
        try:
            return run(*arguments, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            first = arguments[0].q
            if first.is_cuda and not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize(first.device)  # memory goes back that others still write to
            found = plain(*arguments, **options)  # raises what is wrong with more than that
            _give_up_warp_specialisation(error)
            return found

    def _plain_forward(self, *arguments: Any) -> Any:
        *found, _scores = self.find_plain()(*arguments)
        return *found, None

    @on_its_device
    def _plain_backward(
        self, inputs: Inputs, do: Tensor, d_final: Tensor | None, *kept: Any, **options: Any
    ) -> Any:
        forward, (states, normaliser, scores) = self.find_plain(), kept
        if forward.scores is not None:
            q, k, _, log_decay, *_, documents, ranges = inputs
            scores = q.new_empty(forward.scores_shape)
            shared = log_decay, normaliser, documents, ranges
            forward.scores(stream_of(q), q, k, scores, *shared)
        return forward.backward(inputs, do, d_final, states, normaliser, scores, **options)


@functools.lru_cache(maxsize=256)
def find_forward(problem: Problem) -> Forward | Guarded | None:
    """The forward pass of a problem, kept; None where TMA does not take its strides."""
    problem.check()
    if not strides_fit(problem.strides, problem.dtype.itemsize):
        return None
    return Guarded(problem) if problem.plan.warp_specialised else Forward(problem)


def prepare(inputs: Inputs, normalise: bool, final: bool) -> tuple[Inputs, Forward | Guarded]:
    """The forward pass of these tensors, and them with q, k, v as TMA takes them."""
    q, k, v, *_ = inputs
    found = None
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0:
        found = find_forward(Problem.of(inputs, normalise, final))
    if found is None:
        inputs = inputs._replace(q=aligned(q), k=aligned(k), v=aligned(v))
        found = find_forward(Problem.of(inputs, normalise, final))
        assert found is not None
    return inputs, found


@functools.lru_cache(maxsize=64)
def _warp_specialises(device: torch.device) -> bool:
    """Whether the kernels with warp specialisation may run there.

    They are Hopper's, and written in Gluon, which renames its functions from one Triton to the
    next: `gluon` takes each by a name that is there. The others' kernels are `triton`'s.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        importlib.import_module("archzoo.kernels.retention.gluon_backward")
    except (ImportError, AttributeError) as error:
        _give_up_warp_specialisation(error)
        return False
    return True


@functools.lru_cache(maxsize=64)
def _has_little_memory(device: torch.device) -> bool:
    """Whether a program has less shared memory there than plans take."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", ROOM) < ROOM


def _state_like(tensor: Tensor) -> Tensor:
    """A state as the kernels read it: float32, contiguous, its base at 16 bytes."""
    tensor = tensor.float().contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
