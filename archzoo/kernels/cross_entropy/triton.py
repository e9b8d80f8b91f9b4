"""The Triton side of `archzoo.kernels.cross_entropy`: imported only once the kernel is to run."""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

UNLABELLED = tl.constexpr(-100)
LEAST = tl.constexpr(-1e30)  # of which -inf can be subtracted, as it cannot of -inf
LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2 e), of which a GPU has the latter


@triton.jit
def cross_entropy_kernel(
    logits, labels, losses, predicted, vocabulary, columns,
    GRADIENT: tl.constexpr, PREDICT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its loss and its most likely token; its logits become their gradient in place.

    A row holds `columns` numbers, the first `vocabulary` of which are logits. The others become 0.
    A label outside the vocabulary makes the loss NaN, which a reader of the loss notices.

    Instructions take as long here as memory does, so none is spent on a logit that the row, or its
    label alone, can be asked once.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr = logits + row * columns
    label = tl.load(labels + row)
    largest = tl.full((), LEAST, tl.float32)
    total = tl.zeros((), tl.float32)
    best = tl.zeros((), tl.int32)
    for begin in range(0, vocabulary, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + index, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
        here = tl.max(z)
        if PREDICT:
            best = tl.where(here > largest, begin + tl.argmax(z, 0).to(tl.int32), best)
        reached = tl.maximum(largest, here)
        total *= tl.exp2((largest - reached) * LOG2_E)
        total += tl.sum(tl.exp2(z * LOG2_E - reached * LOG2_E))
        largest = reached
    normaliser = largest + tl.log(total)
    counted = label != UNLABELLED
    known = (label >= 0) & (label < vocabulary)
    of_label = tl.load(z_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(counted, normaliser - of_label, 0.0))
    if PREDICT:
        # Beside NaN the last of a block's places may win, which lies behind the vocabulary.
        tl.store(predicted + row, tl.minimum(best, vocabulary - 1).to(tl.int64))
    if GRADIENT:
        dtype = logits.dtype.element_ty
        tl.debug_barrier()  # the label's logit has been read
        if counted:
            for begin in range(0, columns, BLOCK):
                index = begin + tl.arange(0, BLOCK)
                z = tl.load(z_ptr + index, mask=index < vocabulary, other=float("-inf"))
                likely = tl.exp2(z.to(tl.float32) * LOG2_E - normaliser * LOG2_E)
                tl.store(z_ptr + index, likely.to(dtype), mask=index < columns)
            tl.debug_barrier()  # what stands there is not the last word
            of_label = tl.exp2((of_label - normaliser) * LOG2_E) - 1.0
            tl.store(z_ptr + label, of_label.to(dtype), mask=known)
        else:
            for begin in range(0, columns, BLOCK):
                index = begin + tl.arange(0, BLOCK)
                zero = tl.zeros((BLOCK,), dtype)
                tl.store(z_ptr + index, zero, mask=index < columns)


@triton.jit
def scale_kernel(x, factor, y, numbers, BLOCK: tl.constexpr):
    """``y = factor x`` in y's dtype; the factor is one number in memory."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numbers
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(y + index, value.to(y.dtype.element_ty), mask=inside)
