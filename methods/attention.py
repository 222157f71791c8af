"""Attention over pages: by the paged_decode kernel where it runs (``kernels.dispatch`` says so), else in plain torch.

Shapes: B batch (1), Q query heads, H KV heads, G = Q/H, D head size, S slots (pages resident), P tokens a page.
Pages of one layer are one tensor [S, H, 2, P, D], index 2 being K and V. Slots and heads flatten into one batch of
matrix products without a copy, so nothing is gathered and nothing concatenated.

Every function here returns partial results with their log-sum-exp, in natural log. Softmax over a union of token
sets is the exp(lse)-weighted mean of the parts, which is how sinks, sink logits and split contexts are joined.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvscope.methods.call import AttentionCall
from kvscope.methods.flash import attention_with_lse, flash_runs_on
from kvscope.methods.kernels.dispatch import unsupported_decode, unsupported_packed
from kvscope.methods.kernels.paged_decode.inputs import MAX_STORES, PagedKV
from kvscope.methods.packing import unpack_pages


class Partial(NamedTuple):
    """Attention over some of the tokens: normalised output [H, G, D] and log-sum-exp of the logits [H, G]."""

    out: torch.Tensor
    lse: torch.Tensor


def paged_attention(
    call: AttentionCall, pages: torch.Tensor, *, n_tokens: int, page_table: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend one query to the tokens of a page table.

    Args:
        call: of one sequence and one token; its key and value are not looked at: they are in the pages.
        pages: [S, H, 2, P, D].
        n_tokens: tokens stored, filling the table's pages in order; the rest of the last page is not read.
        page_table: slots to read in order, [slots] for all heads or [H, slots]; every slot when None. A table costs
            a gather here; a kernel reads through it.

    Returns:
        [B, Q, 1, D] in the dtype of the query.
    """
    _check(call.query, pages, n_tokens, page_table)
    if n_tokens and kernel_runs(call.query, pages):
        return _kernel_attention(call, [_kernel_store(pages, n_tokens, page_table)])
    part = paged_partial(
        call.query, pages, n_tokens=n_tokens, scale=call.scale, softcap=call.softcap, page_table=page_table
    )
    return merge_partials([part], call.query, sink_logits=call.sink_logits)


def joint_attention(call: AttentionCall, stores: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Attend one query to the union of two stores or fewer, each pages [S, H, 2, P, D] and tokens stored in them.

    Page sizes may differ; a store without tokens is left out. The call and the result are ``paged_attention``'s.
    """
    stores = [(pages, n_tokens) for pages, n_tokens in stores if n_tokens]
    for pages, n_tokens in stores:
        _check(call.query, pages, n_tokens, None)
    if stores and all(kernel_runs(call.query, pages) for pages, _ in stores):
        return _kernel_attention(call, [_kernel_store(pages, n_tokens, None) for pages, n_tokens in stores])
    parts = [
        paged_partial(call.query, pages, n_tokens=n_tokens, scale=call.scale, softcap=call.softcap)
        for pages, n_tokens in stores
    ]
    return merge_partials(parts, call.query, sink_logits=call.sink_logits)


def stored_attention(call: AttentionCall, stores: Sequence[PagedKV]) -> torch.Tensor:
    """Attend one query to the union of one store or two whose counts and tables are on the device.

    This is what a captured step calls: the kernel reads counts and tables when it runs. Where the kernel does not run,
    counts are read back, so the call cannot be captured. Token lists need the kernel. The call and the result are
    ``paged_attention``'s. Packed pages make three stores of two: they are joined afterwards.
    """
    if len(stores) <= MAX_STORES and all(_kernel_reads(call.query, store) for store in stores):
        return _kernel_attention(call, stores)
    parts = [stored_partial(call.query, store, scale=call.scale, softcap=call.softcap) for store in stores]
    return merge_partials(parts, call.query, sink_logits=call.sink_logits)


def stored_partial(q_BQ1D: torch.Tensor, store: PagedKV, *, scale: float, softcap: float | None = None) -> Partial:
    """Attend one query [B, Q, 1, D] to one such store and return the unmerged result."""
    if not _kernel_reads(q_BQ1D, store):
        n_tokens, P = int(store.n_tokens), store.page_tokens
        table = None if store.page_table is None else store.page_table[0, :, : -(-n_tokens // P)].long()
        if table is not None and table.shape[0] == 1:
            table = table[0]
        if store.packing is not None:
            return _unpacked_partial(q_BQ1D, store, table, n_tokens=n_tokens, scale=scale, softcap=softcap)
        return paged_partial(q_BQ1D, store.pages, n_tokens=n_tokens, scale=scale, softcap=softcap, page_table=table)
    out, lse = _kernel(q_BQ1D, [store], scale=scale, softcap=softcap, out_dtype=torch.float32)
    H, D = store.pages.shape[1], q_BQ1D.shape[3]
    return Partial(out.view(H, -1, D), lse.view(H, -1))


def _unpacked_partial(
    q_BQ1D: torch.Tensor,
    store: PagedKV,
    table: torch.Tensor | None,
    *,
    n_tokens: int,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Unpack what is read, then attend to it: where the kernel does not run."""
    assert store.packing is not None
    if table is not None and table.ndim != 1:
        raise ValueError("packed pages are read here by one table for all KV heads")
    used = slice(-(-n_tokens // store.page_tokens)) if table is None else table
    pages = unpack_pages(store.pages[used], store.packing, q_BQ1D.dtype)
    return paged_partial(q_BQ1D, pages, n_tokens=n_tokens, scale=scale, softcap=softcap)


def paged_partial(
    q_BQ1D: torch.Tensor,
    pages: torch.Tensor,
    *,
    n_tokens: int,
    scale: float,
    softcap: float | None = None,
    page_table: torch.Tensor | None = None,
) -> Partial:
    """Attend one query [B, Q, 1, D] to some pages and return the unmerged result. As ``paged_attention``."""
    _check(q_BQ1D, pages, n_tokens, page_table)
    H, P, D = pages.shape[1], *pages.shape[3:]
    q_HGD = q_BQ1D.view(H, -1, D)
    if n_tokens == 0:
        return Partial(q_HGD.new_zeros(q_HGD.shape), q_HGD.new_full(q_HGD.shape[:2], -torch.inf))
    if kernel_runs(q_BQ1D, pages):
        store = _kernel_store(pages, n_tokens, page_table)
        out, lse = _kernel(q_BQ1D, [store], scale=scale, softcap=softcap, out_dtype=torch.float32)
        return Partial(out.view(q_HGD.shape), lse.view(q_HGD.shape[:2]))
    if page_table is not None:
        pages = _gather(pages, page_table)
    pages = pages[: -(-n_tokens // P)]
    if q_HGD.dtype != torch.float32 and softcap is None and flash_runs_on(q_BQ1D):
        return _flash_partial(q_HGD, pages, n_tokens=n_tokens, scale=scale)
    return _bmm_partial(q_HGD, pages, n_tokens=n_tokens, scale=scale, softcap=softcap)


def merge_partials(
    parts: list[Partial], q_BQ1D: torch.Tensor, *, sink_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """Join results over disjoint token sets into attention over their union. Returns [B, Q, 1, D]."""
    if len(parts) == 1 and sink_logits is None:
        out_HGD = parts[0].out
    else:
        lse_XHG = torch.stack([part.lse for part in parts])
        total_HG = torch.logsumexp(lse_XHG, 0)
        if sink_logits is not None:
            total_HG = torch.logaddexp(total_HG, sink_logits.to(total_HG.dtype).view_as(total_HG))
        weight_XHG = torch.exp(lse_XHG - total_HG)
        out_HGD = (weight_XHG[..., None] * torch.stack([part.out for part in parts])).sum(0)
    return out_HGD.to(q_BQ1D.dtype).view(q_BQ1D.shape)


def _check(q_BQ1D: torch.Tensor, pages: torch.Tensor, n_tokens: int, page_table: torch.Tensor | None) -> None:
    if q_BQ1D.shape[0] != 1 or q_BQ1D.shape[2] != 1:
        raise ValueError(f"one query of one sequence at a time, got shape {tuple(q_BQ1D.shape)}")
    n_slots, P = pages.shape[0] if page_table is None else page_table.shape[-1], pages.shape[3]
    if n_tokens > n_slots * P:
        raise ValueError(f"{n_tokens} tokens do not fit {n_slots} pages of {P}")


def kernel_runs(q_BQ1D: torch.Tensor, pages: torch.Tensor) -> bool:
    """Whether the ``paged_decode`` kernel attends this query [B, Q, 1, D] to these pages [S, H, 2, P, D]."""
    return pages.is_cuda and not unsupported_decode(
        pages.device,
        dtype=pages.dtype,
        head_dim=pages.shape[4],
        n_q_heads=q_BQ1D.shape[1],
        n_kv_heads=pages.shape[1],
    )


def _kernel_reads(q_BQ1D: torch.Tensor, store: PagedKV) -> bool:
    """Whether the kernel attends to a store, packed or not."""
    if store.packing is None:
        return kernel_runs(q_BQ1D, store.pages)
    return store.pages.is_cuda and not unsupported_packed(
        store.pages.device,
        dtype=q_BQ1D.dtype,
        packing=store.packing,
        n_q_heads=q_BQ1D.shape[1],
        n_kv_heads=store.pages.shape[1],
    )


def _kernel_store(pages: torch.Tensor, n_tokens: int, page_table: torch.Tensor | None) -> PagedKV:
    table_BHS = None if page_table is None else page_table.view(1, -1, page_table.shape[-1])
    return PagedKV(pages=pages, n_tokens=n_tokens, page_table=table_BHS)


def _kernel_attention(call: AttentionCall, stores: Sequence[PagedKV]) -> torch.Tensor:
    return _kernel(call.query, stores, scale=call.scale, softcap=call.softcap, sink_logits=call.sink_logits)[0]


def _kernel(
    q_BQ1D: torch.Tensor,
    stores: Sequence[PagedKV],
    *,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from kvscope.methods.kernels.paged_decode.kernel import paged_decode  # Triton may be missing where it is not used

    return paged_decode(q_BQ1D, stores, scale=scale, softcap=softcap, sink_logits=sink_logits, out_dtype=out_dtype)


def _bmm_partial(
    q_HGD: torch.Tensor, pages: torch.Tensor, *, n_tokens: int, scale: float, softcap: float | None
) -> Partial:
    n_slots, H, _, P, D = pages.shape
    G = q_HGD.shape[1]
    # Products of low-precision operands would round the logits themselves, so they are taken in fp32.
    flat = pages.float().view(n_slots * H, 2, P, D)
    k_NPD, v_NPD = flat[:, 0], flat[:, 1]
    q_NGD = (q_HGD.float() * scale).expand(n_slots, H, G, D).reshape(n_slots * H, G, D)
    logits_SHGP = torch.bmm(q_NGD, k_NPD.transpose(1, 2)).view(n_slots, H, G, P)
    if softcap is not None:
        logits_SHGP = softcap * torch.tanh(logits_SHGP / softcap)
    tail = n_tokens - (n_slots - 1) * P
    if tail < P:
        logits_SHGP[-1, :, :, tail:] = -torch.inf
    top_HG = logits_SHGP.amax((0, 3))
    weight_SHGP = torch.exp_(logits_SHGP - top_HG[:, :, None])
    sum_HG = weight_SHGP.sum((0, 3))
    out_HGD = torch.bmm(weight_SHGP.view(n_slots * H, G, P), v_NPD).view(n_slots, H, G, D).sum(0) / sum_HG[..., None]
    return Partial(out_HGD, top_HG + torch.log(sum_HG))


def _flash_partial(q_HGD: torch.Tensor, pages: torch.Tensor, *, n_tokens: int, scale: float) -> Partial:
    """Fused attention per page (a batch of pages), merged over pages: fp32 accumulation without a copy of K and V."""
    P = pages.shape[3]
    full = n_tokens // P
    outs, lses = [], []
    if full:
        out_SHGD, lse_SHG = attention_with_lse(
            q_HGD.expand(full, *q_HGD.shape), pages[:full, :, 0], pages[:full, :, 1], causal=False, scale=scale
        )
        outs.append(out_SHGD)
        lses.append(lse_SHG)
    if n_tokens > full * P:
        tail = pages[full : full + 1, :, :, : n_tokens - full * P]
        out_SHGD, lse_SHG = attention_with_lse(q_HGD[None], tail[:, :, 0], tail[:, :, 1], causal=False, scale=scale)
        outs.append(out_SHGD)
        lses.append(lse_SHG)
    lse_SHG = torch.cat(lses)
    total_HG = torch.logsumexp(lse_SHG, 0)
    weight_SHG = torch.exp(lse_SHG - total_HG)
    return Partial((torch.cat(outs).float() * weight_SHG[..., None]).sum(0), total_HG)


def _gather(pages: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
    if page_table.ndim == 1:
        return pages[page_table]
    heads = torch.arange(pages.shape[1], device=pages.device)[:, None]
    return pages[page_table, heads].transpose(0, 1).contiguous()
