"""The indexer's score of every chunk in plain torch: the oracle of the kernel.

Shapes: L indexed layers, X queries, I indexer heads, E key size, n chunks.
"""

import torch


def indexer_score_reference(
    q_LXIE: torch.Tensor,
    weight_LXI: torch.Tensor,
    bias_L: torch.Tensor,
    keys_LnE: torch.Tensor,
    scale_Ln: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return bias + scale_n * sum_i w_i relu(q_i . k_n), [L, X, n] in ``dtype``. Arguments as ``indexer_score``."""
    products_LXIn = torch.einsum("lxie,lne->lxin", q_LXIE.to(dtype), keys_LnE.to(dtype))
    sums_LXn = torch.einsum("lxi,lxin->lxn", weight_LXI.to(dtype), torch.relu(products_LXIn))
    return bias_L.to(dtype)[:, None, None] + scale_Ln.to(dtype)[:, None] * sums_LXn
