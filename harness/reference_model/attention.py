"""Attention for training: stock layers call it through transformers' attention interface.

Sliding-window layers cost their window, not the row: queries go in blocks of one window, each against its own block and
the one before. Full layers use torch's causal kernel.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "kvscope_training"


@cache
def _band(window: int, device: torch.device) -> torch.Tensor:
    """[W, 2W] mask: query i of a block sees keys i + 1 ... i + W of (block before, own block), itself the last."""
    query = torch.arange(window, device=device)[:, None]
    key = torch.arange(2 * window, device=device)[None]
    return (key > query) & (key <= query + window)


def sliding_attention(
    q_BQTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, *, window: int, scale: float
) -> torch.Tensor:
    """Causal attention to the last ``window`` tokens, the query's own included. T is a multiple of the window."""
    B, Q, T, D = q_BQTD.shape
    n = T // window
    if n * window != T:
        raise ValueError(f"rows of {T} tokens are not a multiple of the window {window}")
    groups = Q // k_BHTD.shape[1]
    k = k_BHTD.repeat_interleave(groups, dim=1)
    v = v_BHTD.repeat_interleave(groups, dim=1)
    first = F.scaled_dot_product_attention(
        q_BQTD[:, :, :window], k[:, :, :window], v[:, :, :window], is_causal=True, scale=scale
    )
    if n == 1:
        return first

    def pairs(x: torch.Tensor) -> torch.Tensor:
        blocks = x.view(B, Q, n, window, D)
        both = torch.cat((blocks[:, :, :-1], blocks[:, :, 1:]), dim=3)
        return both.transpose(1, 2).reshape(B * (n - 1), Q, 2 * window, D)

    queries = q_BQTD[:, :, window:].reshape(B, Q, n - 1, window, D).transpose(1, 2).reshape(-1, Q, window, D)
    mask = _band(window, q_BQTD.device)
    rest = F.scaled_dot_product_attention(queries, pairs(k), pairs(v), attn_mask=mask, scale=scale)
    rest = rest.view(B, n - 1, Q, window, D).transpose(1, 2).reshape(B, Q, T - window, D)
    return torch.cat((first, rest), dim=2)


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
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, training_attention)
