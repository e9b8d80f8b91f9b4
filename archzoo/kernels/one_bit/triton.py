"""The Triton side of `archzoo.kernels.one_bit`: imported only once a kernel is to run."""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def one_bit_kernel(
    x, words, before, after, y, outputs, count, before_stride, after_stride,
    OUTPUTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One bit a weight: y = ((x * before) S^T) * after, of one row of x and OUTPUTS rows of S.

    Bit k of word j of a row of S is the sign of input k * count + j. A sign flips the highest bit
    of a float32, so a weight costs a shift, an exclusive or and a sum, and no product.
    """
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1).to(tl.int64)
    there = output < outputs
    x += row * count * 32
    before += row * before_stride
    total = tl.zeros([OUTPUTS, WORDS], dtype=tl.float32)
    for start in range(0, count, WORDS):
        word = start + tl.arange(0, WORDS)
        inside = word < count
        bits = tl.load(
            words + output.to(tl.int64)[:, None] * count + word[None, :],
            mask=there[:, None] & inside[None, :],
            other=0,
        )
        for k in tl.static_range(32):
            scale = tl.load(before + k * count + word, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x + k * count + word, mask=inside, other=0.0).to(tl.float32) * scale
            flip = (bits << (31 - k)) & -2147483648
            flipped = value.to(tl.int32, bitcast=True)[None, :] ^ flip
            total += flipped.to(tl.float32, bitcast=True)
    scale = tl.load(after + row * after_stride + output, mask=there, other=0.0).to(tl.float32)
    result = tl.sum(total, axis=1) * scale
    tl.store(y + row * outputs + output, result.to(y.dtype.element_ty), mask=there)
