"""From scores to the tokens that stay. Where scores tie, the earlier token stays.

Shapes: H KV heads, N prompt tokens, n tokens kept.
"""

import torch

from kvscope.errors import KvscopeError
from kvscope.methods.store import PromptKV


def prompt_scores(prompt: PromptKV, name: str, layer: int, *, method: str) -> torch.Tensor:
    """Return what a collector left of a layer: scores [H, N] or, the same for all heads, [1, N].

    Raises:
        ValueError: the prompt was prefilled without the collector.
        KvscopeError: a score is NaN.
    """
    found = prompt.metadata.get(name, {}).get(layer)
    if found is None:
        raise ValueError(
            f"this prompt was prefilled without the collectors of '{name}': pass union_collectors(methods, layers) to "
            "prefill"
        )
    if bool(found.isnan().any()):
        raise KvscopeError(f"scores of layer {layer} that method '{method}' chooses by are not finite (NaN).")
    return found


def top_tokens(scores_HN: torch.Tensor, n_kept: int) -> torch.Tensor:
    """Return the positions [H, n_kept] of the highest scores of each row, ascending."""
    if n_kept == 0:
        return torch.empty((len(scores_HN), 0), dtype=torch.long, device=scores_HN.device)
    return top_mask(scores_HN, n_kept).nonzero()[:, 1].view(len(scores_HN), n_kept)


def top_mask(scores_XN: torch.Tensor, n_kept: int) -> torch.Tensor:
    """Return which of each row are its ``n_kept`` highest (at least one), [X, N]."""
    last_X1 = scores_XN.topk(n_kept, dim=-1).values[:, -1:]
    above_XN = scores_XN > last_X1
    tied_XN = scores_XN == last_X1
    n_missing_X1 = n_kept - above_XN.sum(-1, keepdim=True)
    return above_XN | (tied_XN & (tied_XN.cumsum(-1) <= n_missing_X1))


def shared_tokens(scores_HN: torch.Tensor, n_kept: int, *, n_safe: int) -> list[torch.Tensor]:
    """Return the positions each KV head keeps of a budget that all heads of a layer share.

    Args:
        n_kept: tokens a head, mean over the heads.
        n_safe: tokens that each head keeps at least, its best ones.
    """
    H, N = scores_HN.shape
    if n_safe:
        scores_HN = scores_HN.masked_fill(top_mask(scores_HN, n_safe), torch.inf)
    mask_HN = top_mask(scores_HN.reshape(1, H * N), H * n_kept).view(H, N)
    return [row.nonzero()[:, 0] for row in mask_HN]
