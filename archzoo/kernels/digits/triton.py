"""The Triton side of `archzoo.kernels.digits`: imported only once the kernel is to run."""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def mix(bits):
    """SplitMix64's finaliser, on uint64, as in both files called `counter_random`."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def larger(a, b):
    """For a running maximum."""
    return tl.maximum(a, b)


# A key of 1 would be a constant of Python's, without a type.
@triton.jit(do_not_specialize=["key"])
def rows_kernel(
    tokens, kinds, valid, starts, examples, rows, time,
    tokens_batch, tokens_time, valid_batch, valid_time, starts_batch, starts_time,
    examples_batch, examples_time, key, bound, last,
    COUPLED: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the batch: the tokens so far less those up to the last that is not a digit."""
    row = tl.program_id(0).to(tl.int64)
    before = tl.zeros((), tl.int32)  # tokens, padding not counted
    broken = tl.zeros((), tl.int32)  # of them, up to the last that ended a run
    for begin in range(0, time, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        inside = position < time
        token = tl.load(tokens + row * tokens_batch + position * tokens_time, mask=inside, other=0)
        kind = tl.load(kinds + token, mask=inside, other=0)
        real = tl.load(valid + row * valid_batch + position * valid_time, mask=inside, other=0)
        start = tl.load(starts + row * starts_batch + position * starts_time, mask=inside, other=0)
        real = real.to(tl.int32)
        seen = before + tl.cumsum(real)
        ended = tl.where(kind == 2, tl.where(start != 0, seen - 1, 0), seen) * real
        ended = tl.maximum(tl.associative_scan(ended, 0, larger), broken)
        found = (seen - ended).to(tl.int64)
        if COUPLED:
            found += 1
        if SHIFTED:
            number = tl.load(
                examples + row * examples_batch + position * examples_time, mask=inside, other=0
            )
            bits = mix(number.to(tl.uint64) * GOLDEN + key.to(tl.uint64))
            bits = mix(bits + GOLDEN)
            found += (((bits >> 33) * bound) >> 31).to(tl.int64)
        found = tl.where((kind > 0) & (real != 0), tl.minimum(found, last), 0)
        tl.store(rows + row * time + position, found, mask=inside)
        before += tl.sum(real)
        broken = tl.max(ended)
