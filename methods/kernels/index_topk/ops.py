"""The native indexer's choice wherever its tensors are: the kernels where they run, else the reference."""

import torch

from kvscope.methods.kernels.dispatch import unsupported_index_topk
from kvscope.methods.kernels.index_topk.reference import index_topk_reference


def index_topk(
    q_IE: torch.Tensor, weight_I: torch.Tensor, keys_nE: torch.Tensor, count_1: torch.Tensor, *, k: int
) -> torch.Tensor:
    """Return the ``k`` entries of the highest scores; arguments as the kernel's ``index_topk``."""
    if unsupported_index_topk(keys_nE.device, key_dim=keys_nE.shape[1], n_heads=len(q_IE)):
        return index_topk_reference(q_IE, weight_I, keys_nE, count_1, k=k)
    from kvscope.methods.kernels.index_topk.kernel import index_topk as run

    return run(q_IE, weight_I, keys_nE, count_1, k=k)
