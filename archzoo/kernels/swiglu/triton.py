"""The Triton side of `archzoo.kernels.swiglu`: imported only once a kernel is to run."""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(x, y, width, BLOCK: tl.constexpr):
    """SwiGLU: y = silu(gate) * up, x = [gate, up]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(y + row * width + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(x, dy, d_x, y, width, BLOCK: tl.constexpr, AGAIN: tl.constexpr):
    """With s = sigmoid(gate): d_gate = dy up s (1 + gate (1 - s)) and d_up = dy gate s.

    AGAIN: y = silu(gate) * up is made again beside them.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_up = gradient * gate * sigmoid
    tl.store(d_x + at, d_gate.to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_x + at + width, d_up.to(d_x.dtype.element_ty), mask=inside)
    if AGAIN:
        value = gate * sigmoid * up
        tl.store(y + row * width + column, value.to(y.dtype.element_ty), mask=inside)
