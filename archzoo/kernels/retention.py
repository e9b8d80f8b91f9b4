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


# Measured on an H200, see docs/kernels.md. Keys: the widths (dk, dv) up to which a row holds.
_BFLOAT16_PLANS: dict[tuple[int, int], Plan] = {
    (64, 64): Plan(
        *(Pair(64, False, Cut(64, 64, 4, 3), Cut(64, 64, 4, 3)),) * 2,
        sums=(64, Cut(64, 64, 4, 4), 1),
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

    key, value, sums = plan
    return Plan(
        key._replace(
            forward=fit(key.forward, wide_k, wide_v), reverse=fit(key.reverse, wide_k, wide_v)
        ),
        value._replace(
            forward=fit(value.forward, wide_v, wide_k), reverse=fit(value.reverse, wide_v, wide_k)
        ),
        (sums[0], fit(sums[1], wide_k, wide_v), sums[2]),
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
    if (
        tensor.stride(-1) == 1
        and all(stride % size == 0 and stride > 0 for stride in tensor.stride()[:-1])
        and tensor.data_ptr() % 16 == 0
    ):
        return tensor
    batch, time, heads, width = tensor.shape
    room = tensor.new_empty((batch, time, heads, -(-width // size) * size))
    room[..., :width] = tensor
    return room[..., :width]


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


class _Call(NamedTuple):
    """What forward and backward have in common."""

    plan: Plan
    segment: int
    segments: int
    facts: dict[str, Any]
    pointers: tuple[Tensor, Tensor, Tensor]  # normalisers, documents, ranges
    normaliser_rows: int


def _call(
    q: Tensor,
    v: Tensor,
    normaliser: Tensor,
    documents: Tensor | None,
    ranges: Tensor | None,
    scale: bool,
) -> _Call:
    batch, time, heads, dk = q.shape
    dv = v.shape[-1]
    plan = _plan(dk, dv, q.dtype)
    segment, segments = _segments(plan, batch * heads, time, dk)
    facts = {
        "SCALE": scale,
        "HAS_DOCUMENTS": documents is not None,
        "HAS_RANGES": ranges is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "UPCAST": q.device.type == "cpu",
    }
    # Absent tensors are never read.
    absent = normaliser
    pointers = (
        normaliser,
        absent if documents is None else documents,
        absent if ranges is None else ranges,
    )
    return _Call(plan, segment, segments, facts, pointers, max(normaliser.shape[0], 1))


def _normalisers(
    q: Tensor, log_decay: Tensor, positions: Tensor | None, ranges: Tensor | None, scale: bool
) -> Tensor:
    """1 / sqrt(s_n), (heads or batch * heads, time) float32; empty without `scale`."""
    from archzoo.kernels import retention_triton as kernels

    batch, time, heads, _ = q.shape
    shared = positions is None and ranges is None
    rows = heads if shared else batch * heads
    if not scale:
        return q.new_empty((0, time), dtype=torch.float32)
    normaliser = q.new_empty((rows, time), dtype=torch.float32)
    kernels.normaliser_kernel[(-(-time // 512), rows)](
        normaliser, log_decay, normaliser if positions is None else positions,
        normaliser if ranges is None else ranges, time, heads,
        BLOCK=512, HAS_POSITIONS=positions is not None, HAS_RANGES=ranges is not None,
    )  # fmt: skip
    return normaliser


def _segment_states(
    b: Tensor,
    c: Tensor,
    call: _Call,
    log_decay: Tensor,
    reverse: bool,
    initial: Tensor | None,
    leave: bool,
) -> tuple[Tensor, Tensor]:
    """The two-level pass: the state that enters each segment, and the last one (or empty)."""
    from archzoo.kernels import retention_triton as kernels

    batch, time, heads, width = b.shape
    columns = c.shape[-1]
    rows = batch * heads
    chunk, cut, parts = call.plan.sums
    piece = call.segment // parts
    pieces = -(-time // piece)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=b.device)
    sums = empty((rows, pieces, width, columns))
    entering = empty((batch, heads, call.segments, width, columns))
    final = empty((batch, heads, width, columns) if leave else (0,))
    # Nothing follows the segment walked last, so its sum counts only towards the last state.
    first, stop = 0, pieces
    if not leave:
        first, stop = (parts, pieces) if reverse else (0, (call.segments - 1) * parts)
    tiles = -(-width // cut.block) * -(-columns // cut.tile)
    _, documents, ranges = call.pointers
    kernels.segment_sums_kernel[(tiles, rows, stop - first)](
        b, c, sums, log_decay, *call.pointers, *_strides(b), *_strides(c),
        time, piece, pieces, heads, call.normaliser_rows, first,
        B=width, C=columns, BLOCK_B=cut.block, TILE=cut.tile, CHUNK=chunk, REVERSE=reverse,
        **call.facts, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    elements = width * columns
    kernels.join_kernel[(-(-elements // 1024), rows)](
        sums, entering, sums if initial is None else initial, final, log_decay, documents, ranges,
        time, piece, call.segments, pieces, heads, elements,
        BLOCK=1024, REVERSE=reverse, PER_SEGMENT=parts, HAS_INITIAL=initial is not None,
        HAS_FINAL=leave, HAS_DOCUMENTS=call.facts["HAS_DOCUMENTS"],
        HAS_RANGES=call.facts["HAS_RANGES"],
    )  # fmt: skip
    return entering, final


def _chunk_scores(a: Tensor, b: Tensor, call: _Call, pair: Pair, log_decay: Tensor) -> Tensor:
    """The chunks' own weights, (rows * chunks * chunk, chunk), see `scores_kernel`."""
    from archzoo.kernels import retention_triton as kernels

    batch, time, heads, width = a.shape
    chunks = -(-time // pair.chunk)
    scores = a.new_empty((batch * heads * chunks * pair.chunk, pair.chunk))
    block = min(64, pair.forward.block)
    kernels.scores_kernel[(chunks, batch * heads)](
        a, b, scores, log_decay, *call.pointers, *_strides(a), *_strides(b),
        time, heads, chunks, call.normaliser_rows,
        A=width, BLOCK_A=block, CHUNK=pair.chunk, **call.facts, num_warps=4, num_stages=3,
    )  # fmt: skip
    return scores


def _map(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    scores: Tensor,
    call: _Call,
    pair: Pair,
    log_decay: Tensor,
    reverse: bool,
    transposed: bool,
    entering: Tensor | None,
    leaving: Tensor | None,
) -> Tensor:
    """out_i = sum_{j <= i} gamma^(i-j) (a_i . b_j) c_j, see `retention_triton`.

    `entering`, one state per segment, and `leaving`, one per row, are (rows, columns) of the
    state, or (columns, rows) where `transposed`. `scores` is empty where `pair` has none.
    """
    from archzoo.kernels import retention_triton as kernels

    batch, time, heads, width = a.shape
    columns = c.shape[-1]
    chunk, cut = pair.chunk, pair.reverse if reverse else pair.forward
    out = _output(c, call.facts["HAS_RANGES"])
    stride_a, stride_c = (1, width) if transposed else (columns, 1)
    for split in range(-(-width // cut.block)):
        kernels.stream_kernel[(-(-columns // cut.tile), batch * heads, call.segments)](
            a, b, c, out, scores, log_decay, *call.pointers,
            log_decay if entering is None else entering,
            log_decay if leaving is None else leaving,
            *_strides(a), *_strides(b), *_strides(c), *_strides(out),
            time, call.segment, call.segments, heads, -(-time // chunk), split,
            stride_a, stride_c, call.normaliser_rows,
            A=width, C=columns, BLOCK_A=cut.block, TILE=cut.tile, CHUNK=chunk, REVERSE=reverse,
            HAS_ENTERING=entering is not None, HAS_LEAVING=leaving is not None,
            HAS_SCORES=pair.scores, ADD=split > 0,
            **call.facts, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    return out


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _output(like: Tensor, padded: bool) -> Tensor:
    """Room for a result, (batch, time, heads, width), aligned for the copy engine.

    Zeros where there is padding: tokens before a row's first are written by nobody.
    """
    make = torch.zeros if padded else torch.empty
    size = 16 // like.element_size()
    shape = (*like.shape[:-1], -(-like.shape[-1] // size) * size)
    return make(shape, dtype=like.dtype, device=like.device)[..., : like.shape[-1]]


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
    batch, _, heads, dk = q.shape
    dv = v.shape[-1]
    normaliser = _normalisers(q, log_decay, positions, ranges, scale)
    call = _call(q, v, normaliser, documents, ranges, scale)
    pair = call.plan.by_key
    entering = q.new_empty((0,), dtype=torch.float32)
    leaving = None
    source = None if state is None else state.float().contiguous()
    if call.segments > 1:
        entering, final = _segment_states(k, v, call, log_decay, False, source, leave)
        source = entering
    else:
        final = q.new_empty((batch, heads, dk, dv) if leave else (0,), dtype=torch.float32)
        leaving = final if leave else None
    scores = _chunk_scores(q, k, call, pair, log_decay) if pair.scores else q.new_empty((0,))
    o = _map(q, k, v, scores, call, pair, log_decay, False, False, source, leaving)
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
    batch, _, heads, dk = q.shape
    dv = v.shape[-1]
    call = _call(q, v, normaliser, documents, ranges, scale)
    key, value, _ = call.plan
    source = None if state is None else state.float().contiguous()
    arriving = None if d_final is None else d_final.float().contiguous()
    leaving = None
    d_state = q.new_empty((0,), dtype=torch.float32)
    if call.segments > 1:
        source = entering
        arriving, d_state = _segment_states(
            q, do, call, log_decay, True, arriving, state is not None
        )
    elif state is not None:
        leaving = d_state = q.new_empty((batch, heads, dk, dv), dtype=torch.float32)
    grad_v = _map(k, q, do, scores, call, key, log_decay, True, False, arriving, leaving)
    if value.scores:
        scores = _chunk_scores(do, v, call, value, log_decay)
    grad_k = _map(v, do, q, scores, call, value, log_decay, True, True, arriving, None)
    grad_q = _map(do, v, k, scores, call, value, log_decay, False, True, source, None)
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


def _autograd(ctx, do, d_final, *_):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, entering, normaliser, scores, *facts = ctx.saved_tensors
    if torch.is_grad_enabled():
        raise NotImplementedError("the retention kernels have no second derivative")
    if do is None:
        do = torch.zeros_like(v)
    grad_q, grad_k, grad_v, d_state = torch.ops.archzoo.retention_backward(
        do, d_final, q, k, v, log_decay, state, entering, normaliser, scores, *facts, ctx.scale
    )
    d_state = None if state is None else d_state.to(state.dtype)
    return grad_q, grad_k, grad_v, None, d_state, None, None, None, None, None


torch.library.register_autograd(
    "archzoo::retention", _autograd, setup_context=_setup_context, lib=_library
)


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
    o, final, *_ = torch.ops.archzoo.retention(
        q, k, v, log_decay.detach(), state, positions, documents, ranges, scale, leave
    )
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
    from archzoo.kernels import retention_triton as kernels

    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    q, k, v = _unit_last(q), _unit_last(k), _unit_last(v)
    batch, heads, dk, dv = state.shape
    block = _power_of_2(dk)
    tile = min(32 if batch * heads < 1024 else 64, _power_of_2(dv))
    kernels.step_kernel[(-(-dv // tile), batch * heads)](
        q, k, v, o, state, log_decay,
        state if positions is None else positions,
        state if starts is None else starts.view(torch.uint8),
        state if valid is None else valid.view(torch.uint8),
        q.stride(0), q.stride(-2), k.stride(0), k.stride(-2), v.stride(0), v.stride(-2),
        o.stride(0), o.stride(-2),
        0 if positions is None else positions.stride(0),
        0 if starts is None else starts.stride(0),
        0 if valid is None else valid.stride(0),
        state.stride(0), state.stride(1), state.stride(2), heads,
        DK=dk, DV=dv, BLOCK_K=block, TILE=tile, SCALE=scale,
        HAS_POSITIONS=positions is not None, HAS_STARTS=starts is not None,
        HAS_VALID=valid is not None, num_warps=4,
    )  # fmt: skip
    return o, state
