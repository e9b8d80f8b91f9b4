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
from archzoo.numerics import product_dtype

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


def swiglu_product(x: Tensor, weight: Tensor) -> Tensor:
    """``(silu(gate) * up) W^T`` of x (..., 2 * width), gate first: (..., rows of W).

    It computes as autocast does, in the dtype that this asks for.

    Args:
        x: (..., 2 * width).
        weight: W, (rows, width).
    """
    dtype = product_dtype(x)
    y: Tensor = _product_operator(x.to(dtype).flatten(0, -2), weight.to(dtype))
    whole: Tensor = y.view(*x.shape[:-1], len(weight))
    return whole


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(_swiglu(x), weight.t())


def _product_plainly(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(swiglu_plainly(x), weight)


def _product_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _again(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(x, grad, again=True)


def _again_shapes(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _swiglu_shape(x)


def _keep_for_product(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    if differentiated_again():
        return plain_gradients(_product_plainly, (x, weight), (grad,))
    inner = torch.mm(grad, weight)
    if not ctx.needs_input_grad[1]:  # the weight is frozen
        return _swiglu_backward_operator(x, inner), None
    d_x, y = _again_operator(x, inner)
    # In sight of the compiler, which lets a gradient leave its product in float32.
    return d_x, torch.mm(grad.t(), y)


_product_operator = define(
    "swiglu_product(Tensor x, Tensor weight) -> Tensor",
    _product,
    _product_shape,
    _keep_for_product,
    _product_gradients,
)
_again_operator = define(
    "swiglu_backward_again(Tensor x, Tensor grad) -> (Tensor, Tensor)", _again, _again_shapes
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
