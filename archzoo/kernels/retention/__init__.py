"""Retention as a fused kernel, and when there is one.

    S_n = gamma S_(n-1) + k_n^T v_n        o_n = q_n S_n / sqrt(s_n)        s_n = sum_{j<=n} gamma^j

`retention` computes this for a segment of a sequence, forward and backward, in Triton;
`retention_step` computes it for one token and updates the state in place. `reference` is their
reference implementation in plain PyTorch, and what runs wherever `unavailable` names a reason.
Derivation, measurements: docs/kernels/; the method: Retentive Network, arXiv 2307.08621.

Importing this module needs neither Triton nor a GPU: both are looked for at the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from archzoo.derivatives import differentiated_again, transformed
from archzoo.kernels import launching
from archzoo.kernels.launching import TRITON_FOUND, interpreting, result_like
from archzoo.kernels.retention.launch import Inputs, Problem, prepare
from archzoo.kernels.retention.plans import cut_segments, plan_step

__all__ = ["available", "retention", "retention_step", "unavailable"]

MAX_KEY_WIDTH = 256
MAX_VALUE_WIDTH = 512
MAX_ROWS = 2**16 - 1  # batch times heads, an axis of the grid
_DTYPES = (torch.bfloat16, torch.float32)
_ROCM = torch.version.hip is not None


def unavailable(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> str | None:
    """Why the kernels cannot take these tensors; None where they can.

    Args:
        q: queries, (batch, time, heads, dk).
        k: keys, (batch, time, heads, dk).
        v: values, (batch, time, heads, dv).
        log_decay: log gamma, (heads,); one that wants a gradient is refused.
    """
    if not TRITON_FOUND:
        return "triton is not installed"
    if launching.SWITCHED_OFF:
        return f"{launching.SWITCH} is off in the environment"
    if not q.is_cuda and not (interpreting() and q.device.type == "cpu"):
        return f"the kernels need a CUDA device, the tensors are on {q.device.type}"
    if _ROCM:
        return "the kernels were never run on ROCm"
    if transformed():
        return "the kernels are opaque to transforms (torch.func, forward-mode differentiation)"
    dtype, shape, dk = q.dtype, v.shape, q.shape[-1]
    dv, rows = shape[-1], shape[0] * shape[-2]
    if k.dtype != dtype or v.dtype != dtype:
        return f"q, k and v have different dtypes: {q.dtype}, {k.dtype}, {v.dtype}"
    if dtype not in _DTYPES:
        return f"the kernels take bfloat16 and float32, not {dtype}"
    if dk > MAX_KEY_WIDTH or dv > MAX_VALUE_WIDTH:
        return f"the kernels take dk <= {MAX_KEY_WIDTH} and dv <= {MAX_VALUE_WIDTH}, not {dk}, {dv}"
    if rows > MAX_ROWS:
        return f"the kernels take {MAX_ROWS} rows of batch times heads, not {rows}"
    if not v.numel():
        return "there are no tokens"
    if log_decay is not None and log_decay.requires_grad and torch.is_grad_enabled():
        return "the kernels give no gradient to the decay"
    return None


def available(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> bool:
    """True where the kernels can take these tensors, see `unavailable`."""
    return unavailable(q, k, v, log_decay) is None


_library = torch.library.Library("archzoo", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? positions, "
    "Tensor? documents, Tensor? ranges, "
)
_library.define(
    f"retention({_INPUTS}bool normalise, bool final) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"retention_backward({_INPUTS}bool normalise, bool final, Tensor do, Tensor? d_final, "
    "Tensor states, Tensor normaliser, Tensor scores) -> (Tensor, Tensor, Tensor, Tensor)"
)


def refuse(derivative: str) -> None:
    """Raise for a derivative that the kernels do not have."""
    raise NotImplementedError(
        f"the retention kernels have no {derivative} derivative: call the model with "
        "form='parallel', which runs without them"
    )


def _refuse_tangents() -> None:
    """The dispatcher would drop them: neither it nor a compiler asks an operator for a jvp."""
    if forward_ad._current_level >= 0:
        refuse("forward-mode")


def _operator(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator: output, final state, and what is kept; empty for what is absent."""
    _refuse_tangents()
    *tensors, normalise, final = arguments
    inputs, forward = prepare(Inputs(*tensors), normalise, final)
    q, v = inputs.q, inputs.v
    dtypes = (v.dtype, torch.float32, torch.float32, torch.float32, q.dtype)
    found = zip(forward(inputs, True, False), dtypes, strict=True)
    return tuple(q.new_empty((0,), dtype=dtype) if x is None else x for x, dtype in found)


def _operator_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _refuse_tangents()
    tensors, (normalise, final, *rest) = arguments[:8], arguments[8:]
    inputs, forward = prepare(Inputs(*tensors), normalise, final)
    *grads, d_state = forward.backward(inputs, *rest)
    return *grads, inputs.q.new_empty((0,), dtype=torch.float32) if d_state is None else d_state


for _key in ("CPU", "CUDA"):
    _library.impl("retention", _operator, _key)
    _library.impl("retention_backward", _operator_backward, _key)


@torch.library.register_fake("archzoo::retention", lib=_library)
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    _refuse_tangents()
    *tensors, normalise, final = arguments
    inputs = Inputs(*tensors)
    problem = Problem.of(inputs, normalise, final)
    batch, time, heads, dk, dv = problem.sizes
    states, dtype = problem.states_shape, inputs.q.dtype
    if states is None:
        _, segments = cut_segments(problem.plan, batch * heads, time, dk)
        states, dtype = (batch, heads, segments, dk, dv) if segments > 1 else (0,), torch.float32
    float32 = functools.partial(inputs.q.new_empty, dtype=torch.float32)
    return (
        result_like(inputs.v),
        float32((batch, heads, dk, dv) if final else (0,)),
        float32(states, dtype=dtype),
        float32(problem.table_shape),
        inputs.q.new_empty(problem.scores_shape(problem.plan.by_key)),
    )


@torch.library.register_fake("archzoo::retention_backward", lib=_library)
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*arguments[:8])
    shape = (0,) if inputs.state is None else inputs.state.shape
    return *map(result_like, inputs[:3]), inputs.q.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, log_decay, state, positions, documents, ranges, *flags = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, state, *output[2:])
    ctx.rest = log_decay, positions, documents, ranges, tuple(flags)


def _gradients(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
    """Of what `_Eager` is given, which leaves its forward pass in the flags' place."""
    if differentiated_again():
        refuse("second")
    q, k, v, state, states, normaliser, scores = ctx.saved_tensors
    log_decay, positions, documents, ranges, forward = ctx.rest
    inputs = Inputs(q, k, v, log_decay, state, positions, documents, ranges)
    if do is None:
        do = torch.zeros_like(v)
    if type(forward) is tuple:
        dq, dk, dv, d_state = torch.ops.archzoo.retention_backward(
            *inputs, *forward, do, d_final, states, normaliser, scores
        )
    else:
        dq, dk, dv, d_state = forward.backward(inputs, do, d_final, states, normaliser, scores)
    return dq, dk, dv, None if state is None else d_state.to(state.dtype), None, None


def _operator_gradients(ctx: Any, do: Tensor, d_final: Tensor, *_: Any) -> tuple[Any, ...]:
    dq, dk, dv, d_state, *none = _gradients(ctx, do, d_final)
    return dq, dk, dv, None, d_state, *none, None, None, None


torch.library.register_autograd(
    "archzoo::retention", _operator_gradients, setup_context=_setup_context, lib=_library
)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher, whose way into Python costs more than the launches."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, state: Any, inputs: Any, forward: Any) -> Any:
        o, final, states, normaliser, scores = forward(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, state, states, normaliser, scores)
        _, _, _, log_decay, _, positions, documents, ranges = inputs
        ctx.rest = log_decay, positions, documents, ranges, forward
        return o, final

    backward = staticmethod(_gradients)


# What `apply` comes to once it has looked for transforms, as `unavailable` has: 2 us less.
_apply_eagerly: Callable[..., tuple[Tensor, Tensor | None]] = super(
    torch.autograd.Function, _Eager
).apply


def places(
    positions: Tensor | None, starts: Tensor | None, valid: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where tokens stand, as the kernels read it: positions, documents and ranges of `Inputs`.

    Args:
        positions: As `retention` takes them.
        starts: The same.
        valid: The same.
    """
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
        # Equal numbers, equal documents; 0 is the document that the initial state belongs to.
        documents = starts.cumsum(1, dtype=torch.int32)
    return positions, documents, ranges


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
    """Retention over a segment of a sequence, fused, differentiable in q, k, v and state.

        S_n = gamma S_(n-1) + k_n^T v_n,   o_n = q_n S_n / sqrt(s_n),   s_n = sum_{j<=n} gamma^j

    Memory: the backward keeps q, k, v and, beside them, at most one float32 state per 512 tokens
    and head; for heads up to 64 wide one state in q's dtype per 128 tokens, an eighth of q, k, v
    and o; for wide ones the chunks' own weights, 32 or 64 numbers a token and head.
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
        ValueError: packed documents without positions, or tensors of other shapes.
    """
    reason = unavailable(q, k, v, log_decay)
    if reason is not None:
        raise RuntimeError(f"no retention kernel: {reason}")
    if starts is not None and positions is None and scale:
        raise ValueError("packed documents (starts) need positions within the document")
    return_state = state is not None if return_state is None else return_state
    if valid is not None and valid.shape != q.shape[:2]:
        raise ValueError(f"valid has shape {tuple(valid.shape)}, beside q of {tuple(q.shape)}")
    # The decays may be every second one of more heads', or one for all.
    inputs = Inputs(q, k, v, log_decay.contiguous(), state, *places(positions, starts, valid))
    if torch.compiler.is_compiling() or type(q) is not Tensor:  # fake ones, say
        o, final, *_ = torch.ops.archzoo.retention(*inputs, scale, return_state)
        return o, final if return_state else None
    inputs, forward = prepare(inputs, scale, return_state)
    if torch.is_grad_enabled():
        q, k, v, *_ = inputs  # copies where TMA takes no other
        return _apply_eagerly(q, k, v, state, inputs, forward)
    o, final, *_ = forward(inputs, False)
    return o, final


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

    Raises:
        RuntimeError: something of it wants a gradient, or is transformed.
    """
    if transformed() or (
        torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad or state.requires_grad)
    ):
        raise RuntimeError(
            "no retention kernel: a step writes into its state and has no derivative; use "
            "`retention`, or torch.no_grad()"
        )
    if state.stride(-1) != 1:  # a copy would not be updated in place
        raise ValueError(f"the state needs a unit last stride, it has {state.stride()}")
    if any(size > 1 and step == 0 for size, step in zip(state.shape, state.stride(), strict=True)):
        raise ValueError(
            f"the state has strides {state.stride()}: rows or heads share memory, and all would "
            "write to it; give state.clone()"
        )
    q, k, v = map(launching.with_unit_stride, (q, k, v))
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    given = positions, starts, valid
    places = [x if x is None or x.dtype != torch.bool else x.view(torch.uint8) for x in given]
    of_q, of_k, of_v, of_o = q.stride(), k.stride(), v.stride(), o.stride()
    grid, options = plan_step(state.shape, scale, *[x is not None for x in places])
    launching.launch(
        "archzoo.kernels.retention.triton", "step_kernel", grid,
        (q, k, v, o, state, log_decay.contiguous(), *[q if x is None else x for x in places]),
        of_q[0], of_q[-2], of_k[0], of_k[-2], of_v[0], of_v[-2], of_o[0], of_o[-2],
        *[0 if x is None else x.stride(0) for x in places], *state.stride()[:3], state.shape[1],
        kept=options,
    )  # fmt: skip
    return o, state
