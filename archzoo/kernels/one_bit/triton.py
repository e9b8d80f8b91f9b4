"""The Triton side of `archzoo.kernels.one_bit`: imported only once a kernel is to run."""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def one_bit_kernel(
    x, words, before, after, y, outputs, before_stride, after_stride,
    COUNT: tl.constexpr, WORDS: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """One bit a weight: y = ((x * before) S^T) * after, of one row of x and 4 or 8 rows of S.

    Bit k of word j of a row of S is the sign of input k * COUNT + j, j < COUNT; the words of 4 rows
    lie side by side, so that a thread reads them at once and all have its inputs in common. What a
    thread sums are the inputs whose bit is 1: twice that is taken from the sum of all its inputs.
    So a weight costs a test of a bit and a product and sum under that condition, and no shift.
    """
    tile = tl.program_id(0).to(tl.int64) * (2 if TWO else 1)
    row = tl.program_id(1).to(tl.int64)
    beside = tl.arange(0, 4)
    x += row * COUNT * 32
    before += row * before_stride
    whole = tl.zeros([WORDS, 1], dtype=tl.float32)
    first = tl.zeros([WORDS, 4], dtype=tl.float32)
    second = tl.zeros([WORDS, 4], dtype=tl.float32)
    for start in range(0, COUNT, WORDS):
        word = start + tl.arange(0, WORDS)[:, None]
        inside = word < COUNT
        at = words + (tile * COUNT + word) * 4 + beside[None, :]
        one = tl.load(at, mask=inside, other=0)
        if TWO:
            two = tl.load(at + COUNT * 4, mask=inside, other=0)
        for k in tl.static_range(32):
            bit = 1 << k if k < 31 else -2147483648
            scale = tl.load(before + k * COUNT + word, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x + k * COUNT + word, mask=inside, other=0.0).to(tl.float32) * scale
            whole += value
            first = tl.where((one & bit) != 0, first + value, first)
            if TWO:
                second = tl.where((two & bit) != 0, second + value, second)
    output = tile * 4 + beside
    after += row * after_stride
    y += row * outputs
    there = output < outputs
    scale = tl.load(after + output, mask=there, other=0.0).to(tl.float32)
    result = tl.sum(whole - 2.0 * first, axis=0) * scale
    tl.store(y + output, result.to(y.dtype.element_ty), mask=there)
    if TWO:
        output += 4
        there = output < outputs
        scale = tl.load(after + output, mask=there, other=0.0).to(tl.float32)
        result = tl.sum(whole - 2.0 * second, axis=0) * scale
        tl.store(y + output, result.to(y.dtype.element_ty), mask=there)


@triton.jit
def mixed_scales_kernel(
    x, router, inputs, outputs, before, after, width, height, SCALES: tl.constexpr,
    HELD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BinaryMoS's scales of one row: G = softmax(x R^T); before = G S_in and after = G S_out.

    Every program makes G anew, of x and R that all read, and BLOCK of the scales: first of those
    before, then of those after. HELD is a power of two that holds SCALES.
    """
    row = tl.program_id(1).to(tl.int64)
    one = tl.arange(0, HELD)
    there = (one < SCALES)[:, None]
    logits = tl.zeros([HELD], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(
            router + one[:, None] * width + at[None, :], mask=there & inside[None, :], other=0.0
        )
        logits += tl.sum(weight.to(tl.float32) * value[None, :], axis=1)
    logits = tl.where(one < SCALES, logits, float("-inf"))
    gates = tl.exp(logits - tl.max(logits, axis=0))
    gates = gates / tl.sum(gates, axis=0)
    block = tl.program_id(0)
    of_inputs = tl.cdiv(width, BLOCK)
    if block < of_inputs:
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < width
        scale = tl.load(
            inputs + one[:, None] * width + at[None, :], mask=there & inside[None, :], other=0.0
        )
        mixed = tl.sum(scale.to(tl.float32) * gates[:, None], axis=0)
        tl.store(before + row * width + at, mixed, mask=inside)
    else:
        at = (block - of_inputs) * BLOCK + tl.arange(0, BLOCK)
        inside = at < height
        scale = tl.load(
            outputs + one[:, None] * height + at[None, :], mask=there & inside[None, :], other=0.0
        )
        mixed = tl.sum(scale.to(tl.float32) * gates[:, None], axis=0)
        tl.store(after + row * height + at, mixed, mask=inside)


@triton.jit
def norm_kernel(y, z, width, eps, HELD: tl.constexpr, EARLY: tl.constexpr):
    """The layer norm of one row, without weights, of float32.

    With EARLY the kernel before may still run, and lets this one begin once its own wait is over.
    The next one may begin at once: this one ends after both.
    """
    if EARLY:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * width
    place = tl.arange(0, HELD)
    inside = place < width
    value = tl.load(y + row + place, mask=inside, other=0.0)
    mean = tl.sum(value, axis=0) / width
    away = tl.where(inside, value - mean, 0.0)
    root = tl.rsqrt(tl.sum(away * away, axis=0) / width + eps)
    tl.store(z + row + place, (away * root).to(z.dtype.element_ty), mask=inside)
