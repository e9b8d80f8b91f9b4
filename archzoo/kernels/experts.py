"""What lies around the experts' products, fused: moving rows, SwiGLU, an attention router's scores.

A mixture of experts is two grouped matrix products and much moving of memory around them. Each
function here moves every tensor once, forward and backward, in a kernel or two, and is its plain
PyTorch twin wherever `fused` says no: on the CPU, in float64, and under `torch.compile`, which
fuses the plain form by itself. Measurements: docs/experts.md.

Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels.launching import Launch, run_beside, stream_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 8192  # of a row, which one program holds
MAX_EXPERTS = 128  # of an attention router, whose scores among themselves one program holds
MAX_COLUMNS = 3 * MAX_EXPERTS  # of a router's product
KEYS = 2048  # assignments that one program counts or places
MAX_BALANCED = 1024  # experts whose load is summarised by kernels
MAX_ROWS = 1024  # of an expert on average, for our product to make the gradient of its weights
MIN_TOKENS = 1024  # of a router's product, else it is a few launches and no work


def fused(x: Tensor, width: int = 1) -> bool:
    """Whether the kernels run on tensors such as x, with rows of `width`."""
    if x.dtype not in _DTYPES or width > MAX_WIDTH or not x.numel():
        return False
    return not torch.compiler.is_compiling() and run_beside(x)


def _hopper(x: Tensor) -> bool:
    """Whether x lies on the kind of GPU that our products were written for."""
    return torch.cuda.get_device_capability(x.device) == (9, 0)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _warps(block: int) -> int:
    """So that a thread holds 8 numbers: 16 bytes of bfloat16 are one load."""
    return min(max(block // 256, 1), 16)


@functools.lru_cache(maxsize=2048)
def _ready(
    kernel: str,
    grid: tuple[int, ...],
    numbers: tuple[float, ...],
    constants: tuple[tuple[str, Any], ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Launch:
    """A launch of a kernel, kept: of all that it depends on but where its tensors lie."""
    from archzoo.kernels import experts_triton

    named = dict(constants)
    warps = named.pop("num_warps")
    columns, rows = (*grid, 1)[:2]
    return Launch(
        getattr(experts_triton, kernel), (columns, rows, 1), numbers, named, num_warps=warps
    )


def _launch(
    kernel: str, grid: tuple[int, ...], tensors: tuple[Tensor, ...], *numbers: float, **options: Any
) -> None:
    """Run a kernel where its first tensor lies, with so many programs.

    Its parameters are tensors, numbers, and constants by name. Triton takes longer to find the
    compiled kernel than most of these run, so each is looked for once (`Launch`); a tensor that
    does not start at 16 bytes, as torch's own all do, goes the long way.
    """
    first = tensors[0]
    ready = _ready(
        kernel, grid, numbers, tuple(options.items()), tuple([x.dtype for x in tensors]),
        first.device,
    )  # fmt: skip
    if not first.is_cuda:
        ready(None, *tensors)
        return
    places = 0
    for tensor in tensors:
        places |= tensor.data_ptr()
    if first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            _run(ready, places % 16 == 0, tensors)
    else:
        _run(ready, places % 16 == 0, tensors)


def _run(ready: Launch, aligned: bool, tensors: tuple[Tensor, ...]) -> None:
    if aligned:
        ready(stream_of(tensors[0]), *tensors)
    else:
        ready.kernel[ready.grid](*tensors, *ready.numbers, **ready.constants, **ready.options)


# ---------------------------------------------------------------------------- moving rows


class Dispatch(NamedTuple):
    """Where every assignment goes; assignment t * k + j is the j-th choice of token t.

    Attributes:
        inverse: (assignments,) int64, the row of each assignment: rows are sorted by expert, those
            of one in the order of tokens; behind them stand those that are dropped.
        ends: (experts,) int32, where each expert's rows end.
        order: (assignments,) int64, the assignment of each row; None where kernels do the moving.
        dropped: Whether there may be rows behind the last expert's. Nothing is computed for them,
            and they are never read: what they hold is not even a number.
    """

    inverse: Tensor
    ends: Tensor
    order: Tensor | None = None
    dropped: bool = False


def make_dispatch(
    indices: Tensor, experts: int, kept: Tensor | None = None, *, kernels: bool = False
) -> Dispatch:
    """Sort the assignments by expert; no device is asked for a number.

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
    inverse[order] = torch.arange(len(order), device=order.device)
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

    ``rows[inverse[t k + j]] = x[t]``, in `dtype`.
    """
    if dispatch.order is None:
        rows: Tensor = _Spread.apply(x, dispatch.inverse, dispatch.ends, k, dtype)
        return rows
    rows = _Rearrange.apply(x.to(dtype), dispatch.order, dispatch.inverse, k)
    return _only_computed(rows, dispatch)


def collect_rows(rows: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """The weighted sum of each token's rows: (assignments, d) and (tokens, k) to (tokens, d).

    ``y[t] = sum_j w[t, j] rows[inverse[t k + j]]``, in the weights' dtype; dropped rows add 0.
    """
    if dispatch.order is None:
        y: Tensor = _Collect.apply(rows, weights, dispatch.inverse, dispatch.ends)
        return y
    tokens, k = weights.shape
    rows = _only_computed(rows, dispatch)
    back: Tensor = _Rearrange.apply(rows, dispatch.inverse, dispatch.order, 1)
    return (back.view(tokens, k, rows.shape[1]) * weights[:, :, None]).sum(dim=1)


def _only_computed(rows: Tensor, dispatch: Dispatch) -> Tensor:
    """Zeros in the place of dropped rows, in the gradient, too."""
    if not dispatch.dropped:
        return rows
    place = torch.arange(len(rows), device=rows.device)
    return rows.masked_fill((place >= dispatch.ends[-1])[:, None], 0.0)


class _Rearrange(torch.autograd.Function):
    """``y[i] = x[order[i] // k]`` for a permutation `order` of k copies of each row of x.

    The backward pass gathers, too: ``dx[t] = sum_j dy[inverse[t k + j]]``, always in the same
    order, where indexing's own would add up in whatever order threads arrive.
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
            back = back.view(len(back) // ctx.k, ctx.k, back.shape[1]).sum(dim=1)
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
        block = _power_of_2(width)
        _launch(
            "spread_kernel", (tokens,), (x, inverse, ends, rows), len(ends), width,
            K=k, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, ends = ctx.saved_tensors
        return _collect(grad, None, inverse, ends, ctx.k, ctx.dtype), None, None, None, None


class _Collect(torch.autograd.Function):
    """`collect_rows` in one kernel, and both its gradients in another."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, inverse: Tensor, ends: Tensor) -> Tensor:
        rows, weights = rows.contiguous(), weights.contiguous()
        ctx.save_for_backward(rows, weights, inverse, ends)
        return _collect(rows, weights, inverse, ends, weights.shape[1], weights.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, inverse, ends = ctx.saved_tensors
        d_rows, d_weights = torch.empty_like(rows), torch.empty_like(weights)
        tokens, k = weights.shape
        block = _power_of_2(rows.shape[1])
        _launch(
            "collect_backward_kernel", (tokens,),
            (grad.contiguous(), rows, weights, inverse, ends, d_rows, d_weights),
            len(ends), rows.shape[1],
            K=k, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return d_rows, d_weights, None, None


def _collect(
    rows: Tensor, weights: Tensor | None, inverse: Tensor, ends: Tensor, k: int, dtype: torch.dtype
) -> Tensor:
    rows = rows.contiguous()
    width = rows.shape[1]
    tokens = len(rows) // k
    y = rows.new_empty((tokens, width), dtype=dtype)
    block = _power_of_2(width)
    _launch(
        "collect_kernel", (tokens,), (rows, rows if weights is None else weights, inverse, ends, y),
        len(ends), width,
        K=k, WEIGHTED=weights is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return y


# ---------------------------------------------------------------------------- weights


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if not grad.is_contiguous():
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
        rows: Sorted by expert; those behind the last expert's are not computed.
        matrices: (experts, out, in), what `cast` made of `weight` in the rows' dtype.
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
    return len(rows) <= MAX_ROWS * len(weight) and (not rows.is_cuda or _hopper(rows))


class _Multiply(torch.autograd.Function):
    """Grouped products, but for the gradient of the weights."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrices, ends)
        return F.grouped_mm(rows, matrices.mT, offs=ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        rows, matrices, ends = ctx.saved_tensors
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


# ---------------------------------------------------------------------------- SwiGLU


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of x (rows, 2 * width), gate first: (rows, width)."""
    if fused(x):
        y: Tensor = _SwiGLU.apply(x)
        return y
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """In one kernel each way, the product in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        rows, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, width)
        block = min(_power_of_2(width), 1024)
        _launch(
            "swiglu_kernel", (rows, -(-width // block)), (x, y), width,
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        rows, width = x.shape[0], x.shape[1] // 2
        d_x = torch.empty_like(x)
        block = min(_power_of_2(width), 1024)
        _launch(
            "swiglu_backward_kernel", (rows, -(-width // block)), (x, grad.contiguous(), d_x),
            width, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return d_x


# ---------------------------------------------------------------------------- routers


def project(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A router's ``x W^T``, and x again for the experts.

    The gradient of x is the sum of both. The kernels write it once, and multiply on the matrix
    unit, as exactly as float32 numbers are multiplied elsewhere: each is split in two that the unit
    takes. Deterministic.

    Args:
        x: (tokens, dim).
        weight: W, (columns, dim) in x's dtype.
    """
    if _splits(x, weight):
        projected, again = _Project.apply(x, weight)
        return projected, again if x.requires_grad else x
    return F.linear(x, weight), x


def _splits(x: Tensor, weight: Tensor) -> bool:
    """By facts: float32 on a GPU that was measured, tokens enough to be worth the launches."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not fused(x):
        return False
    if len(x) < MIN_TOKENS or not 0 < weight.shape[0] <= MAX_COLUMNS or weight.shape[1] > MAX_WIDTH:
        return False
    return not x.is_cuda or _hopper(x)


def _padded(columns: int) -> int:
    """So that rows of the transposed weight can be read 16 bytes at once."""
    return -(-columns // 16) * 16


def _column_block(columns: int) -> int:
    """Columns of a program: all, or 128, or 64 where that pads less."""
    if columns <= 128:
        return max(_power_of_2(columns), 16)
    return 64 if 0 < columns % 128 <= 64 else 128


class _Project(torch.autograd.Function):
    """The product in one kernel, and the gradient of x in one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        columns, dim = weight.shape
        padded = _padded(columns)
        high, low = weight.new_empty(2, columns, dim).unbind()
        high_t, low_t = weight.new_empty(2, dim, padded).unbind()
        _launch(
            "split_kernel", (-(-padded // 32), -(-dim // 32)),
            (weight.contiguous(), high, low, high_t, low_t),
            COLUMNS=columns, DIM=dim, PADDED=padded, BLOCK=32, num_warps=4,
        )  # fmt: skip
        read = x.contiguous()
        ctx.save_for_backward(read, high_t, low_t)
        ctx.columns = columns
        return _product(read, high, low, None, _column_block(columns)), x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, again: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        x, high_t, low_t = ctx.saved_tensors
        if grad is None:
            return again, None
        grad = grad.contiguous()
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = _product(grad, high_t, low_t, again, 64)
        if ctx.needs_input_grad[1]:
            d_weight = grad.t() @ x  # few columns and many rows: no kernel of ours was faster
        return d_x, d_weight


def _product(a: Tensor, high: Tensor, low: Tensor, extra: Tensor | None, block: int) -> Tensor:
    """``a (high + low)^T + extra``, so many columns a program."""
    rows, inner = a.shape
    columns, padded = high.shape
    y = a.new_empty(rows, columns)
    each = 128
    _launch(
        "product_kernel", (-(-columns // block), -(-rows // each)),
        (a, high, low, a if extra is None else extra.contiguous(), y), rows,
        INNER=inner, PADDED=padded, COLUMNS=columns, ADD=extra is not None,
        ROWS=each, BLOCK=block, STEP=32, STAGES=3 if inner > 256 else 2, num_warps=8,
    )  # fmt: skip
    return y


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of x (tokens, n) and where they stand, largest first.

    As `torch.topk`, of which a small n is not the strong point; without gradient.
    """
    x = x.detach()
    if not (fused(x) and x.dtype == torch.float32 and x.shape[1] <= MAX_EXPERTS):
        values, indices = x.topk(k, dim=-1)
        return values, indices
    x = x.contiguous()
    tokens, n = x.shape
    values = x.new_empty(tokens, k)
    indices = x.new_empty((tokens, k), dtype=torch.int64)
    each, options = _row_options(n)
    grid = (-(-tokens // each),)
    _launch("largest_kernel", grid, (x, values, indices), tokens, n, K=k, **options)
    return values, indices


def choose(
    logits: Tensor, k: int, bias: Tensor | None, *, sigmoid: bool, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A router's decision by its logits z (tokens, n): what `archzoo.feedforward.routers` says.

    ``s = softmax(z)`` or ``sigmoid(z)``; chosen are the k largest of s + b; their weights are s, or
    s over the sum of the chosen's s; the probabilities are s over the sum of all.

    Args:
        logits: z.
        k: How many are chosen.
        bias: b, (n,), for the choice alone; None: none.
        sigmoid: Scores by a sigmoid, not by a softmax.
        renormalise: Weights sum to 1.

    Returns:
        weights (tokens, k), indices (tokens, k) int64, probabilities (tokens, n).
    """
    if fused(logits) and logits.dtype == torch.float32 and logits.shape[1] <= MAX_EXPERTS:
        weights, indices, probabilities = _Choose.apply(logits, bias, k, sigmoid, renormalise)
        return weights, indices, probabilities
    if sigmoid:
        scores = logits.sigmoid()
        probabilities = scores / scores.sum(dim=-1, keepdim=True)
    else:
        scores = probabilities = logits.softmax(dim=-1)
    # Both scores rise with the logits, which cannot underflow to a tie.
    order = logits if bias is None else scores + bias.to(scores.dtype)
    indices = largest(order, k)[1]
    if renormalise and not sigmoid:
        return logits.gather(-1, indices).softmax(dim=-1), indices, probabilities
    weights = scores.gather(-1, indices)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, indices, probabilities


class _Choose(torch.autograd.Function):
    """In one kernel each way, instead of a dozen that take longer to launch than to run."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, k: int, sigmoid: bool, renormalise: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        logits = logits.contiguous()
        tokens, n = logits.shape
        weights, probabilities = logits.new_empty(tokens, k), torch.empty_like(logits)
        indices = logits.new_empty((tokens, k), dtype=torch.int64)
        ctx.options = {"K": k, "SIGMOID": sigmoid, "RENORMALISE": renormalise}
        each, options = _row_options(n)
        _launch(
            "choose_kernel", (-(-tokens // each),),
            (logits, logits if bias is None else bias, weights, indices, probabilities), tokens, n,
            BIASED=bias is not None, **ctx.options, **options,
        )  # fmt: skip
        ctx.save_for_backward(logits, indices)
        ctx.mark_non_differentiable(indices)
        return weights, indices, probabilities

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, d_weights: Tensor | None, _: None, d_probabilities: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        logits, indices = ctx.saved_tensors
        if d_weights is None and d_probabilities is None:
            return None, None, None, None, None
        tokens, n = logits.shape
        d_logits = torch.empty_like(logits)
        stride = 0
        if d_probabilities is not None:
            # The balancing loss has one gradient for all tokens, a row that is expanded.
            if d_probabilities.stride(1) != 1 or d_probabilities.stride(0) not in (0, n):
                d_probabilities = d_probabilities.contiguous()
            stride = d_probabilities.stride(0)
        each, options = _row_options(n)
        _launch(
            "choose_backward_kernel", (-(-tokens // each),),
            (
                logits, indices,
                logits if d_weights is None else d_weights.contiguous(),
                logits if d_probabilities is None else d_probabilities,
                d_logits,
            ),
            tokens, n, stride,
            WEIGHTS=d_weights is not None, PROBABILITIES=d_probabilities is not None,
            **ctx.options, **options,
        )  # fmt: skip
        return d_logits, None, None, None, None


@functools.cache
def _row_options(n: int) -> tuple[int, dict[str, int]]:
    """Tokens of a program that holds rows of n numbers, and how it is compiled."""
    block = _power_of_2(n)
    tokens = max(512 // block, 1)
    return tokens, {"TOKENS": tokens, "BLOCK": block, "num_warps": 4}


def attend_experts(projected: Tensor) -> Tensor:
    """``z_i = sum_j softmax_j(q_i k_j) v_j`` within each token: (tokens, 3 n) to (tokens, n).

    Args:
        projected: q, k and v of the n experts, one number each, side by side.
    """
    experts = projected.shape[1] // 3
    if fused(projected) and projected.dtype == torch.float32 and experts <= MAX_EXPERTS:
        z: Tensor = _Attend.apply(projected)
        return z
    q, k, v = projected.chunk(3, dim=-1)
    attention = (q[:, :, None] * k[:, None, :]).softmax(dim=-1)  # (tokens, experts, experts)
    return (attention * v[:, None, :]).sum(dim=-1)


@functools.cache
def _attend_options(experts: int) -> tuple[int, dict[str, int]]:
    """Tokens of a program, and how it is compiled: a thread holds one expert of a token.

    Beyond 64 experts four threads share one: with all of its scores one runs out of registers.
    """
    block = _power_of_2(experts)
    tokens, warps = max(128 // block, 1), 4 if block < 128 else 16
    return tokens, {"EXPERTS": experts, "TOKENS": tokens, "BLOCK": block, "num_warps": warps}


class _Attend(torch.autograd.Function):
    """The scores of a token live in registers, and are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        projected = projected.contiguous()
        ctx.save_for_backward(projected)
        tokens, experts = projected.shape[0], projected.shape[1] // 3
        z = projected.new_empty(tokens, experts)
        each, options = _attend_options(experts)
        _launch("attend_kernel", (-(-tokens // each),), (projected, z), tokens, **options)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        tokens, experts = projected.shape[0], projected.shape[1] // 3
        d_projected = torch.empty_like(projected)
        each, options = _attend_options(experts)
        _launch(
            "attend_backward_kernel", (-(-tokens // each),),
            (projected, grad.contiguous(), d_projected), tokens, **options,
        )  # fmt: skip
        return d_projected


# ---------------------------------------------------------------------------- load

LOSSES = {"none": 0, "switch": 1, "squared_mean": 2}


def summarise_load(
    probabilities: Tensor, indices: Tensor, kind: str, coefficient: float | Tensor, room: int
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """What `archzoo.feedforward.balance` makes of a routing, in two kernels instead of 30.

    Args:
        probabilities: (tokens, experts) float32.
        indices: (tokens, k) int64, the chosen experts.
        kind: Of the loss: "none", "switch" or "squared_mean".
        coefficient: Of the loss; a scalar float32 tensor is read now, not in the backward pass.
        room: The capacity.

    Returns:
        The assignments, (experts,) int64. The loss by its coefficient, a scalar with a gradient to
        the probabilities, or None where kind is "none". And scalars: max_violation, entropy,
        unused, the virtual drop_rate; max1_max2 and max2_max3 as far as there are experts; and
        balance, the loss alone, where there is one.
    """
    assignments, loss, seen = _Summarise.apply(
        probabilities, indices, LOSSES[kind], coefficient, room
    )
    names = ("max_violation", "entropy", "unused", "drop_rate", "balance", "max1_max2", "max2_max3")
    found = dict(zip(names, seen.unbind(), strict=False))
    if kind == "none":
        del found["balance"]
        return assignments, None, found
    return assignments, loss, found


class _Summarise(torch.autograd.Function):
    """The loss's gradient is made with it: a row of (experts,) numbers, the same for all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        probabilities: Tensor,
        indices: Tensor,
        kind: int,
        coefficient: float | Tensor,
        room: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        probabilities, indices = probabilities.contiguous(), indices.contiguous()
        (tokens, n), k = probabilities.shape, indices.shape[1]
        block, ratios = _power_of_2(n), min(n - 1, 2)
        each = max(2048 // block, 1)
        programs = -(-tokens // each)
        counts = indices.new_empty(programs * n, dtype=torch.int32)
        sums = probabilities.new_empty(programs * (n + ratios))
        assignments = indices.new_empty(n)
        loss, seen, slope = (probabilities.new_empty(shape) for shape in ((), 5 + ratios, n))
        _launch(
            "survey_kernel", (programs,), (probabilities, indices, counts, sums), tokens,
            N=n, K=k, RATIOS=ratios, TOKENS=each, BLOCK=block, num_warps=4,
        )  # fmt: skip
        alpha, constant = sums, 0.0
        if isinstance(coefficient, Tensor):
            alpha = coefficient
        else:
            constant = float(coefficient)
        _launch(
            "summarise_kernel", (1,), (counts, sums, alpha, assignments, loss, seen, slope),
            programs, tokens, float(tokens * k), room, math.log(max(n, 2)), constant,
            N=n, RATIOS=ratios, KIND=kind, ADAPTIVE=alpha is not sums,
            STEP=max(8192 // block, 1), BLOCK=block, num_warps=8,
        )  # fmt: skip
        ctx.save_for_backward(slope)
        ctx.tokens = tokens
        ctx.mark_non_differentiable(assignments, seen)
        return assignments, loss, seen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, _: None, grad: Tensor | None, __: None
    ) -> tuple[Tensor | None, None, None, None, None]:
        if grad is None:
            return None, None, None, None, None
        (slope,) = ctx.saved_tensors
        return (grad * slope).expand(ctx.tokens, -1), None, None, None, None
