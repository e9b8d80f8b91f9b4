"""The product with packed signs for Hopper, by tensor cores that multiply bytes.

`product_kernel` computes what `triton.one_bit_kernel` does, a test and a sum a weight there. Here
four weights cost one "and", and the rest of the work is done once a program.

Gluon is Triton's lower level, and has no interpreter: the kernel of `triton`, which the ordinary
tests run, is its reference, and tests on a GPU hold both to the plain product.
"""

# Kernels' parameters are Triton's values, which have no Python types; tuples of theirs grow.
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Which has another name from one Triton to the next.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
WORDS: gl.constexpr = gl.constexpr(16)  # of a row of S that a warp holds: 512 inputs
_MMA = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0, $1, $2, $3}, {a, b, c, d}, "
#: Of a tile of 16 rows and both halves of a warp's words: the products of bit k of each byte with
#: that bit's digits, added to the sums. Registers: 0 to 3 the sums; 4 to 7 the words of rows 0 to
#: 7, 8 to 11 of rows 8 to 15; 12 to 15 the digits; 16 to 19 the sums before.
MULTIPLY = gl.constexpr(
    tuple(
        "{ .reg .b32 a, b, c, d; "
        f"and.b32 a, $4, {mask}; and.b32 b, $8, {mask}; "
        f"and.b32 c, $5, {mask}; and.b32 d, $9, {mask}; "
        f"{_MMA} {{$12, $13}}, {{$16, $17, $18, $19}}; "
        f"and.b32 a, $6, {mask}; and.b32 b, $10, {mask}; "
        f"and.b32 c, $7, {mask}; and.b32 d, $11, {mask}; "
        f"{_MMA} {{$14, $15}}, {{$0, $1, $2, $3}}; }}"
        for mask in (f"0x{0x01010101 << k:08x}" for k in range(8))
    )
)
OPERANDS: gl.constexpr = gl.constexpr("=&r,=&r,=&r,=&r" + 16 * ",r")
#: Byte i of words 0 to 3, which are numbers of four inputs, as word i.
TRANSPOSE: gl.constexpr = gl.constexpr(
    "{ .reg .b32 a, b, c, d; "
    "prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $6, $7, 0x5140; "
    "prmt.b32 c, $4, $5, 0x7362; prmt.b32 d, $6, $7, 0x7362; "
    "prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; "
    "prmt.b32 $2, c, d, 0x5410; prmt.b32 $3, c, d, 0x7632; }"
)


@gluon.jit
def _assembly(text: gl.constexpr):
    gl.inline_asm_elementwise(text, "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def product_kernel(
    x, words, before, after, router, y, outputs, before_stride, after_stride,
    WIDTH: gl.constexpr, PARTS: gl.constexpr, TILES: gl.constexpr, SCALES: gl.constexpr,
    HELD: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One bit a weight: y = ((x * before) S^T) * after, of one row of x and 16 TILES rows of S.

    With SCALES, before and after are what the row of x mixes: G S_in and G S_out, of
    G = softmax(x R^T), which every program makes for itself. HELD is a power of two that holds
    them.

    S is read as it lies on disk: bit k of byte c of a row belongs to input 8 c + k. The scaled
    inputs v become integers of 32 bits, over the largest one of a warp's 512, and those four digits
    of 8 bits. What is summed, by tensor cores and exactly, are the digits of the inputs whose bit
    is 1. Bit k is left where it is in its byte, and counts 2^k: so the integers of its inputs are
    those of v / 2^k. Twice the sum is taken from the sum of all inputs.

    A tile of a tensor core is 16 rows of S by 32 of its bytes, times 32 bytes by 8 columns: the
    first four columns are the digits of bit k's inputs, k < 4, the others those of bit k + 4. Both
    bits are multiplied with all eight, into sums of their own, of which half are read.

    With EARLY the kernel before may still run: weights and scales are read first, then x.
    """
    COUNT: gl.constexpr = WIDTH // 32
    STEPS: gl.constexpr = (COUNT + PARTS * WORDS - 1) // (PARTS * WORDS)
    # As the tensor cores want the bytes of S, and the digits and sums beside them.
    held: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 1, 4], [1, PARTS, 1], [2, 1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [1, PARTS], [1, 0])  # of two axes
    # (scales, parts, words, bytes, bits) as they lie in memory: neighbours read neighbours.
    every: gl.constexpr = gl.BlockedLayout(
        [HELD, 1, 1, 1, 4], [1, 1, 4, 4, 2], [1, PARTS, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    plain: gl.constexpr = gl.SliceLayout(0, every)
    # Without the scales: a thread holds four bits of a word, in each of its four bytes.
    spread: gl.constexpr = gl.BlockedLayout(
        [1, 1, 4, 4], [1, 16, 1, 2], [PARTS, 1, 1, 1], [3, 2, 1, 0]
    )
    row = gl.program_id(1).to(gl.int64)
    x += row * WIDTH
    if SCALES == 0:
        before += row * before_stride
        after += row * after_stride

    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, held))
    of_parts: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, held))
    of_words: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, held))
    line = gl.arange(0, 8, layout=of_rows)
    first = gl.program_id(0) * (16 * TILES)
    part = gl.arange(0, PARTS, layout=of_parts)
    place = gl.arange(0, WORDS, layout=of_words)
    word = part[None, :, None] * WORDS + place[None, None, :]

    own_parts: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, plain)))
    own_words: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, plain)))
    own_bytes: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, plain)))
    own_bits: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, plain)))
    own = gl.arange(0, PARTS, layout=own_parts)[:, None, None, None] * WORDS
    own = own + gl.arange(0, WORDS, layout=own_words)[None, :, None, None]
    inner = gl.arange(0, 4, layout=own_bytes)[None, None, :, None] * 8
    inner = inner + gl.arange(0, 8, layout=own_bits)[None, None, None, :]
    of_scales: gl.constexpr = gl.SliceLayout(
        1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, every)))
    )
    scale = gl.arange(0, HELD, layout=of_scales)[:, None, None, None, None]

    spread_parts: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, spread)))
    spread_bits: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, spread)))
    bit = gl.arange(0, 8, layout=spread_bits)
    bits_of_fraction = (127 - bit)[None, None, None, :] << 23  # of 2^-k, a float
    fraction = bits_of_fraction.to(gl.float32, bitcast=True)

    # At rows 8 k + i and 8 k + 4 + i, k < 4: digit i of the inputs of bits k and 4 + k, 4 bytes of
    # them a word. Odd rows lie in the other half of the memory's banks.
    shared: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 2, [1, 0])
    digits = gl.allocate_shared_memory(gl.int32, [32, PARTS * WORDS], shared)

    # Sums of a thread: columns 2 t and 2 t + 1 of a row, and of the row 8 below. The first four
    # columns are for the bits below 4, the others for those above.
    column = place // 4 * 2 + place % 2
    power = gl.exp2(8.0 * (column % 4).to(gl.float32))
    here_low = gl.where(place % 4 < 2, power, 0.0)
    below_low = gl.where(place % 4 >= 2, power, 0.0)
    weights = (
        gl.where(column < 4, here_low, 0.0)[None, None, :],
        gl.where(column < 4, below_low, 0.0)[None, None, :],
        gl.where(column >= 4, here_low, 0.0)[None, None, :],
        gl.where(column >= 4, below_low, 0.0)[None, None, :],
    )

    # What no kernel writes: of the first step, and the signs of as many as registers hold.
    AHEAD: gl.constexpr = STEPS if STEPS * TILES <= 4 else 1
    signs = ()
    for step in gl.static_range(AHEAD):
        here = word + step * (PARTS * WORDS)
        for i in gl.static_range(2 * TILES):
            output = first + 8 * i + line
            at = words + output.to(gl.int64)[:, None, None] * COUNT + here
            inside = (output < outputs)[:, None, None] & (here < COUNT)
            signs += (gl.load(at, mask=inside, other=0),)
    at = own * 32 + inner
    within = (own < COUNT) & (inner < 32)
    if SCALES == 0:
        of_inputs = gl.load(before + at, mask=within, other=0.0)
    else:
        there = (scale < SCALES) & within[None, :, :, :, :]
        of_router = gl.load(router + scale * WIDTH + at[None, :, :, :, :], mask=there, other=0.0)
        of_inputs = gl.load(before + scale * WIDTH + at[None, :, :, :, :], mask=there, other=0.0)
    # (rows, eighths of the tiles): as the sums come, or where a scale is several one a thread.
    ONE: gl.constexpr = 2 * TILES if SCALES == 0 else 1
    last: gl.constexpr = gl.BlockedLayout([1, ONE], [8, 4], [1, PARTS], [1, 0])
    last_line = gl.arange(0, 8, layout=gl.SliceLayout(1, last))
    last_eighth = gl.arange(0, 2 * TILES, layout=gl.SliceLayout(0, last))
    last_output = first + 8 * last_eighth[None, :] + last_line[:, None]
    exists = last_output < outputs
    of_outputs = ()
    for one in gl.static_range(SCALES if SCALES > 0 else 1):
        of_outputs += (gl.load(after + one * after_stride + last_output, mask=exists, other=0.0),)
    if EARLY:
        _assembly("griddepcontrol.wait; // $0")
        _assembly("griddepcontrol.launch_dependents; // $0")
    value = gl.load(x + at, mask=within, other=0.0).to(gl.float32)
    if SCALES > 0:
        products = of_router.to(gl.float32) * value[None, :, :, :, :]
        logits = gl.sum(gl.reshape(products, [HELD, PARTS, 32 * WORDS]), axis=2)
        for step in gl.static_range(1, STEPS):
            there = own + step * (PARTS * WORDS)
            at = there * 32 + inner
            within = (there < COUNT) & (inner < 32)
            later = gl.load(x + at, mask=within, other=0.0).to(gl.float32)
            both = (scale < SCALES) & within[None, :, :, :, :]
            weight = gl.load(router + scale * WIDTH + at[None, :, :, :, :], mask=both, other=0.0)
            products = weight.to(gl.float32) * later[None, :, :, :, :]
            logits += gl.sum(gl.reshape(products, [HELD, PARTS, 32 * WORDS]), axis=2)
        logits = gl.sum(logits, axis=1)
        number_of_scale = gl.arange(0, HELD, layout=logits.type.layout)
        logits = gl.where(number_of_scale < SCALES, logits, float("-inf"))
        gates = gl.exp(logits - gl.max(logits, axis=0))
        gates = gates / gl.sum(gates, axis=0)
        of_gates = gl.convert_layout(gates, of_scales)[:, None, None, None, None]

    totals = ()
    for _ in gl.static_range(2 * TILES):
        totals += (gl.zeros([8, PARTS], gl.float32, gl.SliceLayout(2, held)),)
    for step in gl.static_range(STEPS):
        if step > 0:
            there = own + step * (PARTS * WORDS)
            at = there * 32 + inner
            within = (there < COUNT) & (inner < 32)
            value = gl.load(x + at, mask=within, other=0.0).to(gl.float32)
            if SCALES == 0:
                of_inputs = gl.load(before + at, mask=within, other=0.0)
            else:
                both = (scale < SCALES) & within[None, :, :, :, :]
                of_inputs = gl.load(
                    before + scale * WIDTH + at[None, :, :, :, :], mask=both, other=0.0
                )
        own_signs = ()
        for i in gl.static_range(2 * TILES):
            if step < AHEAD:
                own_signs += (signs[step * 2 * TILES + i],)
            else:
                here = word + step * (PARTS * WORDS)
                output = first + 8 * i + line
                at = words + output.to(gl.int64)[:, None, None] * COUNT + here
                inside = (output < outputs)[:, None, None] & (here < COUNT)
                own_signs += (gl.load(at, mask=inside, other=0),)
        if SCALES == 0:
            value *= of_inputs.to(gl.float32)
        else:
            value *= gl.sum(of_inputs.to(gl.float32) * of_gates, axis=0)
        size = gl.abs(value)
        largest = gl.max(gl.reshape(size, [PARTS, 32 * WORDS]), axis=1)
        whole = gl.sum(gl.reshape(value, [PARTS, 32 * WORDS]), axis=1)
        value = gl.convert_layout(value, spread)
        # An integer is at most 2^30: its digits fit. No unit is so small that 1 / unit overflows.
        unit = gl.maximum(largest, 1e-27) * (1.0 / (1 << 30))
        inverse = gl.convert_layout(1.0 / unit, spread_parts)[:, None, None, None] * fraction
        number = gl.inline_asm_elementwise(
            "cvt.rni.s32.f32 $0, $1;", "=r,r", [value * inverse], gl.int32, is_pure=True, pack=1
        )
        number = (number + 0x00808080) ^ 0x00808080  # its bytes are now digits of -128 to 127
        number = gl.permute(gl.reshape(number, [PARTS, WORDS, 2, 2, 8]), (0, 1, 4, 2, 3))
        even, odd = gl.split(number)
        number_0, number_2 = gl.split(even)
        number_1, number_3 = gl.split(odd)
        of_digits = gl.inline_asm_elementwise(
            TRANSPOSE, "=&r,=&r,=&r,=&r,r,r,r,r", [number_0, number_1, number_2, number_3],
            (gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        if step > 0:
            barrier()  # all have read the digits before
        # (parts, words, 8 bits, 2, 2): digit 2 j + i at [..., j, i]
        stacked = gl.join(gl.join(of_digits[0], of_digits[2]), gl.join(of_digits[1], of_digits[3]))
        stacked = gl.reshape(stacked, [PARTS * WORDS, 2, 2, 2, 4])
        stacked = gl.permute(stacked, (2, 3, 1, 4, 0))  # a bit's upper and lower digit, its half
        digits.store(gl.reshape(stacked, [32, PARTS * WORDS]))
        barrier()
        kept = gl.reshape(digits.load(flat), [2, 2, 8, PARTS, WORDS])
        even, odd = gl.split(gl.permute(kept, (2, 3, 4, 0, 1)))
        of_0, of_2 = gl.split(even)
        of_1, of_3 = gl.split(odd)
        of_bits = of_0, of_1, of_2, of_3
        sums = ()
        for _ in gl.static_range(2 * TILES):
            sums += (gl.zeros([8, PARTS, WORDS], gl.int32, held),)
        for k in gl.static_range(4):
            columns = gl.convert_layout(of_bits[k], held, assert_trivial=True)
            added = ()
            for i in gl.static_range(TILES):
                for half in gl.static_range(2):
                    added += (
                        gl.inline_asm_elementwise(
                            MULTIPLY[k + 4 * half], OPERANDS,
                            [own_signs[2 * i], own_signs[2 * i + 1], columns, sums[2 * i + half]],
                            gl.int32, is_pure=True, pack=4,
                        ),
                    )  # fmt: skip
            sums = added
        of_unit = -2.0 * gl.convert_layout(unit, of_parts)[None, :]
        of_whole = gl.convert_layout(whole, of_parts)[None, :]
        grown = ()
        for i in gl.static_range(TILES):
            low, high = sums[2 * i].to(gl.float32), sums[2 * i + 1].to(gl.float32)
            for side in gl.static_range(2):
                found = gl.sum(low * weights[side] + high * weights[2 + side], axis=2)
                grown += (totals[2 * i + side] + (of_whole + of_unit * found),)
        totals = grown
    if TILES == 1:
        result = gl.sum(gl.join(totals[0], totals[1]), axis=1)  # (8, 2): a tile's rows, by halves
    elif TILES == 2:
        pairs = gl.join(gl.join(totals[0], totals[2]), gl.join(totals[1], totals[3]))
        result = gl.reshape(gl.sum(pairs, axis=1), [8, 4])
    else:
        even = gl.join(gl.join(totals[0], totals[4]), gl.join(totals[2], totals[6]))
        odd = gl.join(gl.join(totals[1], totals[5]), gl.join(totals[3], totals[7]))
        result = gl.reshape(gl.sum(gl.join(even, odd), axis=1), [8, 8])
    if SCALES == 0:
        factor = of_outputs[0].to(gl.float32)
    else:
        factor = gl.zeros([8, 2 * TILES], gl.float32, last)
        for one in gl.static_range(SCALES):
            gate = gl.sum(gl.where(number_of_scale == one, gates, 0.0), axis=0)
            factor += of_outputs[one].to(gl.float32) * gate
    result = gl.convert_layout(result, last) * factor
    at = y + row * outputs + last_output
    gl.store(at, result.to(y.dtype.element_ty), mask=exists)
