"""Head and cross-entropy in one: never all logits at once, and none of them in float32.

The plain form is `archzoo.training.losses`, which holds some rows of logits in float32 and computes
them again in the backward pass. Here the gradient of some rows' logits takes the place of these
logits at once, and their two products are made then, so nothing is computed again. Three products
of the head are left, and each logit is written and read twice, in the dtype of the products.

Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.derivatives import differentiated_again, followed, plain_gradients
from archzoo.kernels.launching import launch, power_of_2, run_beside
from archzoo.numerics import product_dtype

# Logits at once. Each slice adds to the gradient of the whole head, which is a matter of bandwidth:
# with 4,096 tokens at once, a vocabulary of 32,000 took 9.05 ms of a step on an H200; with 8,192
# it takes 8.78.
SLICE = 2**28
LEAST_ROWS = 1024  # at once: products of few are slow
MULTIPLE = 64  # rows of the head: products of other sizes take several times as long
MAX_BLOCK = 16384  # logits that one program reads at once: 293 us for 8,192 rows, by 8,192 312


def available(x: Tensor, head: Any) -> bool:
    """Whether the kernel takes this head's logits of x (tokens, dim).

    Not float16's, whose small gradients only a scaled loss keeps.
    """
    if followed() or not len(x) or not run_beside(x):
        return False
    if not hasattr(head, "weight_of_call") or head.adapted:  # no changes are made part of it
        return False
    if head.weight_of_call(x) is None:
        return False
    return product_dtype(x) in (torch.bfloat16, torch.float32)


def total_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum over tokens of ``-log softmax(W x)[label]``, in nats, float32.

    Args:
        x: (tokens, dim).
        weight: W, (vocab_size, dim).
        labels: (tokens,) int64, -100 at unlabelled positions; another number outside the
            vocabulary makes the sum NaN.
    """
    total: Tensor = _TotalLoss.apply(x, weight, labels, product_dtype(x))
    return total


def score(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss, float32, and the most likely token, int64: both (tokens,); no gradient.

    Args:
        x: (tokens, dim).
        weight: W, (vocab_size, dim).
        labels: (tokens,) int64, -100 at unlabelled positions.
    """
    dtype, labels = product_dtype(x), labels.contiguous()
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        padded = _padded(weight, dtype)
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        predicted = torch.empty(len(x), dtype=torch.int64, device=x.device)
        for rows, logits in _slices(x, padded):
            torch.mm(x[rows].to(dtype), padded.t(), out=logits)
            _cross_entropy(logits, labels[rows], losses[rows], predicted[rows], len(weight))
    return losses, predicted


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head's weight in the dtype of the products, with rows of zeros after its own."""
    vocab_size, dim = weight.shape
    rows = -(-vocab_size // MULTIPLE) * MULTIPLE
    if rows == vocab_size:
        return weight.to(dtype)
    padded = weight.new_empty((rows, dim), dtype=dtype)
    padded[:vocab_size] = weight
    padded[vocab_size:] = 0
    return padded


def _slices(x: Tensor, padded: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which rows' logits are made at once, and the memory for them, the same for all slices."""
    tokens, columns = len(x), len(padded)
    most = max(power_of_2(SLICE // columns + 1) // 2, LEAST_ROWS)
    memory = padded.new_empty((min(most, tokens), columns))
    for begin in range(0, tokens, most):
        yield slice(begin, begin + most), memory[: tokens - begin]


def _cross_entropy(
    logits: Tensor, labels: Tensor, losses: Tensor, predicted: Tensor | None, vocab_size: int
) -> None:
    """Write each row's loss, and its most likely token or, in the logits' place, their gradient."""
    block = min(power_of_2(vocab_size), MAX_BLOCK)
    launch(
        "archzoo.kernels.cross_entropy.triton", "cross_entropy_kernel", (len(logits),),
        (logits, labels, losses, labels if predicted is None else predicted),
        vocab_size, logits.shape[1],
        GRADIENT=predicted is None, PREDICT=predicted is not None,
        BLOCK=block, num_warps=min(max(block // 256, 1), 8),
    )  # fmt: skip


def _plain(x: Tensor, weight: Tensor, *, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The same of operations that have all derivatives."""
    logits = F.linear(x.to(dtype), weight.to(dtype)).float()
    return F.cross_entropy(logits, labels, reduction="sum")


class _TotalLoss(torch.autograd.Function):
    """Both gradients are made in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        of_x, of_weight = ctx.needs_input_grad[:2]
        labels = labels.contiguous()
        with torch.autocast(x.device.type, enabled=False):
            padded = _padded(weight, dtype)
            losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
            d_x = torch.empty(x.shape, dtype=dtype, device=x.device) if of_x else None
            d_weight = None
            for rows, logits in _slices(x, padded):
                some = x[rows].to(dtype)
                torch.mm(some, padded.t(), out=logits)
                _cross_entropy(logits, labels[rows], losses[rows], None, len(weight))
                if d_x is not None:
                    torch.mm(logits, padded, out=d_x[rows])
                if of_weight:
                    d_weight = _accumulated(d_weight, logits, some)
        ctx.save_for_backward(x, weight, labels, d_x, d_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels, d_x, d_weight = ctx.saved_tensors
        if differentiated_again():
            compute = functools.partial(_plain, labels=labels, dtype=ctx.dtype)
            return *plain_gradients(compute, (x, weight), (grad,)), None, None
        if d_x is not None:
            d_x = _scaled(d_x, grad, x.dtype)
        if d_weight is not None:
            d_weight = _scaled(d_weight[: len(weight)], grad, weight.dtype)
        return d_x, d_weight, None, None


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor x`` in another dtype: torch needs a pass for each, and half as many bytes a second.

    Args:
        x: Contiguous.
        factor: One number, float32.
        dtype: Of the result.
    """
    y = torch.empty_like(x, dtype=dtype)
    block = 2048
    launch(
        "archzoo.kernels.cross_entropy.triton", "scale_kernel", (-(-x.numel() // block),),
        (x, factor, y), x.numel(), BLOCK=block, num_warps=8,
    )  # fmt: skip
    return y


def _accumulated(total: Tensor | None, gradient: Tensor, x: Tensor) -> Tensor:
    """``total + gradient^T x`` in float32, whatever the dtype of the two."""
    if x.dtype == torch.float32:
        product = gradient.t() @ x
        return product if total is None else total.add_(product)
    if not x.is_cuda:  # which has no product of this kind
        product = gradient.t().float() @ x.float()
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(gradient.t(), x, out_dtype=torch.float32)
    return torch.addmm(total, gradient.t(), x, out_dtype=torch.float32, out=total)
