# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""paged_decode's first kernel: every program attends to its share of the tiles and leaves partial results.

Shapes: G query heads a KV head, D head size, P tokens a page, N tokens a tile; README.md has the layout.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvscope.methods.kernels.paged_decode.work import begin_of, counts_of, row_of, share_of_work, value_at

LOG2E = tl.constexpr(1.4426950408889634)
# What changes with steps, batches and pools that grow: a compilation for each divisibility would buy nothing.
_SPLIT_VARY = ["n_tokens", "capacity", "n_counts", "rows_each", "n_kv_heads", "stride_tb", "stride_th", "stride_ib",
               "stride_ih", "stride_lb", "stride_lh"]  # fmt: skip


@triton.jit(do_not_specialize=_SPLIT_VARY)
def split_kernel(
    q_ptr,
    pages_ptr,
    table_ptr,
    tokens_ptr,
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
    stride_ib,
    stride_ih,
    stride_lb,
    stride_lh,
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
    HAS_SOFTCAP: tl.constexpr,
    DEVICE_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attend to this program's share of the tiles; one partial result for each row it touches.

    Partial results are numbered row + program: along the tiles in order, each next result has a greater row or a
    greater program, so no two meet.
    """
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
    d = tl.arange(0, D_PAD)
    for row in range(first_row, last_row + 1):
        n = value_at(n_of, row // rows_each, COUNTS)
        n_tiles, row_begin = begin_of(row, tiles_of, ends, rows_each, COUNTS)
        tile_begin = tl.maximum(begin - row_begin, 0)
        tile_end = tl.minimum(end - row_begin, n_tiles)
        b, h = row // n_kv_heads, row % n_kv_heads

        q = tl.load(
            q_ptr + b * stride_qb + (h * G + g)[:, None] * stride_qh + d[None, :],
            mask=(g < G)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        table = table_ptr + b * stride_tb + h * stride_th
        tokens = tokens_ptr + b * stride_ib + h * stride_ih
        top, weight_sum, acc = attend_tiles(
            q,
            pages_ptr + h * (2 * P * D),
            table,
            tokens,
            n,
            n,
            n,
            tile_begin,
            tile_end,
            n_kv_heads,
            scale,
            softcap,
            P,
            G_PAD,
            D,
            D_PAD,
            N,
            HAS_TABLE,
            HAS_TOKENS,
            (P % N == 0) and not HAS_TOKENS,
            HAS_SOFTCAP,
            PRECISION,
        )
        safe_sum = tl.where(weight_sum > 0, weight_sum, 1.0)
        partial = (row + program) * G + g
        tl.store(lse_ptr + partial, top + tl.log2(safe_sum), mask=g < G)
        tl.store(
            out_ptr + partial[:, None] * D + d[None, :],
            acc / safe_sum[:, None],
            mask=(g < G)[:, None] & (d < D)[None, :],
        )


@triton.jit
def attend_tiles(
    q,
    head,
    table,
    tokens,
    n_table,
    n_tokens,
    n,
    tile_begin,
    tile_end,
    n_kv_heads,
    scale,
    softcap,
    P,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    IN_PAGE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend one group of queries [G_PAD, D_PAD] to tiles of one row: return the greatest logit, the sum of the weights
    and the weighted values, in base 2.

    ``head`` points to the KV head in the first page. ``n_table`` and ``n_tokens`` are ``n`` where this row has the
    table or the list that ``HAS_TABLE`` and ``HAS_TOKENS`` say some row has, else 0. ``IN_PAGE``: a tile lies in one
    page, and every row reads runs of tokens.
    """
    d = tl.arange(0, D_PAD)
    t = tl.arange(0, N)
    top = tl.full([G_PAD], float("-inf"), tl.float32)
    weight_sum = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, D_PAD], tl.float32)
    # Slots are read one tile ahead and carried: a load whose address waits for a load of its own iteration would
    # make the pipeline give half of its buffers to the slots.
    slot, offset = _locate(tile_begin, t, n, table, tokens, n_table, n_tokens, P, N, HAS_TABLE, HAS_TOKENS, IN_PAGE)
    for tile in range(tile_begin, tile_end):
        seen = tile * N + t < n
        at = slot * n_kv_heads * (2 * P * D) + offset * D
        keep = seen[:, None] & (d < D)[None, :]
        if IN_PAGE:
            base = head + at
            k = tl.load(base + (t * D)[:, None] + d[None, :], mask=keep, other=0.0)
            v = tl.load(base + P * D + (t * D)[:, None] + d[None, :], mask=keep, other=0.0)
        else:
            k = tl.load(head + at[:, None] + d[None, :], mask=keep, other=0.0)
            v = tl.load(head + P * D + at[:, None] + d[None, :], mask=keep, other=0.0)
        slot, offset = _locate(tile + 1, t, n, table, tokens, n_table, n_tokens, P, N, HAS_TABLE, HAS_TOKENS, IN_PAGE)

        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=tl.float32) * scale
        if HAS_SOFTCAP:
            # softcap * tanh(x), by an exponential that saturates to +-1 where it overflows.
            logits = softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2E) / softcap) + 1.0)) * LOG2E
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(logits - new_top[:, None])
        weight_sum = weight_sum * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return top, weight_sum, acc


@triton.jit
def _locate(
    tile,
    t,
    n,
    table,
    tokens,
    n_table,
    n_tokens,
    P,
    N: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    IN_PAGE: tl.constexpr,
):
    """Return the slot and the place in it: of a tile's first token where a tile lies in one page, else of each token.

    The address of a token past the end is never used.
    """
    zero = tl.full([], 0, tl.int64)  # offsets pass 2^31
    if IN_PAGE:
        page = tile * N // P
        offset = tile * N % P + zero
        slot = page + zero
        if HAS_TABLE:
            found = tl.load(table + page, mask=tile * N < n_table, other=0).to(tl.int64)
            slot = tl.where(tile * N < n_table, found, slot)
    else:
        token = tile * N + t
        in_list, in_table = token < n_tokens, token < n_table
        if HAS_TOKENS:
            listed = tl.load(tokens + token, mask=in_list, other=0).to(tl.int32)
            token = tl.where(in_list, listed, token)
        page = token // P
        offset = token % P + zero
        slot = page + zero
        if HAS_TABLE:
            found = tl.load(table + page, mask=in_table, other=0).to(tl.int64)
            slot = tl.where(in_table, found, slot)
    return slot, offset
