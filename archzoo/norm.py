"""RMS norm, written out where torch has no fused one.

On a CPU torch composes the norm of elementary operations, and its backward pass is three times as
long as it needs to be: at 768 tokens of 128 channels forward + backward took 911 us composed and
336 us as here, and a small model holds nine norms. In decoding fewer operations made a step of
the tiny RetNet 12 % shorter. Everywhere else torch's own is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from archzoo.block import constant


def _inverse_root_mean_square(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last axis, which is kept."""
    norm = torch.linalg.vector_norm(x, 2, -1, True)
    added = constant((eps,), x.device, x.dtype)
    return torch.addcmul(added, norm, norm, value=1 / x.shape[-1]).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """``y = w * h, h = x * r, r = 1 / sqrt(mean(x^2) + eps)``, over the last axis.

    Backward, with gh = g * w: ``dx = r * (gh - h * mean(gh * h))``, ``dw = sum(g * h)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        scale = _inverse_root_mean_square(x, eps)
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed if weight is None else normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed, scale, weight = ctx.saved_tensors
        grad_weight = None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                grad_weight = (grad * normed).flatten(0, -2).sum(0)
            grad = grad * weight
        along = (grad * normed).mean(dim=-1, keepdim=True)
        return torch.addcmul(grad, normed, along, value=-1).mul_(scale), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``w * x / sqrt(mean(x^2) + eps)`` over the last axis.

    Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4.

    Args:
        x: (..., channels).
        weight: (channels,), or None for all ones.
        eps: Added to the mean square.
    """
    composed = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if not composed or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    normed = _inverse_root_mean_square(x, eps).mul(x)
    return normed if weight is None else normed * weight


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, through `rms_norm`.

    Args:
        dim: Channels.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., dim) to y of the same shape."""
        return rms_norm(x, self.weight, self.eps or 0.0)
