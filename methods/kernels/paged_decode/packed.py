# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""paged_decode's first kernel over packed pages: elements are unpacked in registers, scales go to the query and weights.

With K = c s + z (a scale and a zero point a channel), q . K = (q s) . c + q . z: the query takes the scales, once a tile.
With V = c s + z (a token's), sum_t w_t V_t = sum_t (w_t s_t) c_t + sum_t w_t z_t: the weights take them. So what is done
for each element is to make a number of its bits.

Shapes: G query heads a KV head, D head size, F elements a byte, C = D / F bytes of a token, P tokens a page, N tokens a
tile. ``kv_format.PagePacking`` has the layout of a page.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvscope.methods.kernels.paged_decode.work import begin_of, counts_of, row_of, share_of_work, value_at

LOG2E = tl.constexpr(1.4426950408889634)
# What changes with steps, batches and pools that grow: a compilation for each divisibility would buy nothing.
_PACKED_VARY = ["n_tokens", "capacity", "n_counts", "rows_each", "n_kv_heads", "stride_tb", "stride_th", "stride_lb",
                "stride_lh"]  # fmt: skip


@triton.jit(do_not_specialize=_PACKED_VARY)
def packed_split_kernel(
    q_ptr,
    pages_ptr,
    numbers_ptr,
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
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attend to this program's share of the tiles; partial results as ``split_kernel`` leaves them.

    ``pages_ptr`` and ``numbers_ptr`` are the same pages, as bytes and as fp16. ``GROUP``: tokens that share a channel's
    scale, a multiple of N. ``RECORD``: bytes of one KV head's part of a page.
    """
    F: tl.constexpr = 8 // BITS
    C: tl.constexpr = D // F
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
        q_at = q_ptr + b * stride_qb + (h * G + g)[:, None] * stride_qh + c[None, :]
        q0 = tl.load(q_at, mask=wanted, other=0.0)
        q1, q2, q3 = q0, q0, q0
        if F > 1:
            q1 = tl.load(q_at + C, mask=wanted, other=0.0)
        if F > 2:
            q2 = tl.load(q_at + 2 * C, mask=wanted, other=0.0)
            q3 = tl.load(q_at + 3 * C, mask=wanted, other=0.0)
        weight_sum, top, acc0, acc1, acc2, acc3 = _attend_packed(
            q0, q1, q2, q3, pages_ptr + h * RECORD, numbers_ptr + h * (RECORD // 2),
            table_ptr + b * stride_tb + h * stride_th, n, tile_begin, tile_end, n_kv_heads, scale, softcap,
            G_PAD, D, C_PAD, P, N, GROUP, BITS, IS_FLOAT, RECORD, HAS_TABLE, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        safe_sum = tl.where(weight_sum > 0, weight_sum, 1.0)
        partial = (row + program) * G + g
        tl.store(lse_ptr + partial, top + tl.log2(safe_sum), mask=g < G)
        out_at = out_ptr + partial[:, None] * D + c[None, :]
        tl.store(out_at, acc0 / safe_sum[:, None], mask=wanted)
        if F > 1:
            tl.store(out_at + C, acc1 / safe_sum[:, None], mask=wanted)
        if F > 2:
            tl.store(out_at + 2 * C, acc2 / safe_sum[:, None], mask=wanted)
            tl.store(out_at + 3 * C, acc3 / safe_sum[:, None], mask=wanted)


@triton.jit
def _attend_packed(
    q0,
    q1,
    q2,
    q3,
    head,
    numbers,
    table,
    n,
    tile_begin,
    tile_end,
    n_kv_heads,
    scale,
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
    PRECISION: tl.constexpr,
):
    """Attend one group of queries, in F parts [G_PAD, C_PAD], to tiles of one row; every tile lies in one page.

    ``head`` and ``numbers`` point to the KV head in the first page.
    """
    F: tl.constexpr = 8 // BITS
    C: tl.constexpr = D // F
    c = tl.arange(0, C_PAD)
    t = tl.arange(0, N)
    top = tl.full([G_PAD], float("-inf"), tl.float32)
    weight_sum = tl.zeros([G_PAD], tl.float32)
    # Parts that there are not are as small as can be.
    acc0 = tl.zeros([G_PAD, C_PAD], tl.float32)
    acc1 = tl.zeros([G_PAD, C_PAD if F > 1 else 1], tl.float32)
    acc2 = tl.zeros([G_PAD, C_PAD if F > 2 else 1], tl.float32)
    acc3 = tl.zeros([G_PAD, C_PAD if F > 2 else 1], tl.float32)
    inside = (c < C)[None, :] & (t < N)[:, None]
    # Slots are known a tile ahead, and scales are loaded a tile ahead: no load waits for one of its own iteration.
    slot = _slot_of(tile_begin, n, table, P, N, HAS_TABLE)
    next_slot = _slot_of(tile_begin + 1, n, table, P, N, HAS_TABLE)
    ks0, ks1, ks2, ks3, kz0, kz1, kz2, kz3 = _key_numbers(
        numbers, slot, tile_begin, n_kv_heads, D, C_PAD, P, N, GROUP, BITS, IS_FLOAT, RECORD
    )
    vs0, vs1, vs2, vs3, vz0, vz1, vz2, vz3 = _value_numbers(
        numbers, slot, tile_begin, n_kv_heads, D, P, N, GROUP, BITS, IS_FLOAT, RECORD
    )
    for tile in range(tile_begin, tile_end):
        offset = tile * N % P
        at = head + slot * n_kv_heads * RECORD + offset * C
        k_bytes = tl.load(at + (t * C)[:, None] + c[None, :], mask=inside, other=0)
        v_bytes = tl.load(at + P * C + (t * C)[:, None] + c[None, :], mask=inside, other=0)
        slot_after = _slot_of(tile + 2, n, table, P, N, HAS_TABLE)
        next_ks0, next_ks1, next_ks2, next_ks3, next_kz0, next_kz1, next_kz2, next_kz3 = _key_numbers(
            numbers, next_slot, tile + 1, n_kv_heads, D, C_PAD, P, N, GROUP, BITS, IS_FLOAT, RECORD
        )
        next_vs0, next_vs1, next_vs2, next_vs3, next_vz0, next_vz1, next_vz2, next_vz3 = _value_numbers(
            numbers, next_slot, tile + 1, n_kv_heads, D, P, N, GROUP, BITS, IS_FLOAT, RECORD
        )

        logits, shift = _add_logits(q0, k_bytes, ks0, kz0, 0, BITS, IS_FLOAT, PRECISION)
        if F > 1:
            more, also = _add_logits(q1, k_bytes, ks1, kz1, 1, BITS, IS_FLOAT, PRECISION)
            logits, shift = logits + more, shift + also
        if F > 2:
            more, also = _add_logits(q2, k_bytes, ks2, kz2, 2, BITS, IS_FLOAT, PRECISION)
            logits, shift = logits + more, shift + also
            more, also = _add_logits(q3, k_bytes, ks3, kz3, 3, BITS, IS_FLOAT, PRECISION)
            logits, shift = logits + more, shift + also
        if not IS_FLOAT:
            logits += shift[:, None]
        logits *= scale
        if HAS_SOFTCAP:
            # softcap * tanh(x), by an exponential that saturates to +-1 where it overflows.
            logits = softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2E) / softcap) + 1.0)) * LOG2E
        seen = tile * N + t < n
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(logits - new_top[:, None])
        weight_sum = weight_sum * fade + tl.sum(weights, 1)
        acc0 = _add_values(acc0 * fade[:, None], weights, v_bytes, vs0, vz0, 0, q0, BITS, IS_FLOAT, PRECISION)
        if F > 1:
            acc1 = _add_values(acc1 * fade[:, None], weights, v_bytes, vs1, vz1, 1, q0, BITS, IS_FLOAT, PRECISION)
        if F > 2:
            acc2 = _add_values(acc2 * fade[:, None], weights, v_bytes, vs2, vz2, 2, q0, BITS, IS_FLOAT, PRECISION)
            acc3 = _add_values(acc3 * fade[:, None], weights, v_bytes, vs3, vz3, 3, q0, BITS, IS_FLOAT, PRECISION)
        top = new_top
        slot, next_slot = next_slot, slot_after
        ks0, ks1, ks2, ks3 = next_ks0, next_ks1, next_ks2, next_ks3
        kz0, kz1, kz2, kz3 = next_kz0, next_kz1, next_kz2, next_kz3
        vs0, vs1, vs2, vs3 = next_vs0, next_vs1, next_vs2, next_vs3
        vz0, vz1, vz2, vz3 = next_vz0, next_vz1, next_vz2, next_vz3
    return weight_sum, top, acc0, acc1, acc2, acc3


@triton.jit
def _add_logits(q, k_bytes, scales, zeros, FIELD: tl.constexpr, BITS: tl.constexpr, IS_FLOAT: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Return a part's logits [G_PAD, N] and what zero points add to all of them [G_PAD]."""
    codes = _codes(k_bytes, q.dtype, FIELD, BITS, IS_FLOAT)
    scaled = (q.to(tl.float32) * scales[None, :]).to(q.dtype)
    logits = tl.dot(scaled, tl.trans(codes), input_precision=PRECISION, out_dtype=tl.float32)
    shift = tl.sum(q.to(tl.float32) * zeros[None, :], 1)
    return logits, shift


@triton.jit
def _add_values(acc, weights, v_bytes, scales, zeros, FIELD: tl.constexpr, like, BITS: tl.constexpr,
                IS_FLOAT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add a part's weighted values to ``acc``; ``like`` has the dtype of the products' operands."""
    codes = _codes(v_bytes, like.dtype, FIELD, BITS, IS_FLOAT)
    acc = tl.dot((weights * scales[None, :]).to(like.dtype), codes, acc, input_precision=PRECISION)
    if not IS_FLOAT:
        acc += tl.sum(weights * zeros[None, :], 1)[:, None]
    return acc


@triton.jit
def _codes(packed, dtype: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr, IS_FLOAT: tl.constexpr):
    """Return one field of bytes as numbers of ``dtype``; all of them are exact in it."""
    if IS_FLOAT:
        numbers = packed.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif BITS == 8:
        numbers = packed.to(dtype)
    else:
        field = (packed >> (BITS * FIELD)) & ((1 << BITS) - 1)
        if dtype == tl.bfloat16:
            # 128 + c has c in its last bits: cheaper than a conversion.
            numbers = (field.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 128.0
        elif dtype == tl.float16:
            numbers = (field.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
        else:
            numbers = field.to(dtype)
    return numbers.to(dtype)


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


@triton.jit
def _key_numbers(
    numbers, slot, tile, n_kv_heads, D: tl.constexpr, C_PAD: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    GROUP: tl.constexpr, BITS: tl.constexpr, IS_FLOAT: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Return the scales and zero points of a tile's keys, in fp32: four parts of each [C_PAD], the last ones repeats."""
    F: tl.constexpr = 8 // BITS
    C: tl.constexpr = D // F
    KINDS: tl.constexpr = 1 if IS_FLOAT else 2
    c = tl.arange(0, C_PAD)
    # Numbers are two bytes, and elements of K and of V lie before them.
    group = tile * N % P // GROUP
    at = numbers + slot * n_kv_heads * (RECORD // 2) + P * C + group * (KINDS * D) + c
    s0 = tl.load(at, mask=c < C, other=0.0).to(tl.float32)
    z0 = s0
    if not IS_FLOAT:
        z0 = tl.load(at + D, mask=c < C, other=0.0).to(tl.float32)
    s1, s2, s3, z1, z2, z3 = s0, s0, s0, z0, z0, z0
    if F > 1:
        s1 = tl.load(at + C, mask=c < C, other=0.0).to(tl.float32)
        z1 = tl.load(at + D + C, mask=c < C, other=0.0).to(tl.float32)
    if F > 2:
        s2 = tl.load(at + 2 * C, mask=c < C, other=0.0).to(tl.float32)
        z2 = tl.load(at + D + 2 * C, mask=c < C, other=0.0).to(tl.float32)
        s3 = tl.load(at + 3 * C, mask=c < C, other=0.0).to(tl.float32)
        z3 = tl.load(at + D + 3 * C, mask=c < C, other=0.0).to(tl.float32)
    return s0, s1, s2, s3, z0, z1, z2, z3


@triton.jit
def _value_numbers(
    numbers, slot, tile, n_kv_heads, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, IS_FLOAT: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """The same of a tile's values: parts [N]."""
    F: tl.constexpr = 8 // BITS
    C: tl.constexpr = D // F
    KINDS: tl.constexpr = 1 if IS_FLOAT else 2
    t = tl.arange(0, N)
    first = P * C + P // GROUP * (KINDS * D)
    at = numbers + slot * n_kv_heads * (RECORD // 2) + first + tile * N % P + t
    s0 = tl.load(at).to(tl.float32)
    z0 = s0
    if not IS_FLOAT:
        z0 = tl.load(at + P).to(tl.float32)
    s1, s2, s3, z1, z2, z3 = s0, s0, s0, z0, z0, z0
    if F > 1:
        s1 = tl.load(at + 2 * P).to(tl.float32)
        z1 = tl.load(at + 3 * P).to(tl.float32)
    if F > 2:
        s2 = tl.load(at + 4 * P).to(tl.float32)
        z2 = tl.load(at + 5 * P).to(tl.float32)
        s3 = tl.load(at + 6 * P).to(tl.float32)
        z3 = tl.load(at + 7 * P).to(tl.float32)
    return s0, s1, s2, s3, z0, z1, z2, z3
