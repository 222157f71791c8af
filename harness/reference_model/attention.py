"""Attention of unpadded rows, for training and for batched evaluation, behind transformers' attention interface.

Sliding-window layers cost their window, not the row: queries go in blocks of one window, each against its own block and
the one before. Full layers use torch's causal kernel. The stock path builds a mask of T x T for every row instead.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "kvscope_unpadded"


def sliding_scores(
    q_BQTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, *, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masked scores of each query for its window in blocks, [B, Q, n, W, 2W] in fp32, and the values they
    weigh, [B, Q, n, 2W, D].

    The last block is filled up behind the row's end, where no query that counts can see it.
    """
    if missing := -q_BQTD.shape[2] % window:
        same = v_BHTD is k_BHTD
        q_BQTD, k_BHTD = (F.pad(x, (0, 0, 0, missing)) for x in (q_BQTD, k_BHTD))
        v_BHTD = k_BHTD if same else F.pad(v_BHTD, (0, 0, 0, missing))
    B, Q, T, D = q_BQTD.shape
    n = T // window
    groups = Q // k_BHTD.shape[1]

    def pairs(x_BHTD: torch.Tensor) -> torch.Tensor:
        """[B, Q, n, 2W, D]: each block behind the one before it (behind itself at the start, where it is masked)."""
        blocks = x_BHTD.repeat_interleave(groups, dim=1).view(B, Q, n, window, D)
        before = torch.cat((blocks[:, :, :1], blocks[:, :, :-1]), dim=2)
        return torch.cat((before, blocks), dim=3)

    query = torch.arange(window, device=q_BQTD.device)[:, None]
    key = torch.arange(2 * window, device=q_BQTD.device)[None]
    block = torch.arange(n, device=q_BQTD.device)[:, None, None]
    # Query i of a block sees keys i + 1 ... i + W of (block before, own block), itself the last.
    seen = (key > query) & (key <= query + window) & ((block > 0) | (key >= window))
    keys = pairs(k_BHTD)
    scores = (q_BQTD.reshape(B, Q, n, window, D) @ keys.mT).float() * scale
    return scores.masked_fill(~seen, float("-inf")), keys if v_BHTD is k_BHTD else pairs(v_BHTD)


def sliding_attention(
    q_BQTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, *, window: int, scale: float
) -> torch.Tensor:
    """Causal attention to the last ``window`` tokens, the query's own included."""
    scores, values = sliding_scores(q_BQTD, k_BHTD, v_BHTD, window=window, scale=scale)
    return (scores.softmax(-1).to(v_BHTD.dtype) @ values).flatten(2, 3)[:, :, : q_BQTD.shape[2]]


def unpadded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of whole rows from position 0, or of one new token to everything cached. Returns [B, T, Q, D].

    Raises:
        ValueError: masked rows, or several tokens behind a cache.
    """
    del module, dropout, kwargs
    n_new, n_keys = query.shape[2], key.shape[2]
    if attention_mask is not None or n_new not in (1, n_keys):
        raise ValueError("only whole unpadded rows and single decode steps are served here")
    if sliding_window is not None and n_new > 1:
        out = sliding_attention(query, key, value, window=sliding_window, scale=scaling)
    else:
        # One dtype: a norm on queries and keys leaves them in fp32 under autocast, and the fast kernel wants bf16.
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=n_new > 1, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, unpadded_attention)


def use_for_batches(model: Any, *, padded: bool) -> bool:
    """Switch a stock model to the attention that its batches are answered with.

    Returns:
        Whether prompts of unlike length may share a batch. DeepSeek-V4 would make entries of their padding.
    """
    if model.config.model_type == "deepseek_v4":
        model.set_attn_implementation("eager")
        return False
    # Padding needs the stock masks.
    model.set_attn_implementation("sdpa" if padded else NAME)
    return True
