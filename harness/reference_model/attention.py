"""Attention for training: stock layers call it through transformers' attention interface.

Sliding-window layers cost their window, not the row: queries go in blocks of one window, each against its own block and
the one before. Full layers use torch's causal kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "kvscope_training"


def sliding_attention(
    q_BQTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, *, window: int, scale: float
) -> torch.Tensor:
    """Causal attention to the last ``window`` tokens, the query's own included. T is a multiple of the window."""
    B, Q, T, D = q_BQTD.shape
    n = T // window
    if n * window != T:
        raise ValueError(f"rows of {T} tokens are not a multiple of the window {window}")
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
    scores = (q_BQTD.reshape(B, Q, n, window, D) @ pairs(k_BHTD).mT).float() * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights.to(v_BHTD.dtype) @ pairs(v_BHTD)).view(B, Q, T, D)


def training_attention(
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
    """Attention over whole unpadded rows from position 0. Returns [B, T, Q, D]."""
    del module, dropout, kwargs
    if attention_mask is not None:
        raise ValueError("training rows are neither padded nor masked")
    if sliding_window is not None:
        out = sliding_attention(query, key, value, window=sliding_window, scale=scaling)
    else:
        # One dtype: a norm on queries and keys leaves them in fp32 under autocast, and the fast kernel wants bf16.
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, training_attention)
