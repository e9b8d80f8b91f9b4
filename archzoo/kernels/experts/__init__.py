"""What lies around the experts' products, fused: moving rows, and weights in a lower dtype.

A mixture of experts is two grouped matrix products and much moving of memory around them. Each
function here moves every tensor once, forward and backward, in a kernel or two, and falls back to
its PyTorch reference implementation wherever `fused` says no: on the CPU, and in float64. Under
`torch.compile` the kernels are operators. What a router needs is in `routers`, SwiGLU in `swiglu`.
Measurements: docs/experts.md.

Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.derivatives import differentiated_again, plain_gradients, transformed
from archzoo.kernels.launching import fused, launch, on_hopper, power_of_2, warps_for
from archzoo.kernels.operators import compiling, define
from archzoo.kernels.swiglu import swiglu_plainly

KEYS = 2048  # assignments that one program counts or places
MAX_ROWS = 1024  # of an expert on average, for our product to make the gradient of its weights

_launch = functools.partial(launch, "archzoo.kernels.experts.triton")


# ---------------------------------------------------------------------------- moving rows


class Dispatch(NamedTuple):
    """Where every assignment goes; assignment t * k + j is the j-th choice of token t.

    Attributes:
        inverse: (assignments,) int64, the row of each assignment: rows are sorted by expert, those
            of one in the order of tokens; after them come those that are dropped.
        ends: (experts,) int32, where each expert's rows end.
        order: (assignments,) int64, the assignment of each row; None where kernels do the moving.
        dropped: Whether there may be rows after the last expert's. Nothing is computed for them,
            and they are never read: what they hold is not even a number.
    """

    inverse: Tensor
    ends: Tensor
    order: Tensor | None = None
    dropped: bool = False


def make_dispatch(
    indices: Tensor, experts: int, kept: Tensor | None = None, *, kernels: bool = False
) -> Dispatch:
    """Sort the assignments by expert, without synchronising with the device.

    Args:
        indices: (tokens, k) int64, the chosen experts.
        experts: How many there are.
        kept: (tokens, k) bool, what is not dropped; None: nothing is.
        kernels: For rows that are `fused`.
    """
    dropped = kept is not None
    keys = indices if kept is None else indices.masked_fill(~kept, experts)
    keys = keys.flatten()
    if kernels:
        place = _dispatch_operator if compiling() else _dispatch
        inverse, ends = place(keys, experts, dropped)
        return Dispatch(inverse, ends, dropped=dropped)
    # On a GPU a sort takes a pass for every 8 bits.
    chosen, order = keys.to(torch.int16).sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    last = torch.arange(experts, device=order.device, dtype=chosen.dtype)
    ends = torch.searchsorted(chosen, last, right=True, out_int32=True)
    return Dispatch(inverse, ends, order, dropped)


def _dispatch(keys: Tensor, experts: int, dropped: bool) -> tuple[Tensor, Tensor]:
    """Inverse and ends by counting, in two kernels where a sort takes ten."""
    keys = keys.contiguous()
    inverse, ends = _dispatch_shapes(keys, experts, dropped)
    bins, blocks = experts + dropped, -(-len(keys) // KEYS)
    counts = ends
    if blocks > 1:
        counts = ends.new_empty(bins * blocks)
        _launch("count_kernel", (bins, blocks), (keys, counts), len(keys), BLOCK=KEYS, num_warps=4)
    _launch(
        "place_kernel", (bins, blocks), (keys, counts, inverse, ends), len(keys), experts,
        COUNTED=blocks > 1, BLOCK=KEYS, TABLE=1024, num_warps=4,
    )  # fmt: skip
    return inverse, ends


def _dispatch_shapes(keys: Tensor, experts: int, _: bool) -> tuple[Tensor, Tensor]:
    return keys.new_empty(keys.shape), keys.new_empty(experts, dtype=torch.int32)


_dispatch_operator = define(
    "dispatch_rows(Tensor keys, int experts, bool dropped) -> (Tensor, Tensor)",
    _dispatch,
    _dispatch_shapes,
)


def spread_rows(x: Tensor, dispatch: Dispatch, k: int, dtype: torch.dtype) -> Tensor:
    """Each token's vector to the rows of its k assignments: (tokens, d) to (assignments, d).

    ``rows[inverse[t k + j]] = x[t]``.

    Args:
        x: (tokens, d).
        dispatch: Where each assignment's row lies.
        k: Assignments of a token.
        dtype: Of the rows.
    """
    if dispatch.order is None:
        spread = _spread_operator if compiling() else _Spread.apply
        rows: Tensor = spread(x, dispatch.inverse, dispatch.ends, k, dtype)
        return rows
    rows = _rearrange(x.to(dtype), dispatch.order, dispatch.inverse, k)
    return _only_computed(rows, dispatch)


def collect_rows(rows: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """The weighted sum of each token's rows: (assignments, d) and (tokens, k) to (tokens, d).

    ``y[t] = sum_j w[t, j] rows[inverse[t k + j]]``, in the weights' dtype; dropped rows add 0.

    Args:
        rows: (assignments, d), as `spread_rows` lays them out.
        weights: (tokens, k).
        dispatch: Where each assignment's row lies.
    """
    tokens, k = weights.shape
    if dispatch.order is None:
        y: Tensor
        if compiling():
            placed = dispatch.inverse, dispatch.ends
            y = _collect_operator(rows, weights, *placed, k, weights.dtype)
        else:
            y = _Collect.apply(rows, weights, dispatch.inverse, dispatch.ends)
        return y
    rows = _only_computed(rows, dispatch)
    back = _rearrange(rows, dispatch.inverse, dispatch.order, 1)
    return (back.view(tokens, k, rows.shape[1]) * weights[:, :, None]).sum(dim=1)


def _only_computed(rows: Tensor, dispatch: Dispatch) -> Tensor:
    """Zeros instead of dropped rows, in the gradient, too."""
    if not dispatch.dropped:
        return rows
    index = torch.arange(rows.shape[0], device=rows.device)
    return rows.masked_fill((index >= dispatch.ends[-1])[:, None], 0.0)


def _rearrange(x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    """`_Rearrange`, or by indexing, which `torch.func` transforms support."""
    if transformed():
        return x[order // k if k > 1 else order]
    rows: Tensor = _Rearrange.apply(x, order, inverse, k)
    return rows


class _Rearrange(torch.autograd.Function):
    """``y[i] = x[order[i] // k]`` for a permutation `order` of k copies of each row of x.

    The backward pass gathers, too: ``dx[t] = sum_j dy[inverse[t k + j]]``, always in the same
    order, where indexing's own would add up in the order in which threads happen to run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.k = k
        return x.index_select(0, order // k if k > 1 else order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        order, inverse = ctx.saved_tensors
        back: Tensor = _Rearrange.apply(grad, inverse, order, 1)
        if ctx.k > 1:
            back = back.view(back.shape[0] // ctx.k, ctx.k, back.shape[1]).sum(dim=1)
        return back, None, None, None


class _Spread(torch.autograd.Function):
    """`spread_rows` in one kernel; its gradient is the sum of `collect_rows`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inverse: Tensor, ends: Tensor, k: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(inverse, ends)
        ctx.k, ctx.dtype = k, x.dtype
        return _spread(x, inverse, ends, k, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, ends = ctx.saved_tensors
        if differentiated_again():
            back = _collect_plainly(grad, None, inverse, ends, ctx.k).to(ctx.dtype)
            return back, None, None, None, None
        return _collect(grad, None, inverse, ends, ctx.k, ctx.dtype), None, None, None, None


class _Collect(torch.autograd.Function):
    """`collect_rows` in one kernel, and both its gradients in another."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, inverse: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, inverse, ends)
        rows, weights = rows.contiguous(), weights.contiguous()
        return _collect(rows, weights, inverse, ends, weights.shape[1], weights.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weights, inverse, ends = ctx.saved_tensors
        if differentiated_again():
            compute = functools.partial(
                _collect_plainly, inverse=inverse, ends=ends, k=weights.shape[1]
            )
            by_rows, by_weights = plain_gradients(compute, (rows, weights), (grad,))
            return by_rows, by_weights, None, None
        return *_collect_backward(grad, rows, weights, inverse, ends), None, None


def _spread(x: Tensor, inverse: Tensor, ends: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    rows = _spread_shape(x, inverse, ends, k, dtype)
    tokens, width = x.shape
    block = power_of_2(width)
    _launch(
        "spread_kernel", (tokens,), (x, inverse, ends, rows), len(ends), width,
        K=k, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return rows


def _spread_shape(x: Tensor, _: Tensor, __: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0] * k, x.shape[1]), dtype=dtype)


def _collect_plainly(
    rows: Tensor, weights: Tensor | None, inverse: Tensor, ends: Tensor, k: int
) -> Tensor:
    """`_collect` of operations that have all derivatives."""
    back = rows[inverse].masked_fill((inverse >= ends[-1])[:, None], 0.0)
    back = back.view(len(rows) // k, k, rows.shape[1])
    return (back if weights is None else back * weights[:, :, None]).sum(dim=1)


def _collect(
    rows: Tensor, weights: Tensor | None, inverse: Tensor, ends: Tensor, k: int, dtype: torch.dtype
) -> Tensor:
    rows = rows.contiguous()
    y = _collect_shape(rows, weights, inverse, ends, k, dtype)
    tokens, width = y.shape
    block = power_of_2(width)
    scale = rows if weights is None else weights.contiguous()
    _launch(
        "collect_kernel", (tokens,), (rows, scale, inverse, ends, y), len(ends), width,
        K=k, WEIGHTED=weights is not None, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return y


def _collect_shape(
    rows: Tensor, _: Tensor | None, __: Tensor, ___: Tensor, k: int, dtype: torch.dtype
) -> Tensor:
    return rows.new_empty((rows.shape[0] // k, rows.shape[1]), dtype=dtype)


def _collect_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, inverse: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of the rows, but for rows after the last expert's, and of the weights."""
    rows, weights = rows.contiguous(), weights.contiguous()
    d_rows, d_weights = _collect_backward_shapes(grad, rows, weights)
    tokens, k = weights.shape
    block = power_of_2(rows.shape[1])
    _launch(
        "collect_backward_kernel", (tokens,),
        (grad.contiguous(), rows, weights, inverse, ends, d_rows, d_weights),
        len(ends), rows.shape[1],
        K=k, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return d_rows, d_weights


def _collect_backward_shapes(
    _: Tensor, rows: Tensor, weights: Tensor, *__: Tensor
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _keep_for_spread(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, inverse, ends, ctx.k, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(inverse, ends)


def _spread_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found: Tensor = _collect_operator(grad, None, *ctx.saved_tensors, ctx.k, ctx.dtype)
    return found, None, None, None, None


def _keep_for_collect(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])  # there are weights, wherever it is differentiated


def _collect_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_collect_backward_operator(grad, *ctx.saved_tensors), None, None, None, None


_spread_operator = define(
    "spread_rows(Tensor x, Tensor inverse, Tensor ends, int k, ScalarType dtype) -> Tensor",
    _spread,
    _spread_shape,
    _keep_for_spread,
    _spread_gradients,
)
_collect_operator = define(
    "collect_rows(Tensor rows, Tensor? weights, Tensor inverse, Tensor ends, int k, "
    "ScalarType dtype) -> Tensor",
    _collect,
    _collect_shape,
    _keep_for_collect,
    _collect_gradients,
)
_collect_backward_operator = define(
    "collect_rows_backward(Tensor grad, Tensor rows, Tensor weights, Tensor inverse, Tensor ends)"
    " -> (Tensor, Tensor)",
    _collect_backward,
    _collect_backward_shapes,
)


# ---------------------------------------------------------------------------- weights


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight.to(dtype)``, whose gradient comes back at the speed of memory.

    Torch's own copy from bfloat16 to float32 takes twice as long, and the gradient of all experts
    is the largest tensor of a layer.
    """
    narrowed = weight.dtype == torch.float32 and dtype == torch.bfloat16
    if narrowed and fused(weight) and not compiling():  # whose own copies are as fast
        lower: Tensor = _Cast.apply(weight)
        return lower
    return weight.to(dtype)


class _Cast(torch.autograd.Function):
    """float32 to bfloat16, and the gradient from bfloat16 to float32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if not grad.is_contiguous() or differentiated_again():
            return grad.float()
        wide = torch.empty_like(grad, dtype=torch.float32)
        _launch(
            "widen_kernel", (-(-grad.numel() // 4096),), (grad, wide), grad.numel(),
            BLOCK=4096, num_warps=8,
        )  # fmt: skip
        return wide


def multiply(rows: Tensor, matrices: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows by its matrix: (assignments, in) to (assignments, out).

    With many experts of few rows each, the gradient of their weights is more to write than to
    compute: our product then writes float32 at once, where a bfloat16 one has to be cast.

    Args:
        rows: Sorted by expert; those after the last expert's are not computed.
        matrices: (experts, out, in), what `cast_weight` made of `weight` in the rows' dtype.
        weight: (experts, out, in), which gets the gradient.
        ends: (experts,) int32, where each expert's rows end.
    """
    widens = _widens(rows, weight)
    y: Tensor
    if compiling():
        if widens:
            y = _multiply_operator(rows, matrices.detach(), weight, ends)
        else:
            y = _multiply_operator(rows, matrices, None, ends)
        return y
    if widens:
        y = _Multiply.apply(rows, matrices.detach(), weight, ends)
        return y
    return F.grouped_mm(rows, matrices.mT, offs=ends)


def _widens(rows: Tensor, weight: Tensor) -> bool:
    """By facts: bfloat16 rows, float32 weights that learn, on a GPU of the measured kind."""
    if rows.dtype != torch.bfloat16 or weight.dtype != torch.float32 or not fused(rows):
        return False
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return False
    few = rows.shape[0] <= MAX_ROWS * weight.shape[0]
    return few and (not rows.is_cuda or on_hopper(rows))


class _Multiply(torch.autograd.Function):
    """Grouped products, but for the gradient of the weights."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrices, weight, ends)
        return F.grouped_mm(rows, matrices.mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        rows, matrices, weight, ends = ctx.saved_tensors
        if differentiated_again():

            def compute(rows: Tensor, weight: Tensor) -> Tensor:
                return F.grouped_mm(rows, weight.to(rows.dtype).mT, offs=ends)

            by_rows, by_weight = plain_gradients(compute, (rows, weight), (grad,))
            return by_rows, None, by_weight, None
        grad = grad.contiguous()
        d_rows = d_weight = None
        if ctx.needs_input_grad[0]:
            d_rows = F.grouped_mm(grad, matrices, offs=ends)
        if ctx.needs_input_grad[2]:
            d_weight = _experts_gradient(grad, rows.contiguous(), ends)
        return d_rows, None, d_weight, None


def _grouped(rows: Tensor, matrices: Tensor, _: Tensor | None, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, matrices.mT, offs=ends)


def _grouped_shape(rows: Tensor, matrices: Tensor, *_: Tensor | None) -> Tensor:
    return rows.new_empty((rows.shape[0], matrices.shape[1]))


def _grouped_backward(
    grad: Tensor, rows: Tensor, matrices: Tensor, ends: Tensor, wide: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of rows and of the weights, the latter in float32 if `wide`."""
    d_rows, d_weight = _grouped_backward_shapes(grad, rows, matrices, ends, wide, [False, False])
    grad = grad.contiguous()
    if wanted[0]:
        d_rows = F.grouped_mm(grad, matrices, offs=ends)
    if wanted[1] and wide:
        d_weight = _experts_gradient(grad, rows.contiguous(), ends)
    elif wanted[1]:
        d_weight = F.grouped_mm(grad.mT, rows, offs=ends)
    return d_rows, d_weight


def _grouped_backward_shapes(
    _: Tensor, rows: Tensor, matrices: Tensor, __: Tensor, wide: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if wide else matrices.dtype
    return (
        rows.new_empty(rows.shape if wanted[0] else (0,)),
        rows.new_empty(matrices.shape if wanted[1] else (0,), dtype=dtype),
    )


def _keep_for_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, matrices, weight, ends = inputs
    ctx.wide = weight is not None
    ctx.save_for_backward(rows, matrices, ends)


def _grouped_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, matrices, ends = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])]
    d_rows, d_weight = _multiply_backward_operator(grad, rows, matrices, ends, ctx.wide, wanted)
    d_rows, d_weight = [d if w else None for d, w in zip((d_rows, d_weight), wanted, strict=True)]
    return d_rows, None if ctx.wide else d_weight, d_weight if ctx.wide else None, None


_multiply_operator = define(
    "multiply_experts(Tensor rows, Tensor matrices, Tensor? weight, Tensor ends) -> Tensor",
    _grouped,
    _grouped_shape,
    _keep_for_grouped,
    _grouped_gradients,
)
_multiply_backward_operator = define(
    "multiply_experts_backward(Tensor grad, Tensor rows, Tensor matrices, Tensor ends, bool wide, "
    "bool[] wanted) -> (Tensor, Tensor)",
    _grouped_backward,
    _grouped_backward_shapes,
)


def _experts_gradient(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """(experts, out, in) float32."""
    out, width = grad.shape[1], rows.shape[1]
    d_weight = grad.new_empty((len(ends), out, width), dtype=torch.float32)
    _launch(
        "experts_gradient_kernel", (-(-out // 128) * -(-width // 128), len(ends)),
        (grad, rows, ends, d_weight),
        OUT=out, IN=width, OUT_BLOCK=128, IN_BLOCK=128, STEP=64, STAGES=3,
        UPCAST=not grad.is_cuda, num_warps=8,
    )  # fmt: skip
    return d_weight


# ---------------------------------------------------------------------------- loop


def loop_experts(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
    """One expert after the other, as an operator: a compiler does not see how many rows each has.

    The sizes are read on the host, so a GPU is waited for once a layer and direction; with
    bfloat16 grouped products run there instead.

    Args:
        rows: (assignments, dim), sorted by expert; those after the last expert's give 0.
        gate_up: (experts, 2 width, dim).
        down: (experts, dim, width).
        ends: (experts,) int32, where each expert's rows end.
    """
    y: Tensor
    y, _ = _loop_operator(rows, gate_up, down, ends)
    return y


def _slices(ends: Tensor) -> list[slice]:
    bounds = [0, *ends.tolist()]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _loop(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' results, and what SwiGLU took, (assignments, 2 width)."""
    y, hidden = torch.zeros_like(rows), rows.new_zeros(len(rows), gate_up.shape[1])
    for expert, some in enumerate(_slices(ends)):
        torch.mm(rows[some], gate_up[expert].t(), out=hidden[some])
        torch.mm(swiglu_plainly(hidden[some]), down[expert].t(), out=y[some])
    return y, hidden


def _loop_backward(
    grad: Tensor, rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_rows, d_gate_up, d_down = (torch.zeros_like(x) for x in (rows, gate_up, down))
    for expert, some in enumerate(_slices(ends)):
        gate, up = hidden[some].chunk(2, dim=-1)
        active, dy = F.silu(gate), grad[some]
        torch.mm(dy.t(), active * up, out=d_down[expert])
        inner = dy @ down[expert]
        d_gate = torch.ops.aten.silu_backward(inner * up, gate)
        d_hidden = torch.cat([d_gate, inner * active], dim=-1)
        torch.mm(d_hidden.t(), rows[some], out=d_gate_up[expert])
        torch.mm(d_hidden, gate_up[expert], out=d_rows[some])
    return d_rows, d_gate_up, d_down


def _loop_shapes(rows: Tensor, gate_up: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), rows.new_empty(rows.shape[0], gate_up.shape[1])


def _loop_backward_shapes(
    _: Tensor, rows: Tensor, gate_up: Tensor, down: Tensor, *__: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(gate_up), torch.empty_like(down)


def _keep_for_loop(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _loop_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_loop_backward_operator(grad, *ctx.saved_tensors), None


_loop_operator = define(
    "loop_experts(Tensor rows, Tensor gate_up, Tensor down, Tensor ends) -> (Tensor, Tensor)",
    _loop,
    _loop_shapes,
    _keep_for_loop,
    _loop_gradients,
)
_loop_backward_operator = define(
    "loop_experts_backward(Tensor grad, Tensor rows, Tensor gate_up, Tensor down, Tensor ends, "
    "Tensor hidden) -> (Tensor, Tensor, Tensor)",
    _loop_backward,
    _loop_backward_shapes,
)
