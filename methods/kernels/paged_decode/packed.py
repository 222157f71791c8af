# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"
# ruff: noqa: RUF005 - Triton adds tuples up, and does not unpack them into others
"""paged_decode's first kernel over packed pages: what is stored is unpacked in registers, beside the products.

Elements are read as words of 16 bits, whose W fields are W parts of a token's channels, each multiplied by itself: so
no element changes its place. Operands are fp16 (fp32 for fp32 queries): it holds every code, and a dequantised element
to 11 bits. Queries and weights are scaled by powers of two to stay within its range.

Scales of ``fp8`` values go to the smaller side, which is the weights: with u the greatest scale so far,
``sum_t w_t s_t e_t = u sum_t p_t e_t`` and ``p_t = w_t s_t / u``. Whole numbers have a base, too, and one multiply-add
for both.

Shapes: G query heads a KV head, D head size, F elements a byte, W = 2 F elements a word, C = D / W words of a token,
P tokens a page, N tokens a tile. ``kv_format.PagePacking`` has the layout of a page.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvscope.methods.kernels.paged_decode.work import begin_of, counts_of, row_of, share_of_work, value_at

LOG2E = tl.constexpr(1.4426950408889634)
LOG2_QUERY = tl.constexpr(4.0)  # queries reach 2^4 to 2^5
LOG2_WEIGHT = tl.constexpr(14.0)  # the greatest weight is 2^14: weights of 2^-28 of it are normal numbers yet


@triton.constexpr_function
def _whole_asm(bits, field, place):
    """Return assembly for whole numbers, two words at once: $0 = (1 + field of $1, in fractions) * $2 + $3."""
    mask = ((1 << bits) - 1) << place
    mask |= mask << 16
    by = bits * field - place
    shift = "mov.b32 t, $1;" if by == 0 else f"shr.b32 t, $1, {by};" if by > 0 else f"shl.b32 t, $1, {-by};"
    return (
        "{ .reg .b32 t, m; mov.b32 m, 0x3c003c00; "
        f"{shift} lop3.b32 t, t, {mask:#x}, m, 0xea; "  # (t & mask) | m
        "fma.rn.f16x2 $0, t, $2, $3; }"
    )


@triton.constexpr_function
def _float_asm(converts, scaled):
    """Return assembly for e4m3, two words at once: $0 and $1 are the bytes of $2, times $3 and $4 if ``scaled``."""
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
    if scaled:
        parts.append("mul.f16x2 $0, $0, $3; mul.f16x2 $1, $1, $4;")
    return " ".join([*parts, "}"])


@triton.constexpr_function
def _operands(outputs, inputs):
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


# What changes with steps, batches and pools that grow: a compilation for each divisibility would buy nothing.
_PACKED_VARY = ["n_tokens", "capacity", "n_counts", "rows_each", "n_kv_heads", "stride_tb", "stride_th", "stride_lb",
                "stride_lh"]  # fmt: skip


@triton.jit(do_not_specialize=_PACKED_VARY)
def packed_split_kernel(
    q_ptr,
    pages_ptr,
    numbers_ptr,
    pairs_ptr,
    table_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    n_tokens,
    capacity,
    scale,
    softcap,
    n_counts,
    rows_each,
    n_kv_heads,
    stride_qb,
    stride_qh,
    stride_tb,
    stride_th,
    stride_lb,
    stride_lh,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    C_PAD: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    RECORD: tl.constexpr,
    PLACE: tl.constexpr,
    COUNTS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DEVICE_LENGTHS: tl.constexpr,
    OPERAND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONVERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attend to this program's share of the tiles; partial results as ``split_kernel`` leaves them.

    ``pages_ptr``, ``numbers_ptr`` and ``pairs_ptr`` are the same pages, as words, as fp16 and as pairs of fp16.
    ``GROUP``: tokens that share a channel's scale, a multiple of N. ``RECORD``: bytes of one KV head's part of a page.
    ``CONVERTS``: the device turns e4m3 into fp16 by an instruction (compute capability 8.9 on).
    """
    W: tl.constexpr = 16 // BITS
    C: tl.constexpr = D // W
    if DEPENDENT:
        gdc_wait()
    program = tl.program_id(0).to(tl.int64)
    n_of = counts_of(
        lengths_ptr, n_tokens, capacity, n_counts, rows_each, stride_lb, stride_lh, n_kv_heads, COUNTS, DEVICE_LENGTHS
    )
    tiles_of, ends, total, used = share_of_work(n_of, n_counts, rows_each, tl.num_programs(0), N, MIN_TILES)
    if DEPENDENT:
        gdc_launch_dependents()
    if program >= used:
        return
    begin = (program * total // used).to(tl.int32)
    end = ((program + 1) * total // used).to(tl.int32)
    first_row = row_of(begin, tiles_of, ends, rows_each, COUNTS)
    last_row = row_of(end - 1, tiles_of, ends, rows_each, COUNTS)

    g = tl.arange(0, G_PAD)
    c = tl.arange(0, C_PAD)
    wanted = (g < G)[:, None] & (c < C)[None, :]
    for row in range(first_row, last_row + 1):
        n = value_at(n_of, row // rows_each, COUNTS)
        n_tiles, row_begin = begin_of(row, tiles_of, ends, rows_each, COUNTS)
        tile_begin = tl.maximum(begin - row_begin, 0)
        tile_end = tl.minimum(end - row_begin, n_tiles)
        b, h = row // n_kv_heads, row % n_kv_heads
        q_at = q_ptr + b * stride_qb + (h * G + g)[:, None] * stride_qh
        q = ()
        top_q = tl.full([G_PAD], 0.0, tl.float32)
        for f in tl.static_range(W):
            part = tl.load(q_at + _channel(c, f, D, BITS)[None, :], mask=wanted, other=0.0)
            q = q + (part,)
            top_q = tl.maximum(top_q, tl.max(tl.abs(part.to(tl.float32)), 1))
        # A power of two: it costs no precision.
        factor = tl.exp2(tl.floor(tl.log2(tl.maximum(top_q, 1e-30))) - LOG2_QUERY)
        scaled = ()
        for f in tl.static_range(W):
            scaled = scaled + ((q[f].to(tl.float32) / factor[:, None]).to(OPERAND),)
        weight_sum, top, unit, acc = _attend_packed(
            scaled, factor * scale, pages_ptr + h * (RECORD // 2), numbers_ptr + h * (RECORD // 2),
            pairs_ptr + h * (RECORD // 4),
            table_ptr + b * stride_tb + h * stride_th, n, tile_begin, tile_end, n_kv_heads, softcap,
            G_PAD, D, C_PAD, P, N, GROUP, BITS, IS_FLOAT, RECORD, PLACE, HAS_TABLE, HAS_SOFTCAP, OPERAND, ASSEMBLY,
            CONVERTS, PRECISION,
        )  # fmt: skip
        safe_sum = tl.where(weight_sum > 0, weight_sum, 1.0)
        partial = (row + program) * G + g
        tl.store(lse_ptr + partial, top + tl.log2(safe_sum) - LOG2_WEIGHT, mask=g < G)
        for f in tl.static_range(W):
            out_at = out_ptr + partial[:, None] * D + _channel(c, f, D, BITS)[None, :]
            tl.store(out_at, acc[f] * (unit / safe_sum)[:, None], mask=wanted)


@triton.jit
def _attend_packed(
    q,
    scale,
    head,
    numbers,
    pairs,
    table,
    n,
    tile_begin,
    tile_end,
    n_kv_heads,
    softcap,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    C_PAD: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    RECORD: tl.constexpr,
    PLACE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    OPERAND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONVERTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend one group of queries, in W parts [G_PAD, C_PAD], to tiles of one row; every tile lies in one page.

    ``head``, ``numbers`` and ``pairs`` point to the KV head in the first page; ``scale`` is of each query, [G_PAD].
    Returns the sum of the weights and the greatest logit [G_PAD], u (1 for whole numbers), and the weighted values over
    u [G_PAD, C_PAD] by part.
    """
    W: tl.constexpr = 16 // BITS
    F: tl.constexpr = 8 // BITS
    C: tl.constexpr = D // W
    KINDS: tl.constexpr = 1 if IS_FLOAT else 2
    FIRST_K: tl.constexpr = P * D // F  # numbers are two bytes, and elements of K and of V lie before them
    FIRST_V: tl.constexpr = FIRST_K + P // GROUP * (KINDS * D)
    c = tl.arange(0, C_PAD)
    t = tl.arange(0, N)
    top = tl.full([G_PAD], float("-inf"), tl.float32)
    weight_sum = tl.zeros([G_PAD], tl.float32)
    unit = tl.full([], 1e-30 if IS_FLOAT else 1.0, tl.float32)
    acc = ()
    for _ in tl.static_range(W):
        acc = acc + (tl.zeros([G_PAD, C_PAD], tl.float32),)
    # A slot is known a tile ahead: no load waits for one of its own iteration. Triton pipelines no loop that hands a
    # value on unchanged, so it is the page's distance that is carried.
    page_words = n_kv_heads * (RECORD // 2)
    page = _slot_of(tile_begin, n, table, P, N, HAS_TABLE) * page_words
    for tile in range(tile_begin, tile_end):
        offset = tl.multiple_of(tile * N % P, N)
        at = head + page + (offset + t)[:, None] * C + c[None, :]
        if C == C_PAD:
            k_words = tl.load(at)
            v_words = tl.load(at + P * C)
        else:
            inside = (c < C)[None, :] & (t < N)[:, None]
            k_words = tl.load(at, mask=inside, other=0)
            v_words = tl.load(at + P * C, mask=inside, other=0)
        k_numbers = numbers + page + FIRST_K + offset // GROUP * (KINDS * D)
        # Numbers of two tokens at once: two bytes a lane are fewer than an asynchronous copy takes, and a multiply-add
        # of two elements takes both.
        v_pairs = pairs + page // 2 + FIRST_V // 2 + offset // 2 + tl.arange(0, N // 2)
        page = _slot_of(tile + 1, n, table, P, N, HAS_TABLE) * page_words

        logits = tl.zeros([G_PAD, N], tl.float32)
        if IS_FLOAT:
            low = tl.load(k_numbers + c, mask=c < C, other=0.0)
            high = tl.load(k_numbers + C + c, mask=c < C, other=0.0)
            k = _scaled_floats(k_words, low[None, :], high[None, :], OPERAND, ASSEMBLY, CONVERTS)
            for f in tl.static_range(W):
                logits = tl.dot(q[f], tl.trans(k[f]), logits, input_precision=PRECISION)
        else:
            for f in tl.static_range(W):
                s = tl.load(k_numbers + f * C + c, mask=c < C, other=0.0)
                z = tl.load(k_numbers + D + f * C + c, mask=c < C, other=0.0)
                k_f = _wholes(k_words, s[None, :], z[None, :], f, BITS, PLACE, OPERAND, ASSEMBLY)
                logits = tl.dot(q[f], tl.trans(k_f), logits, input_precision=PRECISION)
        logits *= scale[:, None]
        if HAS_SOFTCAP:
            # softcap * tanh(x), by an exponential that saturates to +-1 where it overflows.
            logits = softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2E) / softcap) + 1.0)) * LOG2E
        logits = tl.where((tile * N + t < n)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(logits - (new_top - LOG2_WEIGHT)[:, None])
        weight_sum = weight_sum * fade + tl.sum(weights, 1)
        if IS_FLOAT:
            s = _of_pairs(tl.load(v_pairs), N).to(tl.float32)
            new_unit = tl.maximum(unit, tl.max(s, 0))
            per_unit = 1.0 / new_unit
            operand = (weights * (s * per_unit)[None, :]).to(OPERAND)
            fade *= unit * per_unit
            unit = new_unit
            v = _floats(v_words, OPERAND, ASSEMBLY, CONVERTS)
            added = ()
            for f in tl.static_range(W):
                added = added + (tl.dot(operand, v[f], acc[f] * fade[:, None], input_precision=PRECISION),)
        else:
            operand = weights.to(OPERAND)
            scales = ()
            bases = ()
            for group in tl.static_range(F):
                scales = scales + (_of_pairs(tl.load(v_pairs + 2 * group * (P // 2)), N),)
                bases = bases + (_of_pairs(tl.load(v_pairs + (2 * group + 1) * (P // 2)), N),)
            added = ()
            for f in tl.static_range(W):
                s, z = scales[f % F][:, None], bases[f % F][:, None]
                v_f = _wholes(v_words, s, z, f, BITS, PLACE, OPERAND, ASSEMBLY)
                added = added + (tl.dot(operand, v_f, acc[f] * fade[:, None], input_precision=PRECISION),)
        acc = added
        top = new_top
    return weight_sum, top, unit, acc


@triton.jit
def _channel(c, FIELD: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Return the channels of a part: bits i of byte j hold channel i * D / F + j, and a word is two bytes."""
    F: tl.constexpr = 8 // BITS
    return FIELD % F * (D // F) + FIELD // F + 2 * c


@triton.jit
def _wholes(
    words, scales, bases, FIELD: tl.constexpr, BITS: tl.constexpr, PLACE: tl.constexpr, OPERAND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return a field of words as dequantised whole numbers of ``OPERAND``.

    Assembly here and below does what stands below it, for two words at once; Triton's interpreter has none.
    """
    if ASSEMBLY:
        shape: tl.constexpr = words.shape
        scales, bases = tl.broadcast_to(scales, shape), tl.broadcast_to(bases, shape)
        return tl.inline_asm_elementwise(
            _whole_asm(BITS, FIELD, PLACE), "=r,r,r,r", [words, scales, bases], dtype=tl.float16, is_pure=True, pack=2
        )
    field = (words >> (BITS * FIELD)) & ((1 << BITS) - 1)
    # 1 in fp16, the code in its fraction. Products are exact in fp32 and rounded once, as fused ones are.
    factor = ((field << PLACE) | 0x3C00).to(tl.float16, bitcast=True).to(tl.float32)
    return (factor * scales.to(tl.float32) + bases.to(tl.float32)).to(OPERAND)


@triton.jit
def _of_pairs(pairs, N: tl.constexpr):
    """Return N numbers of fp16 from [N / 2] pairs."""
    first = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(first, second), (N,))


@triton.jit
def _floats(words, OPERAND: tl.constexpr, ASSEMBLY: tl.constexpr, CONVERTS: tl.constexpr):
    """Return both bytes of words, e4m3, as numbers of ``OPERAND``."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            _float_asm(CONVERTS, False), _operands(2, 1), [words], dtype=(tl.float16,) * 2, is_pure=True, pack=2
        )
    found = ()
    for f in tl.static_range(2):
        # The bits of e4m3 at those of fp16 give the number over 2^8, small ones included.
        high = words if f == 1 else words << 8
        bits = (high & -0x8000) | ((high >> 1) & 0x3F80)
        found = found + ((bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(OPERAND),)
    return found


@triton.jit
def _scaled_floats(words, low, high, OPERAND: tl.constexpr, ASSEMBLY: tl.constexpr, CONVERTS: tl.constexpr):
    """Return the same times the scales of the low and of the high byte."""
    if ASSEMBLY:
        shape: tl.constexpr = words.shape
        low, high = tl.broadcast_to(low, shape), tl.broadcast_to(high, shape)
        return tl.inline_asm_elementwise(
            _float_asm(CONVERTS, True), _operands(2, 3), [words, low, high], dtype=(tl.float16,) * 2, is_pure=True,
            pack=2,
        )  # fmt: skip
    found = _floats(words, OPERAND, False, False)
    return (found[0] * low.to(OPERAND)).to(OPERAND), (found[1] * high.to(OPERAND)).to(OPERAND)


@triton.jit
def _slot_of(tile, n, table, P: tl.constexpr, N: tl.constexpr, HAS_TABLE: tl.constexpr):
    """Return the page of a tile; past the last tile, the first page."""
    page = tile * N // P
    is_there = tile * N < n
    if HAS_TABLE:
        slot = tl.load(table + page, mask=is_there, other=0).to(tl.int64)
    else:
        slot = tl.where(is_there, page, 0).to(tl.int64)
    return slot
