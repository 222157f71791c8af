# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Block scores in Triton, over the layouts in which the methods keep their metadata.

Shapes: H KV heads, G query heads a KV head, N blocks, X vectors a summary, S slots (pages), P tokens a page, D head
size, T tokens of a tile. README.md has the mathematics.
"""

import torch
import triton
import triton.language as tl

from kvscope.methods.kernels.grid import launches_beside, n_sms

_TILE_BLOCKS = 64
_TILE_BYTES = 32 * 1024
_PROGRAMS_PER_SM = 2


@triton.jit
def _summary_kernel(
    q_ptr,
    summaries_ptr,
    out_ptr,
    n_blocks,
    n_kv_heads,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """Score a tile of blocks for one KV head: by bounds (best of the group) or by means (each head)."""
    h = tl.program_id(1)
    g = tl.arange(0, G_PAD)
    d = tl.arange(0, D_PAD)
    n = tl.program_id(0) * N + tl.arange(0, N)
    inside = (n < n_blocks)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + (h * G + g)[:, None] * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    if BOUNDS:
        at = summaries_ptr + (n.to(tl.int64) * n_kv_heads + h)[:, None] * (2 * D) + d[None, :]
        low = tl.load(at, mask=inside, other=0.0)
        high = tl.load(at + D, mask=inside, other=0.0)
        scores = tl.dot(tl.maximum(q, 0.0).to(q.dtype), tl.trans(high), input_precision="ieee", out_dtype=tl.float32)
        scores = tl.dot(tl.minimum(q, 0.0).to(q.dtype), tl.trans(low), scores, input_precision="ieee")
        scores = tl.where((g < G)[:, None], scores, float("-inf"))
        tl.store(out_ptr + h * n_blocks + n, tl.max(scores, 0), mask=n < n_blocks)
    else:
        at = summaries_ptr + (n.to(tl.int64) * n_kv_heads + h)[:, None] * D + d[None, :]
        mean = tl.load(at, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(mean), input_precision="ieee", out_dtype=tl.float32)
        tl.store(
            out_ptr + (h * G + g)[:, None] * n_blocks + n[None, :],
            scores,
            mask=(g < G)[:, None] & (n < n_blocks)[None, :],
        )


@triton.jit
def _best_key_kernel(
    q_ptr,
    pages_ptr,
    out_ptr,
    n_blocks,
    n_kv_heads,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Score a run of blocks for one KV head by their best key. A tile holds whole blocks, or a block whole tiles."""
    TILES: tl.constexpr = (BLOCK + T - 1) // T
    PER_TILE: tl.constexpr = (T + BLOCK - 1) // BLOCK
    h = tl.program_id(1)
    g = tl.arange(0, G_PAD)
    d = tl.arange(0, D_PAD)
    t = tl.arange(0, T)
    q = tl.load(q_ptr + (h * G + g)[:, None] * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    n_tokens = n_blocks * BLOCK
    n_groups = (n_blocks + PER_TILE - 1) // PER_TILE
    program = tl.program_id(0).to(tl.int64)
    begin = (program * n_groups // tl.num_programs(0)).to(tl.int32) * TILES
    end = ((program + 1) * n_groups // tl.num_programs(0)).to(tl.int32) * TILES
    best = tl.full([], float("-inf"), tl.float32)
    for tile in range(begin, end):
        token = tile * T + t
        row = (token // P).to(tl.int64) * n_kv_heads + h
        at = row * (2 * P * D) + (token % P) * D
        k = tl.load(
            pages_ptr + at[:, None] + d[None, :], mask=(token < n_tokens)[:, None] & (d < D)[None, :], other=0.0
        )
        # The group's mean query: the mean of its products, which rounds nothing. Rows of padding add zero.
        logits = tl.sum(tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=tl.float32), 0) / G
        if TILES > 1:
            found = tl.max(logits, 0)
            best = tl.where(tile % TILES == 0, found, tl.maximum(best, found))
            tl.store(out_ptr + h * n_blocks + tile // TILES, best, mask=tile % TILES == TILES - 1)
        else:
            found = tl.max(tl.reshape(logits, (PER_TILE, BLOCK)), 1)
            n = tile * PER_TILE + tl.arange(0, PER_TILE)
            tl.store(out_ptr + h * n_blocks + n, found, mask=n < n_blocks)


def unsupported_block_scores(q_HGD: torch.Tensor, *, block_tokens: int | None = None) -> list[str]:
    """Return every reason why the kernels do not take these queries (and this block size, for MSA)."""
    D = q_HGD.shape[2]
    reasons = []
    if D % 16 or D > 256:
        reasons.append(f"the head size is {D}, the kernel takes multiples of 16 up to 256")
    if q_HGD.shape[1] > 64:
        reasons.append(f"{q_HGD.shape[1]} query heads share a KV head, the kernel takes 64")
    if block_tokens is not None and block_tokens & (block_tokens - 1):
        reasons.append(f"blocks have {block_tokens} tokens, the kernel takes powers of two")
    return reasons


def quest_scores(q_HGD: torch.Tensor, bounds_NH2D: torch.Tensor) -> torch.Tensor:
    """Return an upper bound of the logits of each page, the best of each group, [H, 1, N] in fp32.

    Args:
        q_HGD: rotation applied.
        bounds_NH2D: least and greatest key in each dimension, in the dtype of the queries.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    return _by_summary(q_HGD, bounds_NH2D, n_vectors=2)


def moba_scores(q_HGD: torch.Tensor, means_NH1D: torch.Tensor) -> torch.Tensor:
    """Return the product of each query head with each block's mean key, [H, G, N] in fp32. See ``quest_scores``."""
    return _by_summary(q_HGD, means_NH1D, n_vectors=1)


@launches_beside(0)
def _by_summary(q_HGD: torch.Tensor, summaries: torch.Tensor, *, n_vectors: int) -> torch.Tensor:
    H, G, D = q_HGD.shape
    N = summaries.shape[0]
    _check(q_HGD, summaries, (N, H, n_vectors, D))
    out = torch.empty((H, 1 if n_vectors == 2 else G, N), dtype=torch.float32, device=q_HGD.device)
    if N:
        _summary_kernel[(triton.cdiv(N, _TILE_BLOCKS), H)](
            q_HGD.contiguous(), summaries, out, N, H, N=_TILE_BLOCKS, BOUNDS=n_vectors == 2, **_sizes(G, D)
        )
    return out


@launches_beside(0)
def msa_scores(q_HGD: torch.Tensor, pages: torch.Tensor, *, n_blocks: int, block_tokens: int) -> torch.Tensor:
    """Return the best product of each block's keys with the mean query of the group, [H, 1, N] in fp32.

    Args:
        q_HGD: rotation applied.
        pages: [S, H, 2, P, D], in the dtype of the queries; blocks lie in order from the first page on.
        n_blocks: whole blocks to score.
        block_tokens: a power of two.

    Raises:
        ValueError: shapes, dtypes or a block size that do not fit.
    """
    H, G, D = q_HGD.shape
    S, P = pages.shape[0], pages.shape[3]
    _check(q_HGD, pages, (S, H, 2, P, D), block_tokens=block_tokens)
    if n_blocks * block_tokens > S * P:
        raise ValueError(f"{n_blocks} blocks of {block_tokens} tokens are not in {S} pages of {P}")
    out = torch.empty((H, 1, n_blocks), dtype=torch.float32, device=q_HGD.device)
    if not n_blocks:
        return out
    sizes = _sizes(G, D)
    most = _TILE_BYTES // (sizes["D_PAD"] * pages.element_size())
    T = min(128, max(16, 1 << (most.bit_length() - 1)))
    n_groups = triton.cdiv(n_blocks, max(1, T // block_tokens))
    programs = max(1, min(n_groups, _PROGRAMS_PER_SM * n_sms(q_HGD.device) // H))
    _best_key_kernel[(programs, H)](
        q_HGD.contiguous(), pages, out, n_blocks, H, P=P, T=T, BLOCK=block_tokens, num_stages=4, **sizes
    )
    return out


def _sizes(G: int, D: int) -> dict[str, int]:
    return {
        "G": G,
        "G_PAD": max(16, triton.next_power_of_2(G)),
        "D": D,
        "D_PAD": max(16, triton.next_power_of_2(D)),
    }


def _check(
    q_HGD: torch.Tensor, stored: torch.Tensor, shape: tuple[int, ...], *, block_tokens: int | None = None
) -> None:
    reasons = unsupported_block_scores(q_HGD, block_tokens=block_tokens)
    if tuple(stored.shape) != shape or not stored.is_contiguous():
        reasons.append(f"expected a contiguous tensor of shape {shape}, got {tuple(stored.shape)}")
    if stored.dtype != q_HGD.dtype or stored.device != q_HGD.device:
        reasons.append(f"queries are {q_HGD.dtype} on {q_HGD.device}, stored {stored.dtype} on {stored.device}")
    if reasons:
        raise ValueError("; ".join(reasons))
