"""Attention over chosen blocks: gather them from the pages into a small tensor, then attend to that.

Shapes: H KV heads, G query heads a KV head, D head size, S slots (pages), P tokens a page, B blocks, T tokens.
"""

from math import gcd
from typing import NamedTuple

import torch

from kvscope.methods.attention import Partial
from kvscope.methods.flash import attention_with_lse, flash_runs_on
from kvscope.methods.kernels.paged_decode.inputs import PagedKV


class Chosen(NamedTuple):
    """Blocks each KV head reads, the current one last.

    Attributes:
        blocks_HB: block numbers; where ``keep_HB`` is False, the head's first one again, so that nothing else is read.
        keep_HB: which entries count, where heads differ in how many blocks they read; None: all.
    """

    blocks_HB: torch.Tensor
    keep_HB: torch.Tensor | None


def choose(scores_HGN: torch.Tensor, *, n_chosen: int, current: int, n_kv_heads: int) -> Chosen:
    """Take the best ``n_chosen`` blocks of each row of scores, and the current block.

    Args:
        scores_HGN: of the blocks before the current one. Size 1 in H: one choice for all heads. Size over 1 in G: one
            choice a query head, and the KV head reads the union of its group's.
    """
    best_HGB = scores_HGN.topk(n_chosen, dim=-1, sorted=False).indices
    if best_HGB.shape[1] == 1:
        blocks_HB = best_HGB[:, 0].expand(n_kv_heads, n_chosen)
        return Chosen(torch.cat([blocks_HB, blocks_HB.new_full((n_kv_heads, 1), current)], 1), None)
    chosen_HN = torch.zeros_like(scores_HGN[:, 0], dtype=torch.bool).scatter_(1, best_HGB.flatten(1), True)
    n_most = int(chosen_HN.sum(1).max())
    keep_HB, blocks_HB = chosen_HN.to(torch.uint8).topk(n_most, dim=1)
    keep_HB = torch.cat([keep_HB.bool(), chosen_HN.new_ones((n_kv_heads, 1))], 1)
    blocks_HB = torch.cat([blocks_HB, blocks_HB.new_full((n_kv_heads, 1), current)], 1)
    return Chosen(torch.where(keep_HB, blocks_HB, blocks_HB[:, :1]), keep_HB)


def chosen_store(pages: torch.Tensor, chosen: Chosen, *, block_tokens: int, tail_tokens: int) -> PagedKV:
    """Return each head's blocks as the kernel reads them in place: by a page table, or token by token.

    Args:
        pages: [S, H, 2, P, D].
        chosen: the last entry is the current block, partly filled; what does not count in ``keep_HB`` is not listed.
        tail_tokens: tokens of the current block.
    """
    H, P = pages.shape[1], pages.shape[3]
    blocks_HB, n_tokens = chosen.blocks_HB, (chosen.blocks_HB.shape[1] - 1) * block_tokens + tail_tokens
    counts_1H: int | torch.Tensor = n_tokens
    if chosen.keep_HB is not None:
        # What counts comes first, in order, so that the current block ends it.
        order_HB = torch.argsort((~chosen.keep_HB).to(torch.uint8), dim=1, stable=True)
        blocks_HB = blocks_HB.gather(1, order_HB)
        counts_1H = ((chosen.keep_HB.sum(1) - 1) * block_tokens + tail_tokens).int()[None]
    if block_tokens % P == 0:
        per_block = torch.arange(block_tokens // P, device=pages.device)
        table_HT = (blocks_HB[:, :, None] * (block_tokens // P) + per_block).view(1, H, -1)
        # The current block may begin no more pages than its tokens need: the rest are not in the pool.
        table_HT = table_HT.clamp_max(pages.shape[0] - 1)
        return PagedKV(pages=pages, n_tokens=counts_1H, page_table=table_HT)
    token = torch.arange(block_tokens, device=pages.device)
    tokens_HT = (blocks_HB[:, :, None] * block_tokens + token).view(1, H, -1)
    return PagedKV(pages=pages, n_tokens=counts_1H, tokens=tokens_HT)


def gather_blocks(
    pages: torch.Tensor, blocks_HB: torch.Tensor, *, block_tokens: int, tail_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy each head's blocks out of its pages.

    Args:
        pages: [S, H, 2, P, D].
        blocks_HB: block numbers, the same number for each head; the last may be partly filled.
        tail_tokens: tokens of the last block.

    Returns:
        K and V, [H, T, D] each, T = (B - 1) * block_tokens + tail_tokens.
    """
    H, P = pages.shape[1], pages.shape[3]
    # A run of U tokens lies together in a page; U divides the block and the page, so a block of any size is whole runs.
    unit = gcd(block_tokens, P)
    n_runs = P // unit
    runs = pages.view(*pages.shape[:3], n_runs, unit, pages.shape[4])
    run_of_block = torch.arange(block_tokens // unit, device=pages.device)
    run_HR = (blocks_HB[:, :, None] * (block_tokens // unit) + run_of_block).flatten(1)
    n_tokens = (blocks_HB.shape[1] - 1) * block_tokens + tail_tokens
    run_HR = run_HR[:, : -(-n_tokens // unit)]
    slot_HR, run_HR = run_HR // n_runs, run_HR % n_runs
    head_H1 = torch.arange(H, device=pages.device)[:, None]
    k_HTD, v_HTD = (runs[:, :, index][slot_HR, head_H1, run_HR].flatten(1, 2)[:, :n_tokens] for index in (0, 1))
    return k_HTD, v_HTD


def token_partial(
    q_HGD: torch.Tensor,
    k_HTD: torch.Tensor,
    v_HTD: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    keep_HT: torch.Tensor | None = None,
) -> Partial:
    """Attend each head's queries to its own tokens.

    Args:
        keep_HT: tokens that count; every head keeps one at least. None: all.
    """
    q_BHGD = q_HGD[None]
    if q_HGD.dtype != torch.float32 and softcap is None and keep_HT is None and flash_runs_on(q_BHGD):
        out, lse = attention_with_lse(q_BHGD, k_HTD[None], v_HTD[None], causal=False, scale=scale)
        return Partial(out[0], lse[0])
    logits_HGT = cap(torch.bmm(q_HGD.float(), k_HTD.float().transpose(1, 2)) * scale, softcap)
    if keep_HT is not None:
        logits_HGT = logits_HGT.masked_fill(~keep_HT[:, None], -torch.inf)
    lse_HG = torch.logsumexp(logits_HGT, -1)
    # Not exp(logits - lse): the rounding of lse would stay in every weight.
    return Partial(torch.bmm(torch.softmax(logits_HGT, -1), v_HTD.float()), lse_HG)


def cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Return ``softcap * tanh(logits / softcap)``, or the logits where there is no cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def page_logits(q_HGD: torch.Tensor, pages: torch.Tensor, *, n_tokens: int) -> torch.Tensor:
    """Return q . k in fp32, [H, G, n_tokens], for the first tokens of pages [S, H, 2, P, D], with no copy of the keys.

    Low-precision keys are not copied on a GPU: the product accumulates and is returned in fp32. On a CPU they are.
    """
    P, D = pages.shape[3:]
    pages = pages[: -(-n_tokens // P)]
    S, H, G = pages.shape[0], *q_HGD.shape[:2]
    k_NDP = pages.view(S * H, 2, P, D)[:, 0].transpose(1, 2)
    q_NGD = q_HGD.expand(S, H, G, D).reshape(S * H, G, D)
    return scores(q_NGD, k_NDP).view(S, H, G, P).permute(1, 2, 0, 3).flatten(2)[:, :, :n_tokens]


def scores(q_NGD: torch.Tensor, k_NDT: torch.Tensor) -> torch.Tensor:
    """Return the batched product [N, G, T] in fp32: rounded to the model's dtype, unlike blocks would tie."""
    if k_NDT.dtype == torch.float32:
        return torch.bmm(q_NGD.float(), k_NDT)
    if k_NDT.device.type == "cuda":
        return torch.bmm(q_NGD.to(k_NDT.dtype), k_NDT, out_dtype=torch.float32)
    return torch.bmm(q_NGD.float(), k_NDT.float())
