"""The native indexer's choice in plain torch: the oracle of the kernels, and what runs on a CPU.

Shapes: I indexer heads, E key size, n entries that there is room for, k entries chosen.
"""

import torch


def index_scores_reference(
    q_IE: torch.Tensor, weight_I: torch.Tensor, keys_nE: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Return sum_i w_i relu(q_i . k_n) of every entry, [n] in ``dtype``."""
    products_In = torch.relu(q_IE.to(dtype) @ keys_nE.to(dtype).T)
    return (products_In * weight_I.to(dtype)[:, None]).sum(0)


def index_topk_reference(
    q_IE: torch.Tensor,
    weight_I: torch.Tensor,
    keys_nE: torch.Tensor,
    count_1: torch.Tensor,
    *,
    k: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return what ``index_topk`` does, by a stable sort; nothing waits for the device. Arguments as there.

    Args:
        dtype: of the scores.
    """
    n = len(keys_nE)
    entry_n = torch.arange(n, device=keys_nE.device)
    scores_n = index_scores_reference(q_IE, weight_I, keys_nE, dtype=dtype)
    scores_n = scores_n.masked_fill(entry_n >= count_1, float("-inf"))
    best = scores_n.argsort(descending=True, stable=True)[:k]
    chosen = torch.full((k,), n, dtype=torch.long, device=keys_nE.device)
    chosen[: len(best)] = best.masked_fill(best >= count_1, n)
    chosen = chosen.sort().values
    return chosen.masked_fill(chosen == n, -1).int()
