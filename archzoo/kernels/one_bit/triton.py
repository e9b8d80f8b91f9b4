"""The Triton side of `archzoo.kernels.one_bit`: imported only once a kernel is to run."""

# Kernels' parameters are Triton's values, which have no Python types; tuples of theirs grow.
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

#: Whether this Triton can say where a kernel waits for the one before it.
CAN_BEGIN_EARLY = hasattr(cuda, "gdc_wait") and hasattr(cuda, "gdc_launch_dependents")
#: Bit k of each of four bytes, as four bytes: a compiler takes the bytes apart to shift them.
TAKE_BIT = tl.constexpr(
    tuple(f"{{ .reg .b32 t; shr.b32 t, $1, {k}; and.b32 $0, t, 0x01010101; }}" for k in range(8))
)


@triton.jit
def _bits(signs, k: tl.constexpr, ASSEMBLY: tl.constexpr):
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            TAKE_BIT[k], "=r,r", [signs], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (signs >> k) & 1


@triton.jit
def _eight(x):
    """Eight of (parts, 4, chunk), by the last axis of (parts, 4, chunk, 8)."""
    x = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], 2, 2, 2))
    even, odd = tl.split(x)
    even_0, even_1 = tl.split(even)
    odd_0, odd_1 = tl.split(odd)
    x0, x4 = tl.split(even_0)
    x2, x6 = tl.split(even_1)
    x1, x5 = tl.split(odd_0)
    x3, x7 = tl.split(odd_1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def one_bit_kernel(
    x, signs, before, after, router, y, raw, arrivals, outputs, before_stride, after_stride,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    SCALES: tl.constexpr, NORM: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """One bit a weight: y = ((x * before) S^T) * after, of one row of x and ROWS rows of S.

    With SCALES, before and after are those that the row of x mixes: G S_in and G S_out, of
    G = softmax(x R^T), which every program makes for itself. With NORM the last program to end
    norms the whole row, which lies in `raw` in float32; it sets the counter back to 0.

    S is read as it lies on disk: bit k of byte c of a row belongs to input 8 c + k. The scaled
    inputs v become integers of 32 bits over the largest one of a part of the row, and those four
    digits of 8 bits. What is summed, by tensor cores and exactly, are the digits of the inputs
    whose bit is 1: the sum over k of (bits k of S) times (digits of the inputs 8 c + k), each a
    product of int8 matrices. Twice that is taken from the sum of all inputs. So four weights cost
    a shift and an "and". PARTS parts of a row are summed beside each other, a warp each.

    With EARLY the kernel before may still run: weights and scales are read first, then x.
    """
    BYTES: tl.constexpr = WIDTH // 8
    STEPS: tl.constexpr = (BYTES + PARTS * CHUNK - 1) // (PARTS * CHUNK)
    DIGITS: tl.constexpr = 4
    row = tl.program_id(1).to(tl.int64)
    x += row * WIDTH
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = output < outputs
    rows = signs + output.to(tl.int64)[None, :, None] * BYTES
    byte = tl.arange(0, PARTS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    eight = tl.arange(0, 8)[None, None, None, :]
    shift = 8 * tl.arange(0, DIGITS)[None, :, None, None]
    power = tl.exp2(8.0 * tl.arange(0, DIGITS).to(tl.float32))[None, None, :]
    if SCALES == 0:
        before += row * before_stride
        scale = tl.load(after + row * after_stride + output, mask=there, other=0.0).to(tl.float32)
    else:
        scales = ()
        for one in tl.static_range(SCALES):
            scales += (tl.load(after + one * after_stride + output, mask=there, other=0.0),)
    if STEPS == 1:  # all that does not come from the kernel before
        inside = (byte < BYTES)[:, None, :, None]
        at = byte[:, None, :, None] * 8 + eight
        held = tl.load(
            rows + byte[:, None, :], mask=there[None, :, None] & (byte < BYTES)[:, None, :], other=0
        )
        if SCALES == 0:
            factor = tl.load(before + at, mask=inside, other=0.0)
        else:
            of_router = ()
            of_inputs = ()
            for one in tl.static_range(SCALES):
                of_router += (tl.load(router + one * WIDTH + at, mask=inside, other=0.0),)
                of_inputs += (tl.load(before + one * WIDTH + at, mask=inside, other=0.0),)
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    if SCALES > 0:
        logits = ()
        for one in tl.static_range(SCALES):
            products = tl.zeros([PARTS, 1, CHUNK, 8], dtype=tl.float32)
            for step in range(STEPS):
                here = byte + step * (PARTS * CHUNK)
                inside = (here < BYTES)[:, None, :, None]
                at = here[:, None, :, None] * 8 + eight
                value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
                if STEPS == 1:
                    weight = of_router[one]
                else:
                    weight = tl.load(router + one * WIDTH + at, mask=inside, other=0.0)
                products += value * weight.to(tl.float32)
            logits += (tl.sum(tl.reshape(products, [PARTS * CHUNK * 8]), axis=0),)
        largest_logit = logits[0]
        for one in tl.static_range(1, SCALES):
            largest_logit = tl.maximum(largest_logit, logits[one])
        whole_gate = 0.0
        for one in tl.static_range(SCALES):
            whole_gate += tl.exp(logits[one] - largest_logit)
        gates = ()
        scale = tl.zeros([ROWS], dtype=tl.float32)
        for one in tl.static_range(SCALES):
            gates += (tl.exp(logits[one] - largest_logit) / whole_gate,)
            scale += scales[one].to(tl.float32) * gates[one]
    total = tl.zeros([PARTS, ROWS], dtype=tl.float32)
    for step in range(STEPS):
        here = byte + step * (PARTS * CHUNK)
        inside = (here < BYTES)[:, None, :, None]
        at = here[:, None, :, None] * 8 + eight
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if STEPS > 1:
            held = tl.load(
                rows + here[:, None, :], mask=there[None, :, None] & (here < BYTES)[:, None, :],
                other=0,
            )  # fmt: skip
        if SCALES == 0:
            if STEPS > 1:
                factor = tl.load(before + at, mask=inside, other=0.0)
            value *= factor.to(tl.float32)
        else:
            mixed = tl.zeros([PARTS, 1, CHUNK, 8], dtype=tl.float32)
            for one in tl.static_range(SCALES):
                if STEPS == 1:
                    weight = of_inputs[one]
                else:
                    weight = tl.load(before + one * WIDTH + at, mask=inside, other=0.0)
                mixed += weight.to(tl.float32) * gates[one]
            value *= mixed
        whole = tl.sum(tl.sum(tl.sum(value, axis=3), axis=2), axis=1)
        largest = tl.max(tl.max(tl.max(tl.abs(value), axis=3), axis=2), axis=1)
        # An integer is at most 2^30: its digits fit. No unit is so small that 1 / unit overflows.
        unit = tl.maximum(largest, 1e-27) * (1.0 / (1 << 30))
        number = tl.floor(value * (1.0 / unit)[:, None, None, None] + 0.5).to(tl.int32)
        number = (number + 0x00808080) ^ 0x00808080  # its bytes are now digits of -128 to 127
        digits = _eight((number >> shift).to(tl.int8))
        columns = ()
        for k in tl.static_range(8):
            columns += (tl.permute(digits[k], (0, 2, 1)),)
        tl.debug_barrier()  # so that all of them go to shared memory at once
        sums = tl.zeros([PARTS, ROWS, DIGITS], dtype=tl.int32)
        for k in tl.static_range(8):
            sums = tl.dot(_bits(held, k, ASSEMBLY), columns[k], sums, out_dtype=tl.int32)
        found = tl.sum(sums.to(tl.float32) * power, axis=2) * unit[:, None]
        total += whole[:, None] - 2.0 * found
    result = tl.sum(total, axis=0) * scale
    y += row * outputs
    if NORM:
        raw += row * outputs
        tl.store(raw + output, result, mask=there)
        tl.debug_barrier()  # all threads of this program have written
        if tl.atomic_add(arrivals + row, 1) == tl.num_programs(0) - 1:
            every = tl.arange(0, HELD)
            within = every < outputs
            # Not from the first-level cache, which knows nothing of other programs.
            full = tl.load(raw + every, mask=within, other=0.0, cache_modifier=".cg")
            mean = tl.sum(full, axis=0) / outputs
            away = tl.where(within, full - mean, 0.0)
            root = tl.rsqrt(tl.sum(away * away, axis=0) / outputs + 1e-5)
            tl.store(y + every, (away * root).to(y.dtype.element_ty), mask=within)
            tl.store(arrivals + row, 0)
    else:
        tl.store(y + output, result.to(y.dtype.element_ty), mask=there)
