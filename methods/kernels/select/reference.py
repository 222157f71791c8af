"""Selection and its difference to a slot table in plain torch: the oracle of the kernels.

Shapes: R rows of logits, n chunks, S slots.
"""

import torch


def select_reference(logits_Rn: torch.Tensor, threshold: float, *, n_sink: int = 0, n_recent: int = 0) -> torch.Tensor:
    """Return the chosen chunks, ascending: best logit at or over the threshold, or first, or last."""
    n = logits_Rn.shape[1]
    chunk_n = torch.arange(n, device=logits_Rn.device)
    best_n = logits_Rn.amax(0) if len(logits_Rn) else torch.full((n,), -torch.inf, device=logits_Rn.device)
    return chunk_n[(best_n >= threshold) | (chunk_n < n_sink) | (chunk_n >= n - n_recent)]


def diff_reference(chosen: torch.Tensor, chunk_of_slot_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the chosen chunks in no slot, and the slots of no chosen chunk, both ascending."""
    missing = chosen[~torch.isin(chosen, chunk_of_slot_S)]
    free = (~torch.isin(chunk_of_slot_S, chosen)).nonzero()[:, 0]
    return missing, free
