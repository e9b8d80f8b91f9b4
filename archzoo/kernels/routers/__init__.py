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
        projected, again = _Project.apply(x, weight)
        return projected, again if x.requires_grad else x
    return F.linear(x, weight), x


def _splits(x: Tensor, weight: Tensor) -> bool:
    """By facts: float32 on a GPU that was measured, tokens enough to be worth the launches."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not fused(x):
        return False
    if len(x) < MIN_TOKENS or not 0 < weight.shape[0] <= MAX_COLUMNS or weight.shape[1] > MAX_WIDTH:
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
        ctx.save_for_backward(x, weight, high_t, low_t)
        ctx.columns = columns
        return _product(read, high, low, None, _column_block(columns)), x.view_as(x)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, again: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight, high_t, low_t = ctx.saved_tensors
        if grad is None:
            return again, None
        if differentiated_again():
            by_x, by_weight = plain_gradients(F.linear, (x, weight), (grad,))
            return by_x if by_x is None or again is None else by_x + again, by_weight
        grad, x = grad.contiguous(), x.contiguous()
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = _product(grad, high_t, low_t, again, 64)
        if ctx.needs_input_grad[1]:
            d_weight = grad.t() @ x  # few columns and many rows: no kernel of ours was faster
        return d_x, d_weight


def _product(a: Tensor, high: Tensor, low: Tensor, extra: Tensor | None, block: int) -> Tensor:
    """``a (high + low)^T + extra``, with that many columns a program."""
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
    """The k largest of each row of x (tokens, n) and their indices, largest first.

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
        given, logits = logits, logits.contiguous()
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
        ctx.save_for_backward(given, indices)
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
            sigmoid, renormalise = ctx.options["SIGMOID"], ctx.options["RENORMALISE"]

            def compute(logits: Tensor) -> tuple[Tensor, Tensor]:
                scores, probabilities = _score(logits, sigmoid)
                return _weigh(logits, scores, indices, sigmoid, renormalise), probabilities

            (by_logits,) = plain_gradients(compute, (logits,), (d_weights, d_probabilities))
            return by_logits, None, None, None, None
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
            **ctx.options, **options,
        )  # fmt: skip
        return d_logits, None, None, None, None


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
        z: Tensor = _Attend.apply(projected)
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
        projected = projected.contiguous()
        tokens, experts = projected.shape[0], projected.shape[1] // 3
        z = projected.new_empty(tokens, experts)
        each, options = _attend_options(experts)
        _launch("attend_kernel", (-(-tokens // each),), (projected, z), tokens, **options)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        (projected,) = ctx.saved_tensors
        if differentiated_again():
            return plain_gradients(_attend_plainly, (projected,), (grad,))[0]
        projected = projected.contiguous()
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
        given = probabilities
        probabilities, indices = probabilities.contiguous(), indices.contiguous()
        (tokens, n), k = probabilities.shape, indices.shape[1]
        block, ratios = power_of_2(n), min(n - 1, 2)
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
            programs, tokens, float(tokens * k), capacity, math.log(max(n, 2)), constant,
            N=n, RATIOS=ratios, KIND=kind, ADAPTIVE=alpha is not sums,
            STEP=max(8192 // block, 1), BLOCK=block, num_warps=8,
        )  # fmt: skip
        # For a second derivative, which the loss has where it is not linear in the probabilities.
        curved = kind == LOSSES["squared_mean"]
        ctx.save_for_backward(slope, given if curved else None)
        ctx.tokens, ctx.coefficient, ctx.version = tokens, coefficient, _version(coefficient)
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
