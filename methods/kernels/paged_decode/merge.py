# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""paged_decode's second kernel: joins the partial results of programs and stores by log-sum-exp.

Shapes: G query heads a KV head, D head size, N tokens a tile.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvscope.methods.kernels.paged_decode.work import begin_of, counts_of, share_of_work

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What changes with steps, batches and pools that grow: a compilation for each divisibility would buy nothing.
_MERGE_VARY = ["n_kv_heads", *(f"{name}_{store}" for store in "ab" for name in
               ("n_tokens", "capacity", "n_counts", "rows_each", "stride_lb", "stride_lh", "programs"))]  # fmt: skip


@triton.jit
def _partials_of(
    row,
    lengths_ptr,
    n_tokens,
    capacity,
    n_counts,
    rows_each,
    stride_lb,
    stride_lh,
    n_kv_heads,
    n_programs,
    COUNTS: tl.constexpr,
    N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    DEVICE_LENGTHS: tl.constexpr,
):
    """Return the first and the last program with a partial result of a row in one store; where there is none, the first
    is the greater."""
    n_of = counts_of(
        lengths_ptr, n_tokens, capacity, n_counts, rows_each, stride_lb, stride_lh, n_kv_heads, COUNTS, DEVICE_LENGTHS
    )
    tiles_of, ends, total, used = share_of_work(n_of, n_counts, rows_each, n_programs, N, MIN_TILES)
    return partials_of_row(row, tiles_of, ends, total, used, rows_each, COUNTS)


@triton.jit
def partials_of_row(row, tiles_of, ends, total, used, rows_each, COUNTS: tl.constexpr):
    """Return the first and the last program with a partial result of a row; where there is none, the first is the
    greater."""
    n_tiles, row_begin = begin_of(row, tiles_of, ends, rows_each, COUNTS)
    # Program p begins at tile floor(p * total / used); the last one that begins at or before a tile holds it.
    row_begin = row_begin.to(tl.int64)
    some = tl.maximum(total, 1)
    first = (((row_begin + 1) * used - 1) // some).to(tl.int32)
    last = (((row_begin + n_tiles) * used - 1) // some).to(tl.int32)
    return tl.where(n_tiles > 0, first, 1), tl.where(n_tiles > 0, last, 0)


@triton.jit
def gather_partials(
    top,
    weight_sum,
    acc,
    row,
    head,
    first,
    last,
    d,
    out_ptr,
    lse_ptr,
    G: tl.constexpr,
    D: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
):
    """Add one store's partial results of a row, channels ``d``, to a running softmax."""
    for at in range(first, last + 1, MERGE_ROWS):
        program = at + tl.arange(0, MERGE_ROWS)
        partial = (row + program).to(tl.int64) * G + head
        lse = tl.load(lse_ptr + partial, mask=program <= last, other=float("-inf"))
        part = tl.load(
            out_ptr + partial[:, None] * D + d[None, :],
            mask=(program <= last)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(lse, 0))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(lse - new_top)
        weight_sum = weight_sum * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(part * weights[:, None], 0)
        top = new_top
    return top, weight_sum, acc


@triton.jit
def finish(top, weight_sum, acc, sink_ptr, query_head, HAS_SINK: tl.constexpr):
    """Return output and natural log-sum-exp of a running softmax, with the head's sink logit if there is one."""
    if HAS_SINK:
        sink = tl.load(sink_ptr + query_head).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        fade = tl.exp2(top - new_top)
        weight_sum = weight_sum * fade + tl.exp2(sink - new_top)
        acc = acc * fade
        top = new_top
    safe_sum = tl.where(weight_sum > 0, weight_sum, 1.0)
    lse = tl.where(weight_sum > 0, (top + tl.log2(safe_sum)) * LN2, float("-inf"))
    return acc / safe_sum, lse


@triton.jit(do_not_specialize=_MERGE_VARY)
def merge_kernel(
    result_ptr,
    result_lse_ptr,
    sink_ptr,
    out_a,
    lse_a,
    lengths_a,
    n_tokens_a,
    capacity_a,
    n_counts_a,
    rows_each_a,
    stride_lb_a,
    stride_lh_a,
    programs_a,
    out_b,
    lse_b,
    lengths_b,
    n_tokens_b,
    capacity_b,
    n_counts_b,
    rows_each_b,
    stride_lb_b,
    stride_lh_b,
    programs_b,
    n_kv_heads,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N_A: tl.constexpr,
    N_B: tl.constexpr,
    COUNTS_A: tl.constexpr,
    COUNTS_B: tl.constexpr,
    MIN_TILES: tl.constexpr,
    DEVICE_LENGTHS_A: tl.constexpr,
    DEVICE_LENGTHS_B: tl.constexpr,
    TWO_STORES: tl.constexpr,
    HAS_SINK: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Join the partial results of one query head over programs and stores, one of ``PARTS`` parts of the channels.

    What it reads before it waits for the split was there before the split began.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    query = tl.program_id(0)
    row = query // G
    head = query % G
    first_a, last_a = _partials_of(
        row,
        lengths_a,
        n_tokens_a,
        capacity_a,
        n_counts_a,
        rows_each_a,
        stride_lb_a,
        stride_lh_a,
        n_kv_heads,
        programs_a,
        COUNTS_A,
        N_A,
        MIN_TILES,
        DEVICE_LENGTHS_A,
    )
    if TWO_STORES:
        first_b, last_b = _partials_of(
            row,
            lengths_b,
            n_tokens_b,
            capacity_b,
            n_counts_b,
            rows_each_b,
            stride_lb_b,
            stride_lh_b,
            n_kv_heads,
            programs_b,
            COUNTS_B,
            N_B,
            MIN_TILES,
            DEVICE_LENGTHS_B,
        )
    if DEPENDENT:
        gdc_wait()
    # A finite floor: where nothing was read at all, differences of -inf would be NaN.
    top = tl.full([], -1e30, tl.float32)
    weight_sum = tl.full([], 0.0, tl.float32)
    d = tl.program_id(1) * (D_PAD // PARTS) + tl.arange(0, D_PAD // PARTS)
    acc = tl.zeros([D_PAD // PARTS], tl.float32)
    top, weight_sum, acc = gather_partials(
        top, weight_sum, acc, row, head, first_a, last_a, d, out_a, lse_a, G, D, MERGE_ROWS
    )
    if TWO_STORES:
        top, weight_sum, acc = gather_partials(
            top, weight_sum, acc, row, head, first_b, last_b, d, out_b, lse_b, G, D, MERGE_ROWS
        )
    out, lse = finish(top, weight_sum, acc, sink_ptr, query % (n_kv_heads * G), HAS_SINK)
    tl.store(result_lse_ptr + query, lse, mask=tl.program_id(1) == 0)
    tl.store(result_ptr + query.to(tl.int64) * D + d, out.to(result_ptr.dtype.element_ty), mask=d < D)
