# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"
# ruff: noqa: RUF005 - Triton adds tuples up, and does not unpack them into others
"""paged_decode's first kernel over packed pages, tokens first: products are ``K q`` and ``V^T p``.

Tokens and channels are the rows of the tensor core's products, and query heads its columns, of which eight are enough
(as rows they are padded to sixteen). What is stored is unpacked where a product takes its rows: in registers.

Elements are not dequantised. A code is the bits of an fp16 as it stands: a subnormal number, the code times a power of two,
which tensor cores multiply like any other. Scales and bases go to the smaller side, which are queries and weights: of a
key ``k_d = step_d c_d + low_d`` and of a value ``v_t = step_t c_t + low_t``

    q . k = (q step) . c + q . low        sum_t w_t v_t = sum_t (w_t step_t) c_t + sum_t w_t low_t

where ``q step`` and ``q . low`` are the same for all tokens of a tile. Weights times scales are taken over the greatest scale
so far, so that they stay within fp16.

Shapes: G query heads a KV head (HEADS, padded), D head size, F elements a byte, W = 2 F elements a word, C = D / W words
of a token, P tokens a page, N tokens a tile. ``kv_format.PagePacking`` has the layout of a page.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvscope.methods.kernels.paged_decode.packed import LOG2_WEIGHT, LOG2E, channel_of, slot_of
from kvscope.methods.kernels.paged_decode.work import begin_of, counts_of, row_of, share_of_work, value_at

# Queries are scaled so that their products with scales stay within fp16: a scale of e4m3 is 36 at most.
LOG2_FLOAT_QUERY = tl.constexpr(9.0)
LOG2_WHOLE_QUERY = tl.constexpr(-1.0)


@triton.constexpr_function
def _codes_asm(bits):
    """Return assembly for the fields of words, two words at once: $0 and on are the fields of the last operand, each in its
    place in a byte."""
    fields = 16 // bits
    if bits == 8:
        body = f"prmt.b32 $0, ${fields}, 0, 0x4240; prmt.b32 $1, ${fields}, 0, 0x4341;"
        return f"{{ {body} }}"
    parts = [f"{{ .reg .b32 t; shr.b32 t, ${fields}, 8;"]
    for field in range(fields):
        mask = ((1 << bits) - 1) << (bits * field % 8)
        parts.append(f"and.b32 ${field}, {'t' if bits * field >= 8 else f'${fields}'}, {mask | mask << 16:#x};")
    return " ".join([*parts, "}"])


@triton.constexpr_function
def _floats_asm(converts):
    """Return assembly for e4m3, two words at once: $0 and $1 are the bytes of $2."""
    if converts:
        return (
            "{ .reg .b32 t; .reg .b16 l, h; prmt.b32 t, $2, 0, 0x3120; mov.b32 {l, h}, t; "
            "cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }"
        )
    parts = ["{ .reg .b32 t, u, m; mov.b32 m, 0x5c005c00;"]  # the bits of e4m3 at those of fp16 are the number over 2^8
    for field, high in ((0, "shl.b32 t, $2, 8;"), (1, "mov.b32 t, $2;")):
        parts.append(
            f"{high} shr.b32 u, t, 1; and.b32 u, u, 0x3f803f80; lop3.b32 t, t, 0x80008000, u, 0xea; "
            f"mul.f16x2 ${field}, t, m;"
        )
    return " ".join([*parts, "}"])


@triton.constexpr_function
def _step(bits, field, place, is_float):
    """Return what a product with codes lacks: the least fp16 is 2^-24, and a code counts scales over 2^(10 - place)."""
    return 1.0 if is_float else 2.0 ** (24 - bits * field % 8 + place - 10)


@triton.constexpr_function
def _placed(bits, field):
    return 2.0 ** -(bits * field % 8)


@triton.constexpr_function
def _outputs(n):
    return ",".join(["=&r"] * n + ["r"])


# What changes with steps, batches and pools that grow: a compilation for each divisibility would buy nothing.
_VARY = ["n_tokens", "capacity", "n_counts", "rows_each", "n_kv_heads", "stride_tb", "stride_th", "stride_lb",
         "stride_lh"]  # fmt: skip


@triton.jit(do_not_specialize=_VARY)
def packed_tokens_kernel(
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
    HEADS: tl.constexpr,
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
    """Attend to this program's share of the tiles; arguments and partial results as ``packed_split_kernel``'s.

    ``CONVERTS``: whether the device turns e4m3 into fp16 by an instruction (compute capability 8.9 on).
    """
    W: tl.constexpr = 16 // BITS
    F: tl.constexpr = 8 // BITS
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

    g = tl.arange(0, HEADS)
    c = tl.arange(0, C_PAD)
    wanted = (c < C)[:, None] & (g < G)[None, :]
    for row in range(first_row, last_row + 1):
        n = value_at(n_of, row // rows_each, COUNTS)
        n_tiles, row_begin = begin_of(row, tiles_of, ends, rows_each, COUNTS)
        tile_begin = tl.maximum(begin - row_begin, 0)
        tile_end = tl.minimum(end - row_begin, n_tiles)
        b, h = row // n_kv_heads, row % n_kv_heads
        q_at = q_ptr + b * stride_qb + (h * G + g)[None, :] * stride_qh
        q = ()
        top_q = tl.full([HEADS], 0.0, tl.float32)
        for f in tl.static_range(W):
            part = tl.load(q_at + channel_of(c, f, D, BITS)[:, None], mask=wanted, other=0.0)
            q = q + (part,)
            top_q = tl.maximum(top_q, tl.max(tl.abs(part.to(tl.float32)), 0))
        # A power of two: it costs no precision.
        to: tl.constexpr = LOG2_FLOAT_QUERY if IS_FLOAT else LOG2_WHOLE_QUERY
        factor = tl.exp2(tl.floor(tl.log2(tl.maximum(top_q, 1e-30))) - to)
        scaled = ()
        for f in tl.static_range(W):
            scaled = scaled + ((q[f].to(tl.float32) / factor[None, :]).to(OPERAND),)
        weight_sum, top, unit, base, acc = _attend_tokens(
            scaled, factor * scale, pages_ptr + h * (RECORD // 2), numbers_ptr + h * (RECORD // 2),
            pairs_ptr + h * (RECORD // 4),
            table_ptr + b * stride_tb + h * stride_th, n, tile_begin, tile_end, n_kv_heads, softcap,
            HEADS, D, C_PAD, P, N, GROUP, BITS, IS_FLOAT, RECORD, PLACE, HAS_TABLE, HAS_SOFTCAP, OPERAND, ASSEMBLY,
            CONVERTS, PRECISION,
        )  # fmt: skip
        safe_sum = tl.where(weight_sum > 0, weight_sum, 1.0)
        partial = (row + program) * G + g
        tl.store(lse_ptr + partial, top + tl.log2(safe_sum) - LOG2_WEIGHT, mask=g < G)
        for f in tl.static_range(W):
            out_at = out_ptr + partial[None, :] * D + channel_of(c, f, D, BITS)[:, None]
            tl.store(
                out_at,
                (acc[f] * (unit * _step(BITS, f, PLACE, IS_FLOAT)) + base[f % F][None, :]) / safe_sum[None, :],
                mask=wanted,
            )


@triton.jit
def _attend_tokens(
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
    HEADS: tl.constexpr,
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
    """Attend a group of queries, in W parts [C_PAD, HEADS], to tiles of one row; every tile lies in one page.

    Returns the sum of the weights, the greatest logit, the unit u, what bases add [HEADS] by group, and the products
    [C_PAD, HEADS] by part.
    """
    W: tl.constexpr = 16 // BITS
    F: tl.constexpr = 8 // BITS
    C: tl.constexpr = D // W
    KINDS: tl.constexpr = 1 if IS_FLOAT else 2
    FIRST_K: tl.constexpr = P * D // F  # numbers are two bytes, and elements of K and of V lie before them
    FIRST_V: tl.constexpr = FIRST_K + P // GROUP * (KINDS * D)
    c = tl.arange(0, C_PAD)
    t = tl.arange(0, N)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([HEADS], tl.float32)
    unit = tl.full([], 1e-30, tl.float32)
    base = ()
    for _ in tl.static_range(F):
        base = base + (tl.zeros([HEADS], tl.float32),)
    acc = ()
    for _ in tl.static_range(W):
        acc = acc + (tl.zeros([C_PAD, HEADS], tl.float32),)
    # A slot is known a tile ahead: no load waits for one of its own iteration. Triton pipelines no loop that hands a
    # value on unchanged, so it is the page's distance that is carried.
    page_words = n_kv_heads * (RECORD // 2)
    page = slot_of(tile_begin, n, table, P, N, HAS_TABLE) * page_words
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
        v_numbers = numbers + page + FIRST_V + offset + t
        v_pairs = pairs + page // 2 + FIRST_V // 2 + offset + t
        page = slot_of(tile + 1, n, table, P, N, HAS_TABLE) * page_words

        logits = tl.zeros([N, HEADS], tl.float32)
        low = tl.zeros([16, HEADS], tl.float32)
        if IS_FLOAT:
            k = _floats(k_words, OPERAND, ASSEMBLY, CONVERTS)
        else:
            k = _codes(k_words, BITS, OPERAND, ASSEMBLY)
        for f in tl.static_range(W):
            s = tl.load(k_numbers + f * C + c, mask=c < C, other=0.0)
            if IS_FLOAT:
                part = q[f].to(OPERAND) * s.to(OPERAND)[:, None]
            else:
                # A field's place in its byte is a power of two, which the scale takes off.
                part = q[f] * (s.to(OPERAND) * _placed(BITS, f))[:, None]
                z = tl.load(k_numbers + D + f * C + c, mask=c < C, other=0.0)
                least = (s.to(OPERAND) + z.to(OPERAND))[None, :]
                low = tl.dot(tl.broadcast_to(least, (16, C_PAD)), q[f], low, input_precision=PRECISION)
            logits = tl.dot(k[f], part, logits, input_precision=PRECISION)
        if IS_FLOAT:
            logits *= scale[None, :]
        else:
            logits = logits * (scale * _step(BITS, 0, PLACE, IS_FLOAT))[None, :] + (tl.max(low, 0) * scale)[None, :]
        if HAS_SOFTCAP:
            # softcap * tanh(x), by an exponential that saturates to +-1 where it overflows.
            logits = softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2E) / softcap) + 1.0)) * LOG2E
        logits = tl.where((tile * N + t < n)[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 0))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(logits - (new_top - LOG2_WEIGHT)[None, :])
        weight_sum = weight_sum * fade + tl.sum(weights, 0)

        scales = ()
        bases = ()
        new_unit = unit
        for group in tl.static_range(F):
            if IS_FLOAT:
                s = tl.load(v_numbers + group * P).to(tl.float32)
                a = s
            else:
                # Two bytes a lane are fewer than an asynchronous copy takes: a scale and its base come together.
                pair = tl.load(v_pairs + group * P)
                s = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                a = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            scales = scales + (s,)
            bases = bases + (a,)
            new_unit = tl.maximum(new_unit, tl.max(s, 0))
        per_unit = 1.0 / new_unit
        operands = ()
        new_base = ()
        for group in tl.static_range(F):
            operands = operands + ((weights * (scales[group] * per_unit)[:, None]).to(OPERAND),)
            if IS_FLOAT:
                new_base = base
            else:
                least = (scales[group] + bases[group])[:, None]
                new_base = new_base + (base[group] * fade + tl.sum(weights * least, 0),)
        base = new_base
        shrink = fade * (unit * per_unit)
        if IS_FLOAT:
            v = _floats(v_words, OPERAND, ASSEMBLY, CONVERTS)
        else:
            v = _codes(v_words, BITS, OPERAND, ASSEMBLY)
        added = ()
        for f in tl.static_range(W):
            faded = acc[f] * shrink[None, :]
            added = added + (tl.dot(tl.trans(v[f]), operands[f % F], faded, input_precision=PRECISION),)
        acc = added
        unit = new_unit
        top = new_top
    return weight_sum, top, unit, base, acc


@triton.jit
def _codes(words, BITS: tl.constexpr, OPERAND: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the fields of words as numbers of ``OPERAND``: bits of an fp16 as they stand in a byte."""
    W: tl.constexpr = 16 // BITS
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            _codes_asm(BITS), _outputs(W), [words], dtype=(tl.float16,) * W, is_pure=True, pack=2
        )
    found = ()
    for f in tl.static_range(W):
        bits = (words >> (BITS * f - BITS * f % 8)) & (((1 << BITS) - 1) << (BITS * f % 8))
        found = found + (bits.to(tl.float16, bitcast=True).to(OPERAND),)
    return found


@triton.jit
def _floats(words, OPERAND: tl.constexpr, ASSEMBLY: tl.constexpr, CONVERTS: tl.constexpr):
    """Return both bytes of words as numbers of ``OPERAND``."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            _floats_asm(CONVERTS), _outputs(2), [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    found = ()
    for f in tl.static_range(2):
        # The bits of e4m3 at those of fp16 give the number over 2^8, small ones included.
        high = words if f == 1 else words << 8
        bits = (high & -0x8000) | ((high >> 1) & 0x3F80)
        found = found + ((bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(OPERAND),)
    return found
