# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""How paged_decode cuts its work: both kernels derive the same split from the counts of tokens alone.

The tiles of all rows (sequence, KV head) form one line, which the programs of the grid share. Shapes: N tokens a tile.
"""

import triton
import triton.language as tl


@triton.jit
def counts_of(
    lengths,
    n_tokens,
    capacity,
    n_counts,
    rows_each,
    stride_lb,
    stride_lh,
    n_kv_heads,
    COUNTS: tl.constexpr,
    DEVICE_LENGTHS: tl.constexpr,
):
    """Return the counts of tokens of one store, one for ``rows_each`` rows in turn; a row is a sequence and KV head."""
    count = tl.arange(0, COUNTS)
    if DEVICE_LENGTHS:
        row = count * rows_each
        at = row // n_kv_heads * stride_lb + row % n_kv_heads * stride_lh
        n = tl.load(lengths + at, mask=count < n_counts, other=0).to(tl.int32)
        n = tl.minimum(tl.maximum(n, 0), capacity)
    else:
        n = tl.where(count < n_counts, n_tokens, 0)
    return n


@triton.jit
def share_of_work(n, n_counts, rows_each, n_programs, N: tl.constexpr, MIN_TILES: tl.constexpr):
    """Return, for every count of tokens, its tiles and where its rows' tiles end on the line of all; and the length of
    that line, and how many programs share it.

    Both kernels derive the split from the counts alone, so nothing of it passes through memory.
    """
    tiles = (n + N - 1) // N
    ends = tl.cumsum(tiles * rows_each, 0)
    total = tl.sum(tiles * rows_each, 0)
    used = tl.minimum(n_programs, (total + MIN_TILES - 1) // MIN_TILES)
    # One equal row a program beats an even split of all programs that leaves a piece of a second row to each.
    n_rows = n_counts * rows_each
    equal = tl.max(tiles, 0) * n_rows == total
    used = tl.where(equal & (used >= n_rows) & (used * 15 <= n_rows * 16), n_rows, used)
    return tiles, ends, total, used


@triton.jit
def value_at(values, count, COUNTS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, COUNTS) == count, values, 0), 0)


@triton.jit
def row_of(tile, tiles_of, ends, rows_each, COUNTS: tl.constexpr):
    """Return the row that holds a tile of the line."""
    count = tl.sum((ends <= tile).to(tl.int32), 0)
    n_tiles = value_at(tiles_of, count, COUNTS)
    return count * rows_each + (tile - value_at(ends, count, COUNTS) + n_tiles * rows_each) // n_tiles


@triton.jit
def begin_of(row, tiles_of, ends, rows_each, COUNTS: tl.constexpr):
    """Return a row's tiles and where they begin on the line."""
    count = row // rows_each
    n_tiles = value_at(tiles_of, count, COUNTS)
    return n_tiles, value_at(ends, count, COUNTS) - (count * rows_each + rows_each - row) * n_tiles
