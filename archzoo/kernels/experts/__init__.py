"""What lies around the experts' products, fused: moving rows, SwiGLU, weights in a lower dtype.

A mixture of experts is two grouped matrix products and much moving of memory around them. Each
function here moves every tensor once, forward and backward, in a kernel or two, and falls back to
its PyTorch reference implementation wherever `fused` says no: on the CPU, in float64, and under
`torch.compile`, which fuses that by itself. What a router needs is in `routers`. Measurements:
docs/experts.md.

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
        return Dispatch(*_dispatch(keys, experts, dropped), dropped=dropped)
    # On a GPU a sort takes a pass for every 8 bits.
    chosen, order = keys.to(torch.int16).sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    last = torch.arange(experts, device=order.device, dtype=chosen.dtype)
    ends = torch.searchsorted(chosen, last, right=True, out_int32=True)
    return Dispatch(inverse, ends, order, dropped)


def _dispatch(keys: Tensor, experts: int, dropped: bool) -> tuple[Tensor, Tensor]:
    """Inverse and ends by counting, in two kernels where a sort takes ten."""
    inverse = torch.empty_like(keys)
    ends = keys.new_empty(experts, dtype=torch.int32)
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
        rows: Tensor = _Spread.apply(x, dispatch.inverse, dispatch.ends, k, dtype)
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
    if dispatch.order is None:
        y: Tensor = _Collect.apply(rows, weights, dispatch.inverse, dispatch.ends)
        return y
    tokens, k = weights.shape
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
        x = x.contiguous()
        tokens, width = x.shape
        rows = x.new_empty((tokens * k, width), dtype=dtype)
        block = power_of_2(width)
        _launch(
            "spread_kernel", (tokens,), (x, inverse, ends, rows), len(ends), width,
            K=k, BLOCK=block, num_warps=warps_for(block),
        )  # fmt: skip
        return rows

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
        rows, weights = rows.contiguous(), weights.contiguous()
        d_rows, d_weights = torch.empty_like(rows), torch.empty_like(weights)
        tokens, k = weights.shape
        block = power_of_2(rows.shape[1])
        _launch(
            "collect_backward_kernel", (tokens,),
            (grad.contiguous(), rows, weights, inverse, ends, d_rows, d_weights),
            len(ends), rows.shape[1],
            K=k, BLOCK=block, num_warps=warps_for(block),
        )  # fmt: skip
        return d_rows, d_weights, None, None


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
    width = rows.shape[1]
    tokens = len(rows) // k
    y = rows.new_empty((tokens, width), dtype=dtype)
    block = power_of_2(width)
    _launch(
        "collect_kernel", (tokens,), (rows, rows if weights is None else weights, inverse, ends, y),
        len(ends), width,
        K=k, WEIGHTED=weights is not None, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return y


# ---------------------------------------------------------------------------- weights


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight.to(dtype)``, whose gradient comes back at the speed of memory.

    Torch's own copy from bfloat16 to float32 takes twice as long, and the gradient of all experts
    is the largest tensor of a layer.
    """
    if weight.dtype == torch.float32 and dtype == torch.bfloat16 and fused(weight):
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
    if _widens(rows, weight):
        y: Tensor = _Multiply.apply(rows, matrices.detach(), weight, ends)
        return y
    return F.grouped_mm(rows, matrices.mT, offs=ends)


def _widens(rows: Tensor, weight: Tensor) -> bool:
    """By facts: bfloat16 rows, float32 weights that learn, on a GPU of the measured kind."""
    if rows.dtype != torch.bfloat16 or weight.dtype != torch.float32 or not fused(rows):
        return False
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return False
    return len(rows) <= MAX_ROWS * len(weight) and (not rows.is_cuda or on_hopper(rows))


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

_library = torch.library.Library("archzoo", "FRAGMENT")
_library.define(
    "loop_experts(Tensor rows, Tensor gate_up, Tensor down, Tensor ends) -> (Tensor, Tensor)"
)
_library.define(
    "loop_experts_backward(Tensor grad, Tensor rows, Tensor gate_up, Tensor down, Tensor ends, "
    "Tensor hidden) -> (Tensor, Tensor, Tensor)"
)


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
    y, _ = torch.ops.archzoo.loop_experts(rows, gate_up, down, ends)
    return y


def _slices(ends: Tensor) -> list[slice]:
    bounds = [0, *ends.tolist()]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _loop(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' results, and what SwiGLU took, (assignments, 2 width)."""
    y, hidden = torch.zeros_like(rows), rows.new_zeros(len(rows), gate_up.shape[1])
    for expert, some in enumerate(_slices(ends)):
        torch.mm(rows[some], gate_up[expert].t(), out=hidden[some])
        torch.mm(_swiglu_plainly(hidden[some]), down[expert].t(), out=y[some])
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


for _key in ("CPU", "CUDA"):
    _library.impl("loop_experts", _loop, _key)
    _library.impl("loop_experts_backward", _loop_backward, _key)


@torch.library.register_fake("archzoo::loop_experts", lib=_library)
def _loop_fake(rows: Tensor, gate_up: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), rows.new_empty(rows.shape[0], gate_up.shape[1])


@torch.library.register_fake("archzoo::loop_experts_backward", lib=_library)
def _loop_backward_fake(
    _: Tensor, rows: Tensor, gate_up: Tensor, down: Tensor, *__: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(gate_up), torch.empty_like(down)


def _keep_for_loop(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _loop_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.archzoo.loop_experts_backward(grad, *ctx.saved_tensors), None


torch.library.register_autograd(
    "archzoo::loop_experts", _loop_gradients, setup_context=_keep_for_loop, lib=_library
)


# ---------------------------------------------------------------------------- SwiGLU


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of x (rows, 2 * width), gate first: (rows, width)."""
    if fused(x):
        y: Tensor = _SwiGLU.apply(x)
        return y
    return _swiglu_plainly(x)


def _swiglu_plainly(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """In one kernel each way, the product in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        x = x.contiguous()
        rows, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, width)
        block = min(power_of_2(width), 1024)
        _launch(
            "swiglu_kernel", (rows, -(-width // block)), (x, y), width,
            BLOCK=block, num_warps=warps_for(block),
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        (x,) = ctx.saved_tensors
        if differentiated_again():
            return plain_gradients(_swiglu_plainly, (x,), (grad,))[0]
        x = x.contiguous()
        rows, width = x.shape[0], x.shape[1] // 2
        d_x = torch.empty_like(x)
        block = min(power_of_2(width), 1024)
        _launch(
            "swiglu_backward_kernel", (rows, -(-width // block)), (x, grad.contiguous(), d_x),
            width, BLOCK=block, num_warps=warps_for(block),
        )  # fmt: skip
        return d_x
