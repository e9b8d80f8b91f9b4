"""SwiGLU, ``silu(gate) * up``, by itself and with the product that follows it.

Gate and up lie side by side in the result of one matrix, so their gradients have to as well. What
a compiler makes of that reads everything twice: 285 us on an H200 for 32,768 tokens 2,048 wide,
where the bytes take 140. Here each is read and written once. And `swiglu_product` keeps for its
backward pass what it was given alone: the activations, which its last product needs again, come
out of the kernel that makes the gradients, in the same pass.

The plain forms run wherever kernels do not. Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.derivatives import differentiated_again, plain_gradients
from archzoo.kernels.launching import fused, launch, power_of_2, warps_for
from archzoo.kernels.operators import compiling, define
from archzoo.linear import Linear
from archzoo.numerics import autocast_dtype

_launch = functools.partial(launch, "archzoo.kernels.swiglu.triton")


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of x (rows, 2 * width), gate first: (rows, width)."""
    if fused(x):
        y: Tensor = _swiglu_operator(x) if compiling() else _SwiGLU.apply(x)
        return y
    return swiglu_plainly(x)


def swiglu_plainly(x: Tensor) -> Tensor:
    """The same of torch's own operations, in x's dtype, x (..., 2 * width)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# ---------------------------------------------------------------------------- with a product


def available(x: Tensor, linear: Any) -> bool:
    """Whether `swiglu_product` takes x (..., 2 * width) and this Linear's weight.

    Args:
        x: What SwiGLU is of.
        linear: What follows it.
    """
    # Asked first: on a CPU, where no kernel runs, nothing else is looked at.
    if not fused(x) or type(linear) is not Linear or linear.adapted or linear.bias is not None:
        return False
    hooks = linear._forward_hooks, linear._forward_pre_hooks
    if any((*hooks, linear._backward_hooks, linear._backward_pre_hooks)):
        return False  # they wait for a call
    return type(linear.weight) in (Tensor, torch.nn.Parameter)  # not one rank's part of it


def swiglu_product(x: Tensor, weight: Tensor) -> Tensor:
    """``(silu(gate) * up) W^T`` of x (..., 2 * width), gate first: (..., rows of W).

    It computes as autocast does, in the dtype that this asks for.

    Args:
        x: (..., 2 * width).
        weight: W, (rows, width).
    """
    dtype = autocast_dtype(x.device) or x.dtype
    y: Tensor = _product_operator(x.to(dtype).flatten(0, -2), weight.to(dtype))
    whole: Tensor = y.view(*x.shape[:-1], len(weight))
    return whole


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(_swiglu(x), weight.t())


def _product_plainly(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(swiglu_plainly(x), weight)


def _product_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _product_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    d_x, y = _backward(x, torch.mm(grad, weight), again=True)
    return d_x, torch.mm(grad.t(), y)


def _product_backward_shapes(x: Tensor, weight: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_for_product(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    if differentiated_again():
        return plain_gradients(_product_plainly, (x, weight), (grad,))
    if not ctx.needs_input_grad[1]:  # the weight is frozen
        return _swiglu_backward_operator(x, torch.mm(grad, weight)), None
    d_x, d_weight = _product_backward_operator(x, weight, grad)
    return d_x, d_weight


_product_operator = define(
    "swiglu_product(Tensor x, Tensor weight) -> Tensor",
    _product,
    _product_shape,
    _keep_for_product,
    _product_gradients,
)
_product_backward_operator = define(
    "swiglu_product_backward(Tensor x, Tensor weight, Tensor grad) -> (Tensor, Tensor)",
    _product_backward,
    _product_backward_shapes,
)


# ---------------------------------------------------------------------------- by itself


class _SwiGLU(torch.autograd.Function):
    """In one kernel each way, the product in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        (x,) = ctx.saved_tensors
        if differentiated_again():
            return plain_gradients(swiglu_plainly, (x,), (grad,))[0]
        return _swiglu_backward(x, grad)


def _swiglu(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = _swiglu_shape(x)
    rows, width = y.shape
    block = min(power_of_2(width), 1024)
    _launch(
        "swiglu_kernel", (rows, -(-width // block)), (x, y), width,
        BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return y


def _swiglu_shape(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


def _swiglu_backward(x: Tensor, grad: Tensor) -> Tensor:
    return _backward(x, grad, again=False)[0]


def _backward(x: Tensor, grad: Tensor, *, again: bool) -> tuple[Tensor, Tensor]:
    """The gradient of x; and SwiGLU of x, if it is to be made again."""
    x = x.contiguous()
    d_x = torch.empty_like(x)
    y = _swiglu_shape(x) if again else d_x
    rows, width = x.shape[0], x.shape[1] // 2
    block = min(power_of_2(width), 1024)
    _launch(
        "swiglu_backward_kernel", (rows, -(-width // block)), (x, grad.contiguous(), d_x, y),
        width, BLOCK=block, AGAIN=again, num_warps=warps_for(block),
    )  # fmt: skip
    return d_x, y


def _swiglu_backward_shape(x: Tensor, _: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep_for_swiglu(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradients(ctx: Any, grad: Tensor) -> Tensor:
    found: Tensor = _swiglu_backward_operator(*ctx.saved_tensors, grad)
    return found


_swiglu_operator = define(
    "swiglu(Tensor x) -> Tensor", _swiglu, _swiglu_shape, _keep_for_swiglu, _swiglu_gradients
)
_swiglu_backward_operator = define(
    "swiglu_backward(Tensor x, Tensor grad) -> Tensor", _swiglu_backward, _swiglu_backward_shape
)
