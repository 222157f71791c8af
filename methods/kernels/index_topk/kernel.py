# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The native indexer's scores and their top-k in Triton: scores, a radix select of the k-th best, a list in order.

Shapes: I indexer heads, E key size, n entries that there is room for, M entries a tile, k entries chosen.
README.md has the mathematics and the steps.
"""

import torch
import triton
import triton.language as tl

from kvscope.methods.kernels.grid import launches_beside, n_sms

_TILE_BYTES = 16 * 1024
_PROGRAMS_PER_SM = 2
_BLOCK = 2048
_MOST_BLOCKS = 4096
BINS = tl.constexpr(2048)
LEVELS = 3


@triton.jit
def _score_kernel(
    q_ptr,
    weight_ptr,
    keys_ptr,
    count_ptr,
    scores_ptr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    M: tl.constexpr,
):
    """Score a run of tiles of the entries that count; what lies behind them is neither read nor written."""
    head = tl.arange(0, HEADS_PAD)
    e = tl.arange(0, E_PAD)
    m = tl.arange(0, M)
    q = tl.load(q_ptr + head[:, None] * E + e[None, :], mask=(head < HEADS)[:, None] & (e < E)[None, :], other=0.0)
    q = tl.trans(q)
    weight = tl.load(weight_ptr + head, mask=head < HEADS, other=0.0)
    count = tl.load(count_ptr).to(tl.int32)
    n_tiles = (count + M - 1) // M
    program = tl.program_id(0).to(tl.int64)
    begin = (program * n_tiles // tl.num_programs(0)).to(tl.int32)
    end = ((program + 1) * n_tiles // tl.num_programs(0)).to(tl.int32)
    for tile in range(begin, end):
        entry = tile * M + m
        k = tl.load(
            keys_ptr + entry.to(tl.int64)[:, None] * E + e[None, :],
            mask=(entry < count)[:, None] & (e < E)[None, :],
            other=0.0,
        )
        products = tl.dot(k, q, out_dtype=tl.float32, input_precision="ieee")
        # On a GPU a maximum gives the number where one of the two is NaN, unless it is told.
        matched = tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL)
        total = tl.sum(matched * weight[None, :], 1)
        tl.store(scores_ptr + entry, total, mask=entry < count)


@triton.jit
def _ordered(scores_ptr, at, inside):
    """Return scores as unsigned numbers of the same order; the two zeros are one, and NaN is the highest."""
    score = tl.load(scores_ptr + at, mask=inside, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    ordered = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return tl.where(score != score, 0xFFFFFFFF, ordered)


@triton.jit
def _digit(counts_ptr, wanted):
    """Return the bin that the ``wanted``-th largest lies in, and which it is among those of that bin."""
    at = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + at)
    from_top = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    digit = tl.sum((from_top >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(at > digit, counts, 0), 0)
    return digit, wanted - above


@triton.jit
def _histogram_kernel(scores_ptr, count_ptr, counts_ptr, k, LEVEL: tl.constexpr, BLOCK: tl.constexpr):
    """Count the next digit (11, 11 and 10 bits) of the scores whose digits before are those of the k-th largest."""
    count = tl.load(count_ptr).to(tl.int32)
    if tl.program_id(0) * BLOCK >= count:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    ordered = _ordered(scores_ptr, at, inside)
    high = (ordered >> 21).to(tl.int32)
    digit = high
    if LEVEL > 0:
        first, left = _digit(counts_ptr, tl.minimum(k, count))
        inside = inside & (high == first)
        digit = ((ordered >> 10) & 2047).to(tl.int32)
        if LEVEL > 1:
            second, _left = _digit(counts_ptr + BINS, left)
            inside = inside & (digit == second)
            digit = (ordered & 1023).to(tl.int32)
    found = tl.histogram(digit, BINS, mask=inside)
    tl.atomic_add(counts_ptr + LEVEL * BINS + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@triton.jit
def _marked(scores_ptr, count_ptr, counts_ptr, k, BLOCK: tl.constexpr):
    """Return which entries of a block score higher than the k-th best, which as high, and how many of those to take."""
    count = tl.load(count_ptr).to(tl.int32)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    first, left = _digit(counts_ptr, tl.minimum(k, count))
    second, left = _digit(counts_ptr + BINS, left)
    third, left = _digit(counts_ptr + 2 * BINS, left)
    kth = (first.to(tl.uint32) << 21) | (second.to(tl.uint32) << 10) | third.to(tl.uint32)
    ordered = _ordered(scores_ptr, at, inside)
    return inside & (ordered > kth), inside & (ordered == kth), left


@triton.jit
def _count_kernel(scores_ptr, count_ptr, counts_ptr, block_counts_ptr, k, BLOCK: tl.constexpr):
    """Count a block's higher and equal scores."""
    higher, equal, _left = _marked(scores_ptr, count_ptr, counts_ptr, k, BLOCK)
    block = tl.program_id(0)
    tl.store(block_counts_ptr + 2 * block, tl.sum(higher.to(tl.int32), 0))
    tl.store(block_counts_ptr + 2 * block + 1, tl.sum(equal.to(tl.int32), 0))


@triton.jit
def _list_kernel(
    scores_ptr,
    count_ptr,
    counts_ptr,
    block_counts_ptr,
    chosen_ptr,
    k,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write a block's chosen entries behind those of the blocks before it; of equal scores the first are taken."""
    higher, equal, left = _marked(scores_ptr, count_ptr, counts_ptr, k, BLOCK)
    block = tl.program_id(0)
    other = tl.arange(0, BLOCKS)
    before = other < block
    higher_before = tl.sum(tl.load(block_counts_ptr + 2 * other, mask=before, other=0), 0)
    equal_before = tl.sum(tl.load(block_counts_ptr + 2 * other + 1, mask=before, other=0), 0)
    n_higher = higher_before + tl.cumsum(higher.to(tl.int32), 0) - higher.to(tl.int32)
    n_equal = equal_before + tl.cumsum(equal.to(tl.int32), 0) - equal.to(tl.int32)
    chosen = higher | (equal & (n_equal < left))
    entry = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(chosen_ptr + n_higher + tl.minimum(n_equal, left), entry, mask=chosen)


@launches_beside(2)
def index_topk(
    q_IE: torch.Tensor, weight_I: torch.Tensor, keys_nE: torch.Tensor, count_1: torch.Tensor, *, k: int
) -> torch.Tensor:
    """Return the ``k`` entries with the highest sum_i w_i relu(q_i . k_n) among the first ``count_1``.

    Nothing waits for the device, and the grid depends on n alone: the call can stand in a CUDA graph.

    Args:
        q_IE: queries of one token, in the dtype of the keys.
        weight_I: head weights in fp32, scales of the model folded in.
        keys_nE: contiguous.
        count_1: entries that count, int32 or int64 [1] on the device; at most n.

    Returns:
        int32 [k], ascending; -1 behind the last where fewer than k count. Of equal scores the first entries are taken,
        and NaN counts as the highest.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit, or more than 8,388,608 entries.
    """
    (n_heads, E), n = q_IE.shape, keys_nE.shape[0]
    if keys_nE.shape[1] != E or weight_I.shape != (n_heads,) or count_1.shape != (1,):
        raise ValueError(
            f"queries {tuple(q_IE.shape)} do not fit weights {tuple(weight_I.shape)}, keys {tuple(keys_nE.shape)} and "
            f"a count {tuple(count_1.shape)}"
        )
    if q_IE.dtype != keys_nE.dtype or weight_I.dtype != torch.float32:
        raise ValueError(
            f"queries and keys must be of one dtype, weights float32: got {q_IE.dtype}, {keys_nE.dtype} and "
            f"{weight_I.dtype}"
        )
    if E % 16 or E > 256 or n_heads > 256 or k < 1:
        raise ValueError(
            f"key size must be a multiple of 16 up to 256, heads at most 256 and k at least 1, got {E}, {n_heads}, {k}"
        )
    if not keys_nE.is_contiguous():
        raise ValueError("keys must be contiguous")
    blocks = -(-n // _BLOCK)
    if blocks > _MOST_BLOCKS:
        raise ValueError(f"at most {_MOST_BLOCKS * _BLOCK:,} entries can be chosen from, got {n:,}")
    device = keys_nE.device
    scores_n = torch.empty(n, dtype=torch.float32, device=device)
    counts = torch.zeros(LEVELS * BINS.value, dtype=torch.int32, device=device)
    block_counts = torch.empty(2 * blocks, dtype=torch.int32, device=device)
    chosen_k = torch.full((k,), -1, dtype=torch.int32, device=device)
    if n == 0:
        return chosen_k
    e_pad = max(32, triton.next_power_of_2(E))
    tile = max(16, _TILE_BYTES // (e_pad * keys_nE.element_size()))
    _score_kernel[(max(1, min(-(-n // tile), _PROGRAMS_PER_SM * n_sms(device))),)](
        q_IE.contiguous(), weight_I.contiguous(), keys_nE, count_1, scores_n, HEADS=n_heads,
        HEADS_PAD=max(16, triton.next_power_of_2(n_heads)), E=E, E_PAD=e_pad, M=tile, num_warps=4, num_stages=4,
    )  # fmt: skip
    for level in range(LEVELS):
        _histogram_kernel[(blocks,)](scores_n, count_1, counts, k, LEVEL=level, BLOCK=_BLOCK)
    _count_kernel[(blocks,)](scores_n, count_1, counts, block_counts, k, BLOCK=_BLOCK)
    _list_kernel[(blocks,)](
        scores_n, count_1, counts, block_counts, chosen_k, k, BLOCK=_BLOCK,
        BLOCKS=max(2, triton.next_power_of_2(blocks)),
    )  # fmt: skip
    return chosen_k
