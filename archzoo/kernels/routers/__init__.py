"""What a router computes, fused: its product, attention among experts, the choice, the load.

Each function is a kernel or two each way, with a PyTorch reference implementation as fallback
wherever `fused` says no, as those of `experts`; that of `summarise_load` alone is where it is
called, in `archzoo.feedforward.balance`. Measurements: docs/experts.md.

Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.derivatives import differentiated_again, plain_gradients
from archzoo.kernels.launching import MAX_WIDTH, fused, launch, on_hopper, power_of_2
from archzoo.kernels.operators import compiling, define

MAX_EXPERTS = 128  # of an attention router, whose scores among themselves one program holds
MAX_COLUMNS = 3 * MAX_EXPERTS  # of a router's product
MAX_BALANCED = 1024  # experts whose load is summarised by kernels
MIN_TOKENS = 1024  # of a router's product, else it is a few launches and no work

_launch = functools.partial(launch, "archzoo.kernels.routers.triton")


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
        if compiling():  # which adds both gradients in a pass of its own
            projected, _ = _project_operator(x, weight)
            return projected, x
        projected, again = _Project.apply(x, weight)
        return projected, again if x.requires_grad else x
    return F.linear(x, weight), x


def _splits(x: Tensor, weight: Tensor) -> bool:
    """By facts: float32 on a GPU that was measured, tokens enough to be worth the launches."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not fused(x):
        return False
    if (
        x.shape[0] < MIN_TOKENS
        or not 0 < weight.shape[0] <= MAX_COLUMNS
        or weight.shape[1] > MAX_WIDTH
    ):
        return False
    return not x.is_cuda or on_hopper(x)


def _padded(columns: int) -> int:
    """So that rows of the transposed weight can be read 16 bytes at once."""
    return -(-columns // 16) * 16


def _column_block(columns: int) -> int:
    """Columns of a program: all, or 128, or 64 where that pads less."""
    if columns <= 128:
        return max(power_of_2(columns), 16)
    return 64 if 0 < columns % 128 <= 64 else 128


class _Project(torch.autograd.Function):
    """The product in one kernel, and the gradient of x in one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        projected, transposed = _project(x, weight)
        ctx.save_for_backward(x, weight, transposed)
        return projected, x.view_as(x)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, again: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight, transposed = ctx.saved_tensors
        if grad is None:
            return again, None
        if differentiated_again():
            by_x, by_weight = plain_gradients(F.linear, (x, weight), (grad,))
            return by_x if by_x is None or again is None else by_x + again, by_weight
        grad, x = grad.contiguous(), x.contiguous()
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = _project_back(grad, transposed, again)
        if ctx.needs_input_grad[1]:
            d_weight = grad.t() @ x  # few columns and many rows: no kernel of ours was faster
        return d_x, d_weight


def _project(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The product, and the weight in two for its gradient: (2, dim, columns and some zeros)."""
    columns, dim = weight.shape
    projected, transposed = _project_shapes(x, weight)
    padded = transposed.shape[2]
    high, low = weight.new_empty(2, columns, dim).unbind()
    _launch(
        "split_kernel", (-(-padded // 32), -(-dim // 32)),
        (weight.contiguous(), high, low, *transposed.unbind()),
        COLUMNS=columns, DIM=dim, PADDED=padded, BLOCK=32, num_warps=4,
    )  # fmt: skip
    _product(x.contiguous(), high, low, None, _column_block(columns), projected)
    return projected, transposed


def _project_shapes(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    columns, dim = weight.shape
    return x.new_empty(x.shape[0], columns), weight.new_empty(2, dim, _padded(columns))


def _project_back(grad: Tensor, transposed: Tensor, again: Tensor | None) -> Tensor:
    """The gradient of x."""
    grad = grad.contiguous()
    d_x = _project_back_shape(grad, transposed, again)
    high, low = transposed.unbind()
    _product(grad, high, low, again, 64, d_x)
    return d_x


def _project_back_shape(grad: Tensor, transposed: Tensor, _: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape[0], transposed.shape[1])


def _keep_for_project(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[1])


def _project_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, transposed = ctx.saved_tensors
    d_x = d_weight = None
    if ctx.needs_input_grad[0]:
        d_x = _project_back_operator(grad, transposed, None)
    if ctx.needs_input_grad[1]:
        d_weight = grad.t() @ x
    return d_x, d_weight


_project_operator = define(
    "project_router(Tensor x, Tensor weight) -> (Tensor, Tensor)",
    _project,
    _project_shapes,
    _keep_for_project,
    _project_gradients,
)
_project_back_operator = define(
    "project_router_back(Tensor grad, Tensor transposed, Tensor? again) -> Tensor",
    _project_back,
    _project_back_shape,
)


def _product(
    a: Tensor, high: Tensor, low: Tensor, extra: Tensor | None, block: int, y: Tensor
) -> None:
    """``y = a (high + low)^T + extra``, with that many columns a program."""
    rows, inner = a.shape
    columns, padded = high.shape
    each = 128
    _launch(
        "product_kernel", (-(-columns // block), -(-rows // each)),
        (a, high, low, a if extra is None else extra.contiguous(), y), rows,
        INNER=inner, PADDED=padded, COLUMNS=columns, ADD=extra is not None,
        ROWS=each, BLOCK=block, STEP=32, STAGES=3 if inner > 256 else 2, num_warps=8,
    )  # fmt: skip


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of x (tokens, n) and their indices, largest first.

    As `torch.topk`, of which a small n is not the strong point; without gradient.
    """
    x = x.detach()
    if not (fused(x) and x.dtype == torch.float32 and x.shape[1] <= MAX_EXPERTS):
        values, indices = x.topk(k, dim=-1)
        return values, indices
    values, indices = (_largest_operator if compiling() else _largest)(x, k)
    return values, indices


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    values, indices = _largest_shapes(x, k)
    tokens, n = x.shape
    each, options = _row_options(n)
    grid = (-(-tokens // each),)
    _launch("largest_kernel", grid, (x, values, indices), tokens, n, K=k, **options)
    return values, indices


def _largest_shapes(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty((x.shape[0], k), dtype=torch.int64)


_largest_operator = define(
    "largest(Tensor x, int k) -> (Tensor, Tensor)", _largest, _largest_shapes
)


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
        decide = _choose_operator if compiling() else _Choose.apply
        weights, indices, probabilities = decide(logits, bias, k, sigmoid, renormalise)
        return weights, indices, probabilities
    scores, probabilities = _score(logits, sigmoid)
    # Both scores rise with the logits, which cannot underflow to a tie.
    order = logits if bias is None else scores + bias.to(scores.dtype)
    indices = largest(order, k)[1]
    return _weigh(logits, scores, indices, sigmoid, renormalise), indices, probabilities


def _score(logits: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """The scores s, and the probabilities."""
    if sigmoid:
        scores = logits.sigmoid()
        return scores, scores / scores.sum(dim=-1, keepdim=True)
    scores = logits.softmax(dim=-1)
    return scores, scores


def _weigh(
    logits: Tensor, scores: Tensor, indices: Tensor, sigmoid: bool, renormalise: bool
) -> Tensor:
    """The weights of what was chosen."""
    if renormalise and not sigmoid:
        return logits.gather(-1, indices).softmax(dim=-1)
    weights = scores.gather(-1, indices)
    return weights / weights.sum(dim=-1, keepdim=True) if renormalise else weights


class _Choose(torch.autograd.Function):
    """In one kernel each way, instead of a dozen that take longer to launch than to run."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, k: int, sigmoid: bool, renormalise: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        weights, indices, probabilities = _choose(logits, bias, k, sigmoid, renormalise)
        ctx.save_for_backward(logits, indices)
        ctx.options = sigmoid, renormalise
        ctx.mark_non_differentiable(indices)
        return weights, indices, probabilities

    @staticmethod
    def backward(
        ctx: Any, d_weights: Tensor | None, _: None, d_probabilities: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        logits, indices = ctx.saved_tensors
        if d_weights is None and d_probabilities is None:
            return None, None, None, None, None
        if differentiated_again():
            sigmoid, renormalise = ctx.options

            def compute(logits: Tensor) -> tuple[Tensor, Tensor]:
                scores, probabilities = _score(logits, sigmoid)
                return _weigh(logits, scores, indices, sigmoid, renormalise), probabilities

            (by_logits,) = plain_gradients(compute, (logits,), (d_weights, d_probabilities))
            return by_logits, None, None, None, None
        given = logits, indices, d_weights, d_probabilities
        return _choose_backward(*given, *ctx.options), None, None, None, None


def _choose(
    logits: Tensor, bias: Tensor | None, k: int, sigmoid: bool, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.contiguous()
    weights, indices, probabilities = _choose_shapes(logits, bias, k, sigmoid, renormalise)
    tokens, n = logits.shape
    each, options = _row_options(n)
    added = logits if bias is None else bias.contiguous()
    _launch(
        "choose_kernel", (-(-tokens // each),),
        (logits, added, weights, indices, probabilities), tokens, n,
        BIASED=bias is not None, K=k, SIGMOID=sigmoid, RENORMALISE=renormalise, **options,
    )  # fmt: skip
    return weights, indices, probabilities


def _choose_shapes(logits: Tensor, _: Tensor | None, k: int, *__: bool) -> tuple[Tensor, ...]:
    tokens = logits.shape[0]
    indices = logits.new_empty((tokens, k), dtype=torch.int64)
    return logits.new_empty(tokens, k), indices, logits.new_empty(logits.shape)


def _choose_backward(
    logits: Tensor,
    indices: Tensor,
    d_weights: Tensor | None,
    d_probabilities: Tensor | None,
    sigmoid: bool,
    renormalise: bool,
) -> Tensor:
    logits = logits.contiguous()
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
        K=indices.shape[1], SIGMOID=sigmoid, RENORMALISE=renormalise, **options,
    )  # fmt: skip
    return d_logits


def _choose_backward_shape(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep_for_choose(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, output[1])
    ctx.options = options


def _choose_gradients(
    ctx: Any, d_weights: Tensor | None, _: Tensor | None, d_probabilities: Tensor | None
) -> tuple[Tensor | None, None, None, None, None]:
    d_logits = None
    if d_weights is not None or d_probabilities is not None:
        given = *ctx.saved_tensors, d_weights, d_probabilities
        d_logits = _choose_backward_operator(*given, *ctx.options)
    return d_logits, None, None, None, None


_choose_operator = define(
    "choose_experts(Tensor logits, Tensor? bias, int k, bool sigmoid, bool renormalise) -> "
    "(Tensor, Tensor, Tensor)",
    _choose,
    _choose_shapes,
    _keep_for_choose,
    _choose_gradients,
)
_choose_backward_operator = define(
    "choose_experts_backward(Tensor logits, Tensor indices, Tensor? d_weights, "
    "Tensor? d_probabilities, bool sigmoid, bool renormalise) -> Tensor",
    _choose_backward,
    _choose_backward_shape,
)


@functools.cache
def _row_options(n: int) -> tuple[int, dict[str, int]]:
    """Tokens of a program that holds rows of n numbers, and how it is compiled."""
    block = power_of_2(n)
    tokens = max(512 // block, 1)
    return tokens, {"TOKENS": tokens, "BLOCK": block, "num_warps": 4}


def attend_experts(projected: Tensor) -> Tensor:
    """``z_i = sum_j softmax_j(q_i k_j) v_j`` within each token: (tokens, 3 n) to (tokens, n).

    Args:
        projected: q, k and v of the n experts, one number each, side by side.
    """
    experts = projected.shape[1] // 3
    if fused(projected) and projected.dtype == torch.float32 and experts <= MAX_EXPERTS:
        z: Tensor = _attend_operator(projected) if compiling() else _Attend.apply(projected)
        return z
    return _attend_plainly(projected)


def _attend_plainly(projected: Tensor) -> Tensor:
    q, k, v = projected.chunk(3, dim=-1)
    attention = (q[:, :, None] * k[:, None, :]).softmax(dim=-1)  # (tokens, experts, experts)
    return (attention * v[:, None, :]).sum(dim=-1)


@functools.cache
def _attend_options(experts: int) -> tuple[int, dict[str, int]]:
    """Tokens of a program, and how it is compiled: a thread holds one expert of a token.

    Above 64 experts four threads hold one together: all of its scores do not fit in the registers
    of one.
    """
    block = power_of_2(experts)
    tokens, warps = max(128 // block, 1), 4 if block < 128 else 16
    return tokens, {"EXPERTS": experts, "TOKENS": tokens, "BLOCK": block, "num_warps": warps}


class _Attend(torch.autograd.Function):
    """The scores of a token live in registers, and are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        return _attend(projected)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        (projected,) = ctx.saved_tensors
        if differentiated_again():
            return plain_gradients(_attend_plainly, (projected,), (grad,))[0]
        return _attend_backward(projected, grad)


def _attend(projected: Tensor) -> Tensor:
    projected = projected.contiguous()
    z = _attend_shape(projected)
    tokens, experts = z.shape
    each, options = _attend_options(experts)
    _launch("attend_kernel", (-(-tokens // each),), (projected, z), tokens, **options)
    return z


def _attend_shape(projected: Tensor) -> Tensor:
    return projected.new_empty(projected.shape[0], projected.shape[1] // 3)


def _attend_backward(projected: Tensor, grad: Tensor) -> Tensor:
    projected = projected.contiguous()
    d_projected = _attend_backward_shape(projected, grad)
    tokens, experts = grad.shape
    each, options = _attend_options(experts)
    _launch(
        "attend_backward_kernel", (-(-tokens // each),),
        (projected, grad.contiguous(), d_projected), tokens, **options,
    )  # fmt: skip
    return d_projected


def _attend_backward_shape(projected: Tensor, _: Tensor) -> Tensor:
    return projected.new_empty(projected.shape)


def _keep_for_attend(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _attend_gradients(ctx: Any, grad: Tensor) -> Tensor:
    found: Tensor = _attend_backward_operator(*ctx.saved_tensors, grad)
    return found


_attend_operator = define(
    "attend_experts(Tensor projected) -> Tensor",
    _attend,
    _attend_shape,
    _keep_for_attend,
    _attend_gradients,
)
_attend_backward_operator = define(
    "attend_experts_backward(Tensor projected, Tensor grad) -> Tensor",
    _attend_backward,
    _attend_backward_shape,
)


# ---------------------------------------------------------------------------- load

LOSSES = {"none": 0, "switch": 1, "squared_mean": 2}


def summarise_load(
    probabilities: Tensor, indices: Tensor, kind: str, coefficient: float | Tensor, capacity: int
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """What `archzoo.feedforward.balance` makes of a routing, in two kernels instead of 30.

    Args:
        probabilities: (tokens, experts) float32.
        indices: (tokens, k) int64, the chosen experts.
        kind: Of the loss: "none", "switch" or "squared_mean".
        coefficient: Of the loss; a scalar float32 tensor is read now, not in the backward pass.
        capacity: Tokens that each expert takes, for the virtual drop rate.

    Returns:
        The assignments, (experts,) int64. The loss by its coefficient, a scalar with a gradient to
        the probabilities, or None where kind is "none". And scalars: max_violation, entropy,
        unused, the virtual drop_rate; max1_max2 and max2_max3 as far as there are experts; and
        balance, the loss alone, where there is one.
    """
    if compiling():
        alpha = coefficient if isinstance(coefficient, Tensor) else None
        constant = 0.0 if isinstance(coefficient, Tensor) else coefficient
        assignments, loss, seen, _ = _summarise_operator(
            probabilities, indices, LOSSES[kind], alpha, constant, capacity
        )
    else:
        assignments, loss, seen = _Summarise.apply(
            probabilities, indices, LOSSES[kind], coefficient, capacity
        )
    names = ("max_violation", "entropy", "unused", "drop_rate", "balance", "max1_max2", "max2_max3")
    found = dict(zip(names, seen.unbind(), strict=False))
    if kind == "none":
        del found["balance"]
        return assignments, None, found
    return assignments, loss, found


def _version(coefficient: float | Tensor) -> int:
    """How often a coefficient was written over."""
    if isinstance(coefficient, Tensor) and not coefficient.is_inference():
        return coefficient._version
    return 0


class _Summarise(torch.autograd.Function):
    """The loss's gradient is made with it: a row of (experts,) numbers, the same for all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        probabilities: Tensor,
        indices: Tensor,
        kind: int,
        coefficient: float | Tensor,
        capacity: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        alpha = coefficient if isinstance(coefficient, Tensor) else None
        constant = 0.0 if isinstance(coefficient, Tensor) else float(coefficient)
        assignments, loss, seen, slope = _summarise(
            probabilities, indices, kind, alpha, constant, capacity
        )
        # For a second derivative, which the loss has where it is not linear in the probabilities.
        curved = kind == LOSSES["squared_mean"]
        ctx.save_for_backward(slope, probabilities if curved else None)
        ctx.tokens = len(probabilities)
        ctx.coefficient, ctx.version = coefficient, _version(coefficient)
        ctx.mark_non_differentiable(assignments, seen)
        return assignments, loss, seen

    @staticmethod
    def backward(
        ctx: Any, _: None, grad: Tensor | None, __: None
    ) -> tuple[Tensor | None, None, None, None, None]:
        if grad is None:
            return None, None, None, None, None
        slope, probabilities = ctx.saved_tensors
        if probabilities is not None and differentiated_again():  # the same, of operations
            if _version(ctx.coefficient) != ctx.version:
                raise RuntimeError(
                    "the balancing loss has no second derivative any more: its coefficient has "
                    "moved since (after_step); differentiate before the step ends"
                )
            mean = probabilities.mean(dim=0)
            slope = 2 * ctx.coefficient * (mean - 1 / len(mean)) / ctx.tokens
        return (grad * slope).expand(ctx.tokens, -1), None, None, None, None


def _summarise(
    probabilities: Tensor,
    indices: Tensor,
    kind: int,
    alpha: Tensor | None,
    constant: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The assignments, the loss, what is logged, and the loss's slope in the probabilities."""
    probabilities, indices = probabilities.contiguous(), indices.contiguous()
    (tokens, n), k = probabilities.shape, indices.shape[1]
    block, ratios = power_of_2(n), min(n - 1, 2)
    each = max(2048 // block, 1)
    programs = -(-tokens // each)
    counts = indices.new_empty(programs * n, dtype=torch.int32)
    sums = probabilities.new_empty(programs * (n + ratios))
    assignments, loss, seen, slope = _summarise_shapes(probabilities, indices)
    _launch(
        "survey_kernel", (programs,), (probabilities, indices, counts, sums), tokens,
        N=n, K=k, RATIOS=ratios, TOKENS=each, BLOCK=block, num_warps=4,
    )  # fmt: skip
    _launch(
        "summarise_kernel", (1,),
        (counts, sums, sums if alpha is None else alpha, assignments, loss, seen, slope),
        programs, tokens, float(tokens * k), capacity, math.log(max(n, 2)), constant,
        N=n, RATIOS=ratios, KIND=kind, ADAPTIVE=alpha is not None,
        STEP=max(8192 // block, 1), BLOCK=block, num_warps=8,
    )  # fmt: skip
    return assignments, loss, seen, slope


def _summarise_shapes(
    probabilities: Tensor, indices: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = probabilities.shape[1]
    make = probabilities.new_empty
    return indices.new_empty(n), make(()), make(5 + min(n - 1, 2)), make(n)


def _keep_for_summarise(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.tokens = inputs[0].shape[0]
    ctx.save_for_backward(output[3])


def _summarise_gradients(ctx: Any, _: Any, grad: Tensor | None, *__: Any) -> tuple[Any, ...]:
    (slope,) = ctx.saved_tensors
    of_probabilities = None if grad is None else (grad * slope).expand(ctx.tokens, -1)
    return of_probabilities, None, None, None, None, None


_summarise_operator = define(
    "summarise_load(Tensor probabilities, Tensor indices, int kind, Tensor? alpha, float constant,"
    " SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor)",
    _summarise,
    _summarise_shapes,
    _keep_for_summarise,
    _summarise_gradients,
)
