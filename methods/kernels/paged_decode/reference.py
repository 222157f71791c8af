"""Decode attention over pages in plain torch, every logit written out: the oracle of the kernel.

Shapes: B sequences, Q query heads, H KV heads, G = Q / H, D head size, T tokens, P tokens a page.
"""

from collections.abc import Sequence

import torch

from kvscope.methods.kernels.paged_decode.inputs import PagedKV, check_inputs
from kvscope.methods.packing import unpack_pages


def paged_decode_reference(
    q_BQ1D: torch.Tensor,
    stores: Sequence[PagedKV],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output [B, Q, 1, D] and log-sum-exp [B, Q], computed in ``dtype``. Arguments as ``paged_decode``."""
    check_inputs(q_BQ1D, stores)
    B, Q, _, D = q_BQ1D.shape
    H = stores[0].pages.shape[1]
    G = Q // H
    out = torch.zeros((B, Q, 1, D), dtype=dtype, device=q_BQ1D.device)
    lse = torch.full((B, Q), -torch.inf, dtype=dtype, device=q_BQ1D.device)
    for b in range(B):
        for h in range(H):
            heads = slice(h * G, (h + 1) * G)
            kv_2TD = torch.cat([_read(store, b, h).to(dtype) for store in stores], 1)
            logits_GT = q_BQ1D[b, heads, 0].to(dtype) @ kv_2TD[0].T * scale
            if softcap is not None:
                logits_GT = softcap * torch.tanh(logits_GT / softcap)
            lse_G = torch.logsumexp(logits_GT, 1)
            if sink_logits is not None:
                lse_G = torch.logaddexp(lse_G, sink_logits[heads].to(dtype))
            lse[b, heads] = lse_G
            if kv_2TD.shape[1]:
                out[b, heads, 0] = torch.exp(logits_GT - lse_G[:, None]) @ kv_2TD[1]
    return out, lse


def _read(store: PagedKV, b: int, h: int) -> torch.Tensor:
    """Return K and V [2, T, D] of what one KV head of one sequence reads."""
    P = store.page_tokens
    n = store.n_tokens if isinstance(store.n_tokens, int) else int(_pick(store.n_tokens, b, h))
    n = min(n, store.capacity_tokens)
    token_T = torch.arange(n, device=store.pages.device) if store.tokens is None else _pick(store.tokens, b, h)[:n]
    page_T = token_T.long() // P
    slot_T = page_T if store.page_table is None else _pick(store.page_table, b, h)[page_T].long()
    pages = store.pages[:, h]
    if store.packing is not None:
        pages = unpack_pages(pages, store.packing, torch.float64)
    return pages[slot_T, :, token_T.long() % P].transpose(0, 1)


def _pick(index: torch.Tensor, b: int, h: int) -> torch.Tensor:
    return index[min(b, index.shape[0] - 1), min(h, index.shape[1] - 1)]
