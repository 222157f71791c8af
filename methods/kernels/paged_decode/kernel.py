# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Decode attention over pages in Triton: work cut evenly over a fixed grid, partial results merged by log-sum-exp.

Shapes: B sequences, Q query heads, H KV heads, G = Q / H, D head size, S slots (pages), P tokens a page, N tokens a
tile.
README.md has the mathematics, the layout and the limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvscope.methods.kernels.grid import launches_dependents, n_sms
from kvscope.methods.kernels.paged_decode.inputs import PagedKV, check_inputs, index_strides

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = 1.4426950408889634
_MIN_TILES = 4  # below this many tiles a program costs more than it hides
_MERGE_ROWS = 64
# What changes with steps, batches and pools that grow: a compilation for each divisibility would buy nothing.
_SPLIT_VARY = ["n_tokens", "capacity", "n_counts", "rows_each", "n_kv_heads", "stride_tb", "stride_th", "stride_ib",
               "stride_ih", "stride_lb", "stride_lh"]  # fmt: skip
_MERGE_VARY = ["n_kv_heads", *(f"{name}_{store}" for store in "ab" for name in
               ("n_tokens", "capacity", "n_counts", "rows_each", "stride_lb", "stride_lh", "programs"))]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Constants of the kernel; every choice gives the same result up to rounding.

    Attributes:
        tile_bytes: of K (and of V) read in one iteration; decides the tokens of a tile.
        programs_per_sm: size of the grid.
        num_warps, num_stages: as Triton means them.
    """

    tile_bytes: int = 16 * 1024
    programs_per_sm: int = 2
    num_warps: int = 4
    num_stages: int = 4


DEFAULT = Tuning()


@triton.jit
def _work(
    lengths,
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
    """Return, for every count of tokens, the count, its tiles and where its rows' tiles end on the line of all; and the
    length of that line, and how many programs share it.

    A row is a sequence and KV head; ``rows_each`` rows in turn have one count. Both kernels derive the split from this
    alone, so nothing of it passes through memory.
    """
    count = tl.arange(0, COUNTS)
    if DEVICE_LENGTHS:
        row = count * rows_each
        at = row // n_kv_heads * stride_lb + row % n_kv_heads * stride_lh
        n = tl.load(lengths + at, mask=count < n_counts, other=0).to(tl.int32)
        n = tl.minimum(tl.maximum(n, 0), capacity)
    else:
        n = tl.where(count < n_counts, n_tokens, 0)
    tiles = (n + N - 1) // N
    ends = tl.cumsum(tiles * rows_each, 0)
    total = tl.sum(tiles * rows_each, 0)
    used = tl.minimum(n_programs, (total + MIN_TILES - 1) // MIN_TILES)
    # One equal row a program beats an even split of all programs that leaves a piece of a second row to each.
    n_rows = n_counts * rows_each
    equal = tl.max(tiles, 0) * n_rows == total
    used = tl.where(equal & (used >= n_rows) & (used * 15 <= n_rows * 16), n_rows, used)
    return n, tiles, ends, total, used


@triton.jit
def _at(values, count, COUNTS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, COUNTS) == count, values, 0), 0)


@triton.jit
def _row_of(tile, tiles_of, ends, rows_each, COUNTS: tl.constexpr):
    """Return the row that holds a tile of the line."""
    count = tl.sum((ends <= tile).to(tl.int32), 0)
    n_tiles = _at(tiles_of, count, COUNTS)
    return count * rows_each + (tile - _at(ends, count, COUNTS) + n_tiles * rows_each) // n_tiles


@triton.jit
def _begin_of(row, tiles_of, ends, rows_each, COUNTS: tl.constexpr):
    """Return a row's tiles and where they begin on the line."""
    count = row // rows_each
    n_tiles = _at(tiles_of, count, COUNTS)
    return n_tiles, _at(ends, count, COUNTS) - (count * rows_each + rows_each - row) * n_tiles


@triton.jit(do_not_specialize=_SPLIT_VARY)
def _split_kernel(
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
    n_of, tiles_of, ends, total, used = _work(
        lengths_ptr,
        n_tokens,
        capacity,
        n_counts,
        rows_each,
        stride_lb,
        stride_lh,
        n_kv_heads,
        tl.num_programs(0),
        COUNTS,
        N,
        MIN_TILES,
        DEVICE_LENGTHS,
    )
    if DEPENDENT:
        gdc_launch_dependents()
    if program >= used:
        return
    begin = (program * total // used).to(tl.int32)
    end = ((program + 1) * total // used).to(tl.int32)
    first_row = _row_of(begin, tiles_of, ends, rows_each, COUNTS)
    last_row = _row_of(end - 1, tiles_of, ends, rows_each, COUNTS)

    g = tl.arange(0, G_PAD)
    d = tl.arange(0, D_PAD)
    t = tl.arange(0, N)
    for row in range(first_row, last_row + 1):
        n = _at(n_of, row // rows_each, COUNTS)
        n_tiles, row_begin = _begin_of(row, tiles_of, ends, rows_each, COUNTS)
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
        head = pages_ptr + h * (2 * P * D)

        top = tl.full([G_PAD], float("-inf"), tl.float32)
        weight_sum = tl.zeros([G_PAD], tl.float32)
        acc = tl.zeros([G_PAD, D_PAD], tl.float32)
        # Slots are read one tile ahead and carried: a load whose address waits for a load of its own iteration would
        # make the pipeline give half of its buffers to the slots.
        slot, offset = _locate(tile_begin, t, n, table, tokens, P, N, HAS_TABLE, HAS_TOKENS)
        for tile in range(tile_begin, tile_end):
            seen = tile * N + t < n
            at = slot * n_kv_heads * (2 * P * D) + offset * D
            keep = seen[:, None] & (d < D)[None, :]
            if (P % N == 0) and not HAS_TOKENS:
                base = head + at
                k = tl.load(base + (t * D)[:, None] + d[None, :], mask=keep, other=0.0)
                v = tl.load(base + P * D + (t * D)[:, None] + d[None, :], mask=keep, other=0.0)
            else:
                k = tl.load(head + at[:, None] + d[None, :], mask=keep, other=0.0)
                v = tl.load(head + P * D + at[:, None] + d[None, :], mask=keep, other=0.0)
            slot, offset = _locate(tile + 1, t, n, table, tokens, P, N, HAS_TABLE, HAS_TOKENS)

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

        safe_sum = tl.where(weight_sum > 0, weight_sum, 1.0)
        partial = (row + program) * G + g
        tl.store(lse_ptr + partial, top + tl.log2(safe_sum), mask=g < G)
        tl.store(
            out_ptr + partial[:, None] * D + d[None, :],
            acc / safe_sum[:, None],
            mask=(g < G)[:, None] & (d < D)[None, :],
        )


@triton.jit
def _locate(
    tile,
    t,
    n,
    table,
    tokens,
    P: tl.constexpr,
    N: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
):
    """Return the slot and the place in it: of a tile's first token where a tile lies in one page, else of each token.

    A tile past the end has slot 0: its address is never used.
    """
    zero = tl.full([], 0, tl.int64)  # offsets pass 2^31
    if HAS_TOKENS:
        token = tl.load(tokens + tile * N + t, mask=tile * N + t < n, other=0).to(tl.int64)
        page = token // P
        offset = token % P
        slot = page
        if HAS_TABLE:
            slot = tl.load(table + page, mask=tile * N + t < n, other=0).to(tl.int64)
    elif P % N == 0:
        page = tile * N // P
        offset = tile * N % P + zero
        slot = page + zero
        if HAS_TABLE:
            slot = tl.load(table + page, mask=tile * N < n, other=0).to(tl.int64)
    else:
        page = (tile * N + t) // P
        offset = (tile * N + t) % P + zero
        slot = page + zero
        if HAS_TABLE:
            slot = tl.load(table + page, mask=tile * N + t < n, other=0).to(tl.int64)
    return slot, offset


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
    _n, tiles_of, ends, total, used = _work(
        lengths_ptr,
        n_tokens,
        capacity,
        n_counts,
        rows_each,
        stride_lb,
        stride_lh,
        n_kv_heads,
        n_programs,
        COUNTS,
        N,
        MIN_TILES,
        DEVICE_LENGTHS,
    )
    n_tiles, row_begin = _begin_of(row, tiles_of, ends, rows_each, COUNTS)
    # Program p begins at tile floor(p * total / used); the last one that begins at or before a tile holds it.
    row_begin = row_begin.to(tl.int64)
    some = tl.maximum(total, 1)
    first = (((row_begin + 1) * used - 1) // some).to(tl.int32)
    last = (((row_begin + n_tiles) * used - 1) // some).to(tl.int32)
    return tl.where(n_tiles > 0, first, 1), tl.where(n_tiles > 0, last, 0)


@triton.jit
def _gather_partials(
    top,
    weight_sum,
    acc,
    row,
    head,
    first,
    last,
    out_ptr,
    lse_ptr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
):
    """Add one store's partial results of a row to a running softmax."""
    d = tl.arange(0, D_PAD)
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


@triton.jit(do_not_specialize=_MERGE_VARY)
def _merge_kernel(
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
    DEPENDENT: tl.constexpr,
):
    """Join the partial results of one query head over programs and stores.

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
    d = tl.arange(0, D_PAD)
    # A finite floor: where nothing was read at all, differences of -inf would be NaN.
    top = tl.full([], -1e30, tl.float32)
    weight_sum = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([D_PAD], tl.float32)
    top, weight_sum, acc = _gather_partials(
        top, weight_sum, acc, row, head, first_a, last_a, out_a, lse_a, G, D, D_PAD, MERGE_ROWS
    )
    if TWO_STORES:
        top, weight_sum, acc = _gather_partials(
            top, weight_sum, acc, row, head, first_b, last_b, out_b, lse_b, G, D, D_PAD, MERGE_ROWS
        )
    if HAS_SINK:
        sink = tl.load(sink_ptr + query % (n_kv_heads * G)).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        fade = tl.exp2(top - new_top)
        weight_sum = weight_sum * fade + tl.exp2(sink - new_top)
        acc = acc * fade
        top = new_top
    safe_sum = tl.where(weight_sum > 0, weight_sum, 1.0)
    lse = tl.where(weight_sum > 0, (top + tl.log2(safe_sum)) * LN2, float("-inf"))
    tl.store(result_lse_ptr + query, lse)
    tl.store(result_ptr + query.to(tl.int64) * D + d, (acc / safe_sum).to(result_ptr.dtype.element_ty), mask=d < D)


def paged_decode(
    q_BQ1D: torch.Tensor,
    stores: Sequence[PagedKV],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tuning: Tuning = DEFAULT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one query a sequence to the tokens of one store of pages or two.

    The grid depends on shapes alone. Tables, token lists, counts given as tensors and pages are read when the kernels
    run, so a CUDA graph that captured the call can be replayed after they were changed in place.

    Args:
        q_BQ1D: queries, rotation applied; last dimension contiguous.
        stores: disjoint sets of tokens; the softmax runs over their union.
        scale: factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap).
        sink_logits: [Q], one logit a head that takes mass and has no value.
        out_dtype: of the output; the queries' when None.

    Returns:
        Output [B, Q, 1, D] and natural log-sum-exp of the logits [B, Q] in fp32, sink logit included. Where nothing
        was read: 0 and -inf (or the sink logit).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_inputs(q_BQ1D, stores)
    if q_BQ1D.stride(3) != 1:
        q_BQ1D = q_BQ1D.contiguous()
    B, Q, _, D = q_BQ1D.shape
    H = stores[0].pages.shape[1]
    G = Q // H
    if sink_logits is not None and (sink_logits.shape != (Q,) or sink_logits.device != q_BQ1D.device):
        raise ValueError(f"sink_logits must be [{Q}] on {q_BQ1D.device}, got {tuple(sink_logits.shape)}")
    D_PAD = max(16, triton.next_power_of_2(D))
    dependent = launches_dependents(q_BQ1D.device)
    common = {
        "G": G,
        "D": D,
        "D_PAD": D_PAD,
        "MIN_TILES": _MIN_TILES,
        "DEPENDENT": dependent,
        **({"launch_pdl": True} if dependent else {}),
    }
    n_programs = tuning.programs_per_sm * n_sms(q_BQ1D.device)
    device = q_BQ1D.device
    parts = []
    for store in stores:
        tile_tokens = tile_size(store, tuning)
        # No more programs than the capacity could ever keep busy: short contexts launch small grids.
        most_tiles = B * H * -(-store.capacity_tokens // tile_tokens)
        programs = max(1, min(n_programs, -(-most_tiles // _MIN_TILES)))
        n_partials = (B * H + programs) * G
        out = torch.empty((n_partials, D), dtype=torch.float32, device=device)
        lse = torch.empty((n_partials,), dtype=torch.float32, device=device)
        lengths = _lengths_of(store, q_BQ1D)
        table = q_BQ1D if store.page_table is None else store.page_table
        tokens = q_BQ1D if store.tokens is None else store.tokens
        _split_kernel[(programs,)](
            q_BQ1D,
            store.pages,
            table,
            tokens,
            lengths.pointer,
            out,
            lse,
            lengths.n_tokens,
            store.capacity_tokens,
            scale if softcap is not None else scale * _LOG2E,
            1.0 if softcap is None else softcap,
            lengths.n_counts,
            lengths.rows_each,
            H,
            q_BQ1D.stride(0),
            q_BQ1D.stride(1),
            *((0, 0) if store.page_table is None else index_strides(store.page_table)),
            *((0, 0) if store.tokens is None else index_strides(store.tokens)),
            *lengths.strides,
            G_PAD=max(16, triton.next_power_of_2(G)),
            P=store.pages.shape[3],
            N=tile_tokens,
            COUNTS=lengths.padded,
            HAS_TABLE=store.page_table is not None,
            HAS_TOKENS=store.tokens is not None,
            HAS_SOFTCAP=softcap is not None,
            DEVICE_LENGTHS=lengths.on_device,
            PRECISION="ieee",
            num_warps=tuning.num_warps,
            num_stages=tuning.num_stages,
            **common,
        )
        parts.append((store, lengths, out, lse, programs, tile_tokens))
    result = torch.empty((B, Q, 1, D), dtype=out_dtype or q_BQ1D.dtype, device=device)
    result_lse = torch.empty((B, Q), dtype=torch.float32, device=device)
    merged = [
        (
            out,
            lse,
            lengths.pointer,
            lengths.n_tokens,
            store.capacity_tokens,
            lengths.n_counts,
            lengths.rows_each,
            *lengths.strides,
            programs,
        )
        for store, lengths, out, lse, programs, _ in parts
    ]
    # As many as an even split leaves of a row: more would be masked out, fewer take a second round.
    most_programs = max(programs for *_, programs, _ in parts)
    merge_rows = min(_MERGE_ROWS, triton.next_power_of_2(-(-most_programs // (B * H)) + 2))
    _merge_kernel[(B * Q,)](
        result,
        result_lse,
        result if sink_logits is None else sink_logits,
        *merged[0],
        *merged[-1],
        H,
        N_A=parts[0][5],
        N_B=parts[-1][5],
        COUNTS_A=parts[0][1].padded,
        COUNTS_B=parts[-1][1].padded,
        DEVICE_LENGTHS_A=parts[0][1].on_device,
        DEVICE_LENGTHS_B=parts[-1][1].on_device,
        TWO_STORES=len(parts) == 2,
        HAS_SINK=sink_logits is not None,
        MERGE_ROWS=merge_rows,
        num_warps=4 if merge_rows > 8 else 1,
        **common,
    )
    return result, result_lse


def tile_size(store: PagedKV, tuning: Tuning = DEFAULT) -> int:
    """Return the tokens of a tile: a power of two, 16 or more, of about ``tile_bytes`` of K."""
    D, itemsize = store.pages.shape[4], store.pages.element_size()
    most: int = max(16, tuning.tile_bytes // (triton.next_power_of_2(D) * itemsize))
    return min(128, 1 << (most.bit_length() - 1))


@dataclass(frozen=True)
class _Lengths:
    """Counts of tokens as the kernels take them: ``n_counts`` of them, each for ``rows_each`` rows in turn."""

    pointer: torch.Tensor
    n_tokens: int
    strides: tuple[int, int]
    on_device: bool
    n_counts: int
    rows_each: int

    @property
    def padded(self) -> int:
        """A power of two: what is past ``n_counts`` has no tokens."""
        size: int = max(2, triton.next_power_of_2(self.n_counts))
        return size


def _lengths_of(store: PagedKV, q_BQ1D: torch.Tensor) -> _Lengths:
    B, H = q_BQ1D.shape[0], store.pages.shape[1]
    if isinstance(store.n_tokens, int):
        return _Lengths(q_BQ1D, store.n_tokens, (0, 0), on_device=False, n_counts=1, rows_each=B * H)
    strides = index_strides(store.n_tokens)
    rows_each = 1 if strides[1] else H if strides[0] else B * H
    return _Lengths(store.n_tokens, 0, strides, on_device=True, n_counts=B * H // rows_each, rows_each=rows_each)
