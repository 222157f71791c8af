"""Block scores in plain torch: the oracle of the kernels.

Shapes: H KV heads, G query heads a KV head, N blocks, X vectors a summary, S slots (pages), P tokens a page, D head
size.
"""

import torch


def quest_reference(
    q_HGD: torch.Tensor, bounds_NH2D: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Return max over G of sum_d max(q_d min_d, q_d max_d), [H, 1, N]."""
    q_HG1D = q_HGD.to(dtype)[:, :, None]
    low_H1ND, high_H1ND = (bounds_NH2D[:, :, i].to(dtype).transpose(0, 1)[:, None] for i in (0, 1))
    return torch.maximum(q_HG1D * low_H1ND, q_HG1D * high_H1ND).sum(-1).amax(1, keepdim=True)


def moba_reference(
    q_HGD: torch.Tensor, means_NH1D: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Return q . mean, [H, G, N]."""
    return torch.einsum("hgd,nhd->hgn", q_HGD.to(dtype), means_NH1D[:, :, 0].to(dtype))


def msa_reference(
    q_HGD: torch.Tensor,
    pages: torch.Tensor,
    *,
    n_blocks: int,
    block_tokens: int,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return the best product of a block's keys with the mean query of the group, [H, 1, N]. Pages [S, H, 2, P, D]."""
    k_HTD = pages[:, :, 0].transpose(0, 1).flatten(1, 2)[:, : n_blocks * block_tokens].to(dtype)
    logits_HT = torch.einsum("hd,htd->ht", q_HGD.to(dtype).mean(1), k_HTD)
    return logits_HT.view(-1, 1, n_blocks, block_tokens).amax(-1)
