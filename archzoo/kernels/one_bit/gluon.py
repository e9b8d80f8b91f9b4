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
    x, words, before, after, y, outputs, before_stride, after_stride,
    WIDTH: gl.constexpr, PARTS: gl.constexpr, TILES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One bit a weight: y = ((x * before) S^T) * after, of one row of x and 16 TILES rows of S.

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
    # A thread holds four bits of a word, in each of its four bytes.
    spread: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 16, 2], [PARTS, 1, 1], [2, 1, 0])
    row = gl.program_id(1).to(gl.int64)
    x += row * WIDTH
    before += row * before_stride

    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, held))
    of_parts: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, held))
    of_words: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, held))
    line = gl.arange(0, 8, layout=of_rows)
    first = gl.program_id(0) * (16 * TILES)
    part = gl.arange(0, PARTS, layout=of_parts)
    place = gl.arange(0, WORDS, layout=of_words)
    word = part[None, :, None] * WORDS + place[None, None, :]

    own_parts: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, spread))
    own_words: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, spread))
    own_bits: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, spread))
    own_part = gl.arange(0, PARTS, layout=own_parts)
    own_place = gl.arange(0, WORDS, layout=own_words)
    bit = gl.arange(0, 8, layout=own_bits)
    own_word = own_part[:, None, None] * WORDS + own_place[None, :, None]
    bits_of_fraction = (127 - bit)[None, None, :] << 23  # of 2^-k, a float
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

    totals = ()
    of_outputs = ()
    after += row * after_stride
    for i in gl.static_range(2 * TILES):
        totals += (gl.zeros([8, PARTS], gl.float32, gl.SliceLayout(2, held)),)
        output = first + 8 * i + line
        of_outputs += (gl.load(after + output, mask=output < outputs, other=0.0).to(gl.float32),)
    for step in gl.static_range(STEPS):
        here = word + step * (PARTS * WORDS)
        signs = ()
        for i in gl.static_range(2 * TILES):
            output = first + 8 * i + line
            at = words + output.to(gl.int64)[:, None, None] * COUNT + here
            inside = (output < outputs)[:, None, None] & (here < COUNT)
            signs += (gl.load(at, mask=inside, other=0),)
        own = own_word + step * (PARTS * WORDS)
        within = (own < COUNT) & (bit < 8)[None, None, :]
        at = own * 32 + bit[None, None, :]
        scales = ()
        for c in gl.static_range(4):
            scales += (gl.load(before + at + 8 * c, mask=within, other=0.0).to(gl.float32),)
        if EARLY and step == 0:
            _assembly("griddepcontrol.wait; // $0")
            _assembly("griddepcontrol.launch_dependents; // $0")
        values = ()
        for c in gl.static_range(4):
            value = gl.load(x + at + 8 * c, mask=within, other=0.0).to(gl.float32)
            values += (value * scales[c],)
        largest = gl.maximum(
            gl.maximum(gl.abs(values[0]), gl.abs(values[1])),
            gl.maximum(gl.abs(values[2]), gl.abs(values[3])),
        )
        largest = gl.max(gl.max(largest, axis=2), axis=1)
        whole = gl.sum(gl.sum((values[0] + values[1]) + (values[2] + values[3]), axis=2), axis=1)
        # An integer is at most 2^30: its digits fit. No unit is so small that 1 / unit overflows.
        unit = gl.maximum(largest, 1e-27) * (1.0 / (1 << 30))
        inverse = (1.0 / unit)[:, None, None] * fraction
        numbers = ()
        for c in gl.static_range(4):
            number = gl.inline_asm_elementwise(
                "cvt.rni.s32.f32 $0, $1;", "=r,r", [values[c] * inverse], gl.int32,
                is_pure=True, pack=1,
            )  # fmt: skip
            # Its bytes are now digits of -128 to 127.
            numbers += ((number + 0x00808080) ^ 0x00808080,)
        of_digits = gl.inline_asm_elementwise(
            TRANSPOSE, "=&r,=&r,=&r,=&r,r,r,r,r", [numbers[0], numbers[1], numbers[2], numbers[3]],
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
                            [signs[2 * i], signs[2 * i + 1], columns, sums[2 * i + half]],
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
    scaled = ()
    for i in gl.static_range(2 * TILES):
        scaled += (totals[i] * of_outputs[i][:, None],)
    if TILES == 1:
        result = gl.sum(gl.join(scaled[0], scaled[1]), axis=1)  # (8, 2): a tile's rows, by halves
    else:
        pairs = gl.join(gl.join(scaled[0], scaled[2]), gl.join(scaled[1], scaled[3]))
        result = gl.reshape(gl.sum(pairs, axis=1), [8, 4])
    layout: gl.constexpr = result.type.layout
    line = gl.arange(0, 8, layout=gl.SliceLayout(1, layout))
    eighth = gl.arange(0, 2 * TILES, layout=gl.SliceLayout(0, layout))
    output = first + 8 * eighth[None, :] + line[:, None]
    gl.store(y + row * outputs + output, result.to(y.dtype.element_ty), mask=output < outputs)
