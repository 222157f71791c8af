# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The kernels behind ``rows``: sequences whose pages, tables and counts are tensors of their own, in one launch.

A table of numbers says where each row's tensors are, as distances in elements from an anchor tensor of their dtype: an
address that comes as an argument is known to be aligned, one that is loaded is not.

Shapes: B sequences, X stores a sequence, Q query heads, H KV heads, G = Q / H, D head size, P tokens a page, N tokens a
tile. A segment is a store of a sequence, number ``x * B + b``; a row of the work is a segment and KV head.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvscope.methods.kernels.paged_decode.merge import finish, gather_partials, partials_of_row
from kvscope.methods.kernels.paged_decode.split import attend_tiles
from kvscope.methods.kernels.paged_decode.work import begin_of, row_of, share_of_work, value_at

#: Columns of the table, int64 each.
FIELDS = 12
PAGES, TABLE, TOKENS, COUNT = 0, 1, 2, 3
TABLE_STRIDE, TOKENS_STRIDE, COUNT_STRIDE = 4, 5, 6
CAPACITY, KINDS, PAGE_TOKENS = 7, 8, 9
SLOT, OFFSET = 10, 11
HAS_TABLE_KIND, HAS_TOKENS_KIND = 1, 2

_PAGES, _TABLE, _TOKENS, _COUNT = (tl.constexpr(value) for value in (PAGES, TABLE, TOKENS, COUNT))
_TABLE_STRIDE, _TOKENS_STRIDE, _COUNT_STRIDE = (
    tl.constexpr(value) for value in (TABLE_STRIDE, TOKENS_STRIDE, COUNT_STRIDE)
)
_CAPACITY, _KINDS, _PAGE_TOKENS = (tl.constexpr(value) for value in (CAPACITY, KINDS, PAGE_TOKENS))
_SLOT, _OFFSET, _FIELDS = (tl.constexpr(value) for value in (SLOT, OFFSET, FIELDS))


@triton.jit
def _counts_of_segments(ints_ptr, table_ptr, n_counts, rows_each, n_kv_heads, COUNTS: tl.constexpr):
    """Return the counts of tokens, one for ``rows_each`` rows in turn: all KV heads of a segment, or one."""
    count = tl.arange(0, COUNTS)
    inside = count < n_counts
    row = count * rows_each
    fields = table_ptr + row // n_kv_heads * _FIELDS
    at = tl.load(fields + _COUNT, mask=inside, other=0)
    at += row % n_kv_heads * tl.load(fields + _COUNT_STRIDE, mask=inside, other=0)
    capacity = tl.load(fields + _CAPACITY, mask=inside, other=0).to(tl.int32)
    n = tl.load(ints_ptr + at, mask=inside, other=0)
    return tl.minimum(tl.maximum(n, 0), capacity)


@triton.jit(do_not_specialize=["n_counts", "rows_each", "n_kv_heads", "n_sequences"])
def split_rows_kernel(
    q_ptr,
    turned_ptr,
    anchor_ptr,
    ints_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    scale,
    softcap,
    n_counts,
    rows_each,
    n_kv_heads,
    n_sequences,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    COUNTS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    HAS_TURNED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    PART: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attend to this program's share of the tiles; one partial result for each row it touches, at row + program.

    ``PART`` > 0: a program takes one part of a row, of that many tiles. The line of the work is then one of parts.

    P: tokens of every page; 0 where segments differ. Queries are [B, Q, D], contiguous; ``turned_ptr`` has those of
    second stores, where they are not the same.
    """
    if DEPENDENT:
        gdc_wait()
    program = tl.program_id(0).to(tl.int64)
    n_of = _counts_of_segments(ints_ptr, table_ptr, n_counts, rows_each, n_kv_heads, COUNTS)
    LINE_N: tl.constexpr = N * PART if PART > 0 else N
    tiles_of, ends, total, used = share_of_work(n_of, n_counts, rows_each, tl.num_programs(0), LINE_N, MIN_TILES)
    if DEPENDENT:
        gdc_launch_dependents()
    if program >= used:
        return
    begin = (program * total // used).to(tl.int32)
    end = ((program + 1) * total // used).to(tl.int32)
    first_row = row_of(begin, tiles_of, ends, rows_each, COUNTS)
    last_row = row_of(end - 1, tiles_of, ends, rows_each, COUNTS)

    g = tl.arange(0, G_PAD)
    d = tl.arange(0, D_PAD)
    for row in range(first_row, last_row + 1):
        n = value_at(n_of, row // rows_each, COUNTS)
        n_tiles, row_begin = begin_of(row, tiles_of, ends, rows_each, COUNTS)
        tile_begin = tl.maximum(begin - row_begin, 0)
        tile_end = tl.minimum(end - row_begin, n_tiles)
        if PART > 0:
            tile_begin = tile_begin * PART
            tile_end = tl.minimum(tile_end * PART, (n + N - 1) // N)
        segment, h = row // n_kv_heads, row % n_kv_heads
        fields = table_ptr + segment * _FIELDS
        at = ((segment % n_sequences * n_kv_heads + h) * G + g)[:, None] * D + d[None, :]
        wanted = (g < G)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + at, mask=wanted, other=0.0)
        if HAS_TURNED:
            turned = tl.load(turned_ptr + at, mask=wanted, other=0.0)
            q = tl.where(segment < n_sequences, q, turned)
        kinds = tl.load(fields + _KINDS).to(tl.int32)
        table = ints_ptr + tl.load(fields + _TABLE) + h * tl.load(fields + _TABLE_STRIDE)
        tokens = ints_ptr + tl.load(fields + _TOKENS) + h * tl.load(fields + _TOKENS_STRIDE)
        pages = tl.multiple_of(tl.load(fields + _PAGES), 16)
        in_table, in_tokens = n * (kinds & 1), n * (kinds >> 1)
        if P == 0:
            page_tokens = tl.load(fields + _PAGE_TOKENS).to(tl.int32)
            top, weight_sum, acc = attend_tiles(
                q, anchor_ptr + pages + h * (2 * page_tokens * D), table, tokens, in_table, in_tokens, n, tile_begin,
                tile_end, n_kv_heads, scale, softcap, page_tokens, G_PAD, D, D_PAD, N, HAS_TABLE, HAS_TOKENS, False,
                HAS_SOFTCAP, PRECISION,
            )  # fmt: skip
        else:
            top, weight_sum, acc = attend_tiles(
                q, anchor_ptr + pages + h * (2 * P * D), table, tokens, in_table, in_tokens, n, tile_begin, tile_end,
                n_kv_heads, scale, softcap, P, G_PAD, D, D_PAD, N, HAS_TABLE, HAS_TOKENS,
                (P % N == 0) and not HAS_TOKENS, HAS_SOFTCAP, PRECISION,
            )  # fmt: skip
        safe_sum = tl.where(weight_sum > 0, weight_sum, 1.0)
        partial = (row + program) * G + g
        tl.store(lse_ptr + partial, top + tl.log2(safe_sum), mask=g < G)
        tl.store(out_ptr + partial[:, None] * D + d[None, :], acc / safe_sum[:, None], mask=wanted)


@triton.jit(do_not_specialize=["n_counts", "rows_each", "n_kv_heads", "n_sequences", "n_programs"])
def merge_rows_kernel(
    result_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    ints_ptr,
    table_ptr,
    n_counts,
    rows_each,
    n_kv_heads,
    n_sequences,
    n_programs,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    COUNTS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    TWO_STORES: tl.constexpr,
    HAS_SINK: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Join the partial results of one query head over programs and stores, one of ``PARTS`` parts of the channels."""
    if DEPENDENT:
        gdc_launch_dependents()
    query = tl.program_id(0)
    row, head = query // G, query % G
    n_of = _counts_of_segments(ints_ptr, table_ptr, n_counts, rows_each, n_kv_heads, COUNTS)
    tiles_of, ends, total, used = share_of_work(n_of, n_counts, rows_each, n_programs, N, MIN_TILES)
    first, last = partials_of_row(row, tiles_of, ends, total, used, rows_each, COUNTS)
    second = row + n_sequences * n_kv_heads
    if TWO_STORES:
        first_b, last_b = partials_of_row(second, tiles_of, ends, total, used, rows_each, COUNTS)
    if DEPENDENT:
        gdc_wait()
    # A finite floor: where nothing was read at all, differences of -inf would be NaN.
    top = tl.full([], -1e30, tl.float32)
    weight_sum = tl.full([], 0.0, tl.float32)
    d = tl.program_id(1) * (D_PAD // PARTS) + tl.arange(0, D_PAD // PARTS)
    acc = tl.zeros([D_PAD // PARTS], tl.float32)
    top, weight_sum, acc = gather_partials(
        top, weight_sum, acc, row, head, first, last, d, out_ptr, lse_ptr, G, D, MERGE_ROWS
    )
    if TWO_STORES:
        top, weight_sum, acc = gather_partials(
            top, weight_sum, acc, second, head, first_b, last_b, d, out_ptr, lse_ptr, G, D, MERGE_ROWS
        )
    out, _ = finish(top, weight_sum, acc, sink_ptr, query % (n_kv_heads * G), HAS_SINK)
    tl.store(result_ptr + query.to(tl.int64) * D + d, out.to(result_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["n_kv_heads", "stride_kb", "stride_kh", "stride_vb", "stride_vh"])
def append_rows_kernel(
    k_ptr,
    v_ptr,
    anchor_ptr,
    ints_ptr,
    table_ptr,
    n_kv_heads,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Store one token's K and V of one sequence and KV head in its page."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    fields = table_ptr + b * _FIELDS
    slot = tl.load(ints_ptr + tl.load(fields + _SLOT)).to(tl.int64)
    offset = tl.load(ints_ptr + tl.load(fields + _OFFSET)).to(tl.int64)
    page_tokens = tl.load(fields + _PAGE_TOKENS)
    d = tl.arange(0, D_PAD)
    k = tl.load(k_ptr + b * stride_kb + h * stride_kh + d, mask=d < D)
    v = tl.load(v_ptr + b * stride_vb + h * stride_vh + d, mask=d < D)
    at = tl.load(fields + _PAGES) + (slot * n_kv_heads + h) * (2 * page_tokens * D) + offset * D + d
    tl.store(anchor_ptr + at, k, mask=d < D)
    tl.store(anchor_ptr + at + page_tokens * D, v, mask=d < D)
