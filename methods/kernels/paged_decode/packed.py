# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"
# ruff: noqa: RUF005 - Triton adds tuples up, and does not unpack them into others
"""paged_decode's first kernel over packed pages: what is stored is unpacked in registers, beside the products.

Elements are read as words of 16 bits, whose W fields are W parts of a token's channels, each multiplied by itself: so
no element changes its place. ``packed_words`` unpacks them.

Scales and bases stay with the smaller side of a product. With elements ``c s + a``, keys by channel d, values by token
t: ``q . k_t = sum_d (q_d s_d) c_td + sum_d q_d a_d`` and ``sum_t w_t v_td = sum_t (w_t s_t) c_td + sum_t w_t a_t``.
Operands are fp16 (fp32 for fp32 queries). Queries and weights are scaled by powers of two to stay within its range.

Keys meet queries as [heads, tokens], whose lower 8 rows lie in registers as the right side of values' product,
[channels, tokens] x [tokens, heads], does: weights need not move, and 8 columns do for 8 query heads.

Shapes: G query heads a KV head, D head size, F elements a byte, W = 2 F elements a word, C = D / W words of a token, in
pieces of C_PAD that are loaded one by one, P tokens a page, N tokens a tile, M rows of queries.
``kv_format.PagePacking`` has the layout of a page.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvscope.methods.kernels.paged_decode.packed_words import _channel, _fields, _laid_out, _lower_rows, _words
from kvscope.methods.kernels.paged_decode.work import begin_of, counts_of, row_of, share_of_work, value_at

LOG2E = tl.constexpr(1.4426950408889634)
LOG2_QUERY = tl.constexpr(1.0)  # queries reach 2 to 4: with the greatest scales, 2^13.4, within fp16
LOG2_WEIGHT = tl.constexpr(14.0)  # the greatest weight is 2^14: weights of 2^-28 of it are normal numbers yet


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
    COUNTS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DEVICE_LENGTHS: tl.constexpr,
    OPERAND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONVERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    LANES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attend to this program's share of the tiles; partial results as ``split_kernel`` leaves them.

    ``pages_ptr``, ``numbers_ptr`` and ``pairs_ptr`` are the same pages, as words, as fp16 and as pairs of fp16.
    ``GROUP``: tokens that share a channel's scale, a multiple of N. ``RECORD``: bytes of one KV head's part of a page.
    ``CONVERTS``: the device turns e4m3 into fp16 by an instruction (compute capability 8.9 on). ``LANES``: threads of a
    program.
    """
    W: tl.constexpr = 16 // BITS
    F: tl.constexpr = 8 // BITS
    C: tl.constexpr = D // W
    PIECES: tl.constexpr = (C + C_PAD - 1) // C_PAD
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

    M: tl.constexpr = G_PAD if G_PAD > 16 else 16
    g = tl.arange(0, G_PAD)
    m = tl.arange(0, M)
    c = tl.arange(0, C_PAD)
    wanted = (c < C)[:, None] & (g < G)[None, :]
    for row in range(first_row, last_row + 1):
        n = value_at(n_of, row // rows_each, COUNTS)
        n_tiles, row_begin = begin_of(row, tiles_of, ends, rows_each, COUNTS)
        tile_begin = tl.maximum(begin - row_begin, 0)
        tile_end = tl.minimum(end - row_begin, n_tiles)
        b, h = row // n_kv_heads, row % n_kv_heads
        # The first page's number is on its way while queries are read and scaled.
        table = table_ptr + b * stride_tb + h * stride_th
        slot = _slot_of(tile_begin, n, table, P, N, HAS_TABLE)
        q_at = q_ptr + b * stride_qb + (h * G + m)[:, None] * stride_qh
        raw = ()
        top_q = tl.full([M], 0.0, tl.float32)
        for f in tl.static_range(PIECES * W):
            part_at = q_at + _channel(f // W * C_PAD + c, f % W, D, BITS)[None, :]
            part = tl.load(part_at, mask=(m < G)[:, None] & (c < C)[None, :], other=0.0)
            raw = raw + (part,)
            top_q = tl.maximum(top_q, tl.max(tl.abs(part.to(tl.float32)), 1))
        # A power of two: it costs no precision.
        factor = tl.exp2(tl.floor(tl.log2(tl.maximum(top_q, 1e-30))) - LOG2_QUERY)
        one = tl.where(m[:, None] == m[None, :], 1.0, 0.0).to(OPERAND)
        q = ()
        for f in tl.static_range(PIECES * W):
            q = q + (_laid_out(one, raw[f].to(tl.float32) / factor[:, None], OPERAND, PRECISION),)
        weight_sum, top, acc, base = _attend_packed(
            q, factor * scale, pages_ptr + h * (RECORD // 2), numbers_ptr + h * (RECORD // 2),
            pairs_ptr + h * (RECORD // 4),
            table, slot, n, tile_begin, tile_end, n_kv_heads, softcap,
            G_PAD, D, C_PAD, P, N, GROUP, BITS, IS_FLOAT, RECORD, HAS_TABLE, HAS_SOFTCAP, OPERAND, ASSEMBLY, CONVERTS,
            PRECISION, LANES,
        )  # fmt: skip
        safe_sum = tl.where(weight_sum > 0, weight_sum, 1.0)
        partial = (row + program) * G + g
        tl.store(lse_ptr + partial, top + tl.log2(safe_sum) - LOG2_WEIGHT, mask=g < G)
        for f in tl.static_range(PIECES * W):
            out_at = out_ptr + partial[None, :] * D + _channel(f // W * C_PAD + c, f % W, D, BITS)[:, None]
            of_group = tl.sum(tl.where(tl.arange(0, 16)[:, None] == f % F, base, 0.0), 0)
            tl.store(out_at, (acc[f] + of_group[None, :]) / safe_sum[None, :], mask=wanted)


@triton.jit
def _attend_packed(
    q,
    scale,
    head,
    numbers,
    pairs,
    table,
    slot,
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
    HAS_TABLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    OPERAND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    CONVERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    LANES: tl.constexpr,
):
    """Attend one group of queries, in W parts [M, C_PAD] a piece, to tiles of one row; every tile lies in one page.

    ``head``, ``numbers`` and ``pairs`` point to the KV head in the first page; ``slot`` is the page of the first tile;
    ``scale``, above zero, is of each query, [M]. Returns the sum of the weights and the greatest logit [G_PAD],
    weighted elements times their scales [C_PAD, G_PAD] by part, and weighted bases [16, G_PAD], whose row r is of the
    group r % F of channels.
    """
    W: tl.constexpr = 16 // BITS
    F: tl.constexpr = 8 // BITS
    C: tl.constexpr = D // W
    PIECES: tl.constexpr = (C + C_PAD - 1) // C_PAD
    M: tl.constexpr = G_PAD if G_PAD > 16 else 16
    KINDS: tl.constexpr = 1 if IS_FLOAT else 2
    FIRST_K: tl.constexpr = P * D // F  # numbers are two bytes, and elements of K and of V lie before them
    FIRST_V: tl.constexpr = FIRST_K + P // GROUP * (KINDS * D)
    #: What a whole number is as an operand: bits below the normal numbers of fp16.
    ONE: tl.constexpr = 1.0 if IS_FLOAT or tl.float32 == OPERAND else 2.0**-24
    # An asynchronous copy takes four bytes a lane or more: so often numbers of channels, of tokens, and bases of tokens
    # are loaded. The rest of what repeats does so in registers.
    BY_C: tl.constexpr = min(8, max(1, 2 * LANES // C_PAD))
    BY_N: tl.constexpr = min(8, max(1, 2 * LANES // N))
    BASES: tl.constexpr = min(16, max(F, 2 * LANES // N))
    c = tl.arange(0, C_PAD)
    t = tl.arange(0, N)
    inside = (c < C)[:, None] & (t < N)[None, :]
    base_at = (F + tl.arange(0, BASES) % F)[:, None] * P + t[None, :]
    top = tl.full([G_PAD], float("-inf"), tl.float32)
    weight_sum = tl.zeros([G_PAD], tl.float32)
    base = tl.zeros([16, G_PAD], tl.float32)
    acc = ()
    for _ in tl.static_range(PIECES * W):
        acc = acc + (tl.zeros([C_PAD, G_PAD], tl.float32),)
    gain = _lower_rows(scale * (1 / ONE), G_PAD)
    # A slot is known a tile ahead: no load waits for one of its own iteration. Triton pipelines no loop that hands a
    # value on unchanged, so it is the page's distance that is carried.
    page_words = n_kv_heads * (RECORD // 2)
    page = slot * page_words
    for tile in range(tile_begin, tile_end):
        offset = tl.multiple_of(tile * N % P, N)
        k_at = head + (page + offset * C) + (t[None, :] * C + c[:, None])
        v_at = k_at + P * C
        k_numbers = numbers + page + FIRST_K + offset // GROUP * (KINDS * D)
        v_numbers = numbers + page + FIRST_V + offset
        v_pairs = pairs + page // 2 + FIRST_V // 2 + offset // 2
        page = _slot_of(tile + 1, n, table, P, N, HAS_TABLE) * page_words

        # A piece is loaded where it is used: until then it takes no registers.
        products = tl.zeros([M, N], tl.float32)
        shift_M8 = tl.zeros([M, 8], tl.float32)
        for piece in tl.static_range(PIECES):
            k_words = _words(k_at + piece * C_PAD, inside, C % C_PAD == 0)
            k = _fields(k_words, BITS, IS_FLOAT, OPERAND, ASSEMBLY, CONVERTS)
            for f in tl.static_range(W):
                at_f = k_numbers + f * C + piece * C_PAD + c
                s = tl.load(tl.broadcast_to(at_f[None, :], (BY_C, C_PAD)), mask=(c < C)[None, :], other=0.0)
                s = tl.reshape(tl.broadcast_to(s[:, None, :], (BY_C, M // BY_C, C_PAD)), (M, C_PAD))
                q_f = q[piece * W + f]
                products = tl.dot((q_f * s).to(OPERAND), k[f], products, input_precision=PRECISION)
                if not IS_FLOAT:
                    a = tl.load(tl.broadcast_to((at_f + D)[:, None], (C_PAD, BY_C)), mask=(c < C)[:, None], other=0.0)
                    a = tl.reshape(tl.broadcast_to(a[:, :, None], (C_PAD, BY_C, 8 // BY_C)), (C_PAD, 8))
                    shift_M8 = tl.dot(q_f, a.to(OPERAND), shift_M8, input_precision=PRECISION)
        products = _lower_rows(products, G_PAD)
        shift = _lower_rows(tl.max(shift_M8, 1) * scale, G_PAD)
        if HAS_SOFTCAP:
            # softcap * tanh(x), by an exponential that saturates to +-1 where it overflows.
            logits = products * gain[:, None] + shift[:, None]
            products = softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2E) / softcap) + 1.0)) * LOG2E
            shift = tl.zeros([G_PAD], tl.float32)
        if tile * N + N > n:
            products = tl.where((tile * N + t < n)[None, :], products, float("-inf"))
        to_logits = tl.full([G_PAD], 1.0, tl.float32) if HAS_SOFTCAP else gain
        # Weights times values' scales must stay within fp16: the power of two at the greatest scale counts as a logit.
        both = tl.load(v_pairs + tl.arange(0, F)[:, None] * (P // 2) + tl.arange(0, N // 2)[None, :])
        most = tl.max(tl.max(tl.maximum(both & 0xFFFF, both >> 16), 1), 0)
        level = tl.maximum((most + 0x3FF) // 0x400 - 15, 0).to(tl.float32)
        new_top = tl.maximum(top, tl.max(products, 1) * to_logits + (shift + level))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(products * to_logits[:, None] + (shift - new_top + LOG2_WEIGHT)[:, None])
        weight_sum = weight_sum * fade + tl.sum(weights, 1)
        operand = tl.trans(weights.to(OPERAND))
        scaled = ()
        for group in tl.static_range(F):
            s = tl.load(tl.broadcast_to((v_numbers + group * P + t)[:, None], (N, BY_N)))
            s = tl.reshape(tl.broadcast_to(s[:, :, None], (N, BY_N, G_PAD // BY_N)), (N, G_PAD))
            scaled = scaled + ((operand * s).to(OPERAND),)
        added = ()
        for piece in tl.static_range(PIECES):
            v_words = _words(v_at + piece * C_PAD, inside, C % C_PAD == 0)
            v = _fields(v_words, BITS, IS_FLOAT, OPERAND, ASSEMBLY, CONVERTS)
            for f in tl.static_range(W):
                faded = acc[piece * W + f] * fade[None, :]
                added = added + (tl.dot(v[f], scaled[f % F], faded, input_precision=PRECISION),)
        acc = added
        if not IS_FLOAT:
            a = tl.load(v_numbers + base_at)
            a = tl.reshape(tl.broadcast_to(a[None, :, :], (16 // BASES, BASES, N)), (16, N)).to(OPERAND)
            base = tl.dot(a, operand, base * fade[None, :], input_precision=PRECISION)
        top = new_top
    found = ()
    for f in tl.static_range(PIECES * W):
        found = found + (acc[f] * (1 / ONE),)
    return weight_sum, top, found, base


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
