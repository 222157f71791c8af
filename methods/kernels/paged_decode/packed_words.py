# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"
# ruff: noqa: RUF005 - Triton adds tuples up, and does not unpack them into others
"""How packed words and what meets them lie in registers, for ``packed``: unpacking, and layouts of queries.

Unpacking is a mask: the bits of a field are those of an fp16 below the normal numbers, 2^-24 times a whole number, and
tensor cores multiply those exactly. e4m3 is converted.

Shapes: D head size, F elements a byte, W = 2 F elements a word.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _wholes_asm(bits):
    """Return assembly for the fields of two words at once: the bits of each, where they are in their byte."""
    if bits == 8:
        return "prmt.b32 $0, $2, 0, 0x4240; prmt.b32 $1, $2, 0, 0x4341;"
    fields = 8 // bits
    parts = [f"{{ .reg .b32 t; shr.b32 t, ${2 * fields}, 8;"]
    for field in range(2 * fields):
        mask = ((1 << bits) - 1) << (bits * (field % fields))
        parts.append(f"and.b32 ${field}, {'t' if field >= fields else f'${2 * fields}'}, {mask | mask << 16:#x};")
    return " ".join([*parts, "}"])


@triton.constexpr_function
def _floats_asm(converts):
    """Return assembly for e4m3, two words at once: $0 and $1 are the bytes of $2."""
    parts = ["{ .reg .b32 t, u, m; .reg .b16 l, h; mov.b32 m, 0x5c005c00;"]  # m is 256
    if converts:
        parts.append(
            "prmt.b32 t, $2, 0, 0x3120; mov.b32 {l, h}, t; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h;"
        )
    else:  # the bits of e4m3 at those of fp16 are the number over 2^8
        for field, high in ((0, "shl.b32 t, $2, 8;"), (1, "mov.b32 t, $2;")):
            parts.append(
                f"{high} shr.b32 u, t, 1; and.b32 u, u, 0x3f803f80; lop3.b32 t, t, 0x80008000, u, 0xea; "
                f"mul.f16x2 ${field}, t, m;"
            )
    return " ".join([*parts, "}"])


@triton.constexpr_function
def _operands(outputs):
    return ",".join(["=&r"] * outputs + ["r"])


@triton.jit
def _words(at, inside, ALL: tl.constexpr):
    """Load words, all of them or those inside."""
    return tl.load(at) if ALL else tl.load(at, mask=inside, other=0)


@triton.jit
def _channel(c, FIELD: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Return the channels of a part: bits i of byte j hold channel i * D / F + j, and a word is two bytes."""
    F: tl.constexpr = 8 // BITS
    return FIELD % F * (D // F) + FIELD // F + 2 * c


@triton.jit
def _fields(
    words, BITS: tl.constexpr, IS_FLOAT: tl.constexpr, OPERAND: tl.constexpr, ASSEMBLY: tl.constexpr,
    CONVERTS: tl.constexpr,
):  # fmt: skip
    """Return the W fields of words as operands: e4m3 as numbers, else masked bits, 2^-24 of a whole number in fp16.

    Assembly does what stands below it, for two words at once; Triton's interpreter has none.
    """
    W: tl.constexpr = 16 // BITS
    F: tl.constexpr = 8 // BITS
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            _floats_asm(CONVERTS) if IS_FLOAT else _wholes_asm(BITS), _operands(W), [words], dtype=(tl.float16,) * W,
            is_pure=True, pack=2,
        )  # fmt: skip
    found = ()
    for f in tl.static_range(W):
        if IS_FLOAT:
            # The bits of e4m3 at those of fp16 give the number over 2^8, small ones included.
            high = words if f == 1 else words << 8
            bits = (high & -0x8000) | ((high >> 1) & 0x3F80)
            found = found + ((bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(OPERAND),)
        else:
            bits = (words >> (8 * (f // F))) & (((1 << BITS) - 1) << (BITS * (f % F)))
            found = found + (bits.to(OPERAND, bitcast=True) if tl.float16 == OPERAND else bits.to(OPERAND),)
    return found


@triton.jit
def _laid_out(one, x, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Return queries as a product with ones in the diagonal, which changes no number.

    Tensor cores take a product for a left side as it lies. Laid out otherwise, queries times scales would pass through
    shared memory in each iteration.
    """
    return tl.dot(one, x.to(OPERAND), input_precision=PRECISION).to(OPERAND)


@triton.jit
def _lower_rows(x, G_PAD: tl.constexpr):
    """Return the first G_PAD rows of 16 or more."""
    if G_PAD == 8:
        if len(x.shape) == 1:
            x = tl.split(tl.trans(tl.reshape(x, (2, 8))))[0]
        else:
            x = tl.split(tl.permute(tl.reshape(x, (2, 8, x.shape[1])), (1, 2, 0)))[0]
    return x
