"""Attention of whole rows to a window and to compressed entries, with memory linear in the row's length.

The stock classes mask a T x (T + T / rate) matrix. Here the window goes in blocks, and entries go through the flash
kernel. A query at t sees the entries before (t + 1) // rate, so ``rate`` queries in succession see the same ones: as
heads of one query they turn the rule into plain causal attention over entries, which has one KV head anyway.

Shapes: B rows, T tokens, Q query heads, D head size, n entries, r tokens an entry, F = r x Q folded heads, k entries
chosen.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

FEW_ENTRIES = 128
"""Up to so many entries a row, each query keeps a score for each: of 64 tokens the flash kernel fills 2 rows of 128."""
# Queries whose chosen entries are gathered at a time; their gathered copies are k x D each.
CHOSEN_QUERIES = 2048


def window_attention(
    q_BTQD: torch.Tensor, kv_BTD: torch.Tensor, sinks_Q: torch.Tensor, *, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the last ``window`` tokens and to a sink that has no value.

    Queries go in blocks of a window, all heads in one product, against the keys of their own block and the one before.

    Returns:
        [B, T, Q, D], and the logarithm of the softmax's denominator [B, T, Q], sink included, in fp32.
    """
    n_tokens = q_BTQD.shape[1]
    if missing := -n_tokens % window:  # filled up behind the row's end, where no query that counts can see it
        q_BTQD, kv_BTD = F.pad(q_BTQD, (0, 0, 0, 0, 0, missing)), F.pad(kv_BTD, (0, 0, 0, missing))
    B, T, Q, D = q_BTQD.shape
    n = T // window
    own_BnWD = kv_BTD.reshape(B, n, window, D)
    keys = torch.cat((F.pad(own_BnWD[:, :-1], (0, 0, 0, 0, 1, 0)), own_BnWD), 2)
    query = torch.arange(window, device=kv_BTD.device)[:, None, None]
    key = torch.arange(2 * window, device=kv_BTD.device)
    block = torch.arange(n, device=kv_BTD.device)[:, None, None, None]
    # Query i of a block sees keys i + 1 ... i + W of (block before, own block), itself the last.
    seen = (key > query) & (key <= query + window) & ((block > 0) | (key >= window))
    products = q_BTQD.reshape(B, n, window * Q, D) @ keys.mT
    scores = products.view(B, n, window, Q, 2 * window).float() * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logaddexp(scores.logsumexp(-1), sinks_Q.float())
    weights = (scores - lse[..., None]).exp().to(keys.dtype)
    out = (weights.view(B, n, window * Q, 2 * window) @ keys).view(B, T, Q, D)
    return (out[:, :n_tokens], lse.view(B, T, Q)[:, :n_tokens]) if missing else (out, lse.view(B, T, Q))


def joined_with_few(
    q_BTQD: torch.Tensor, e_BnD: torch.Tensor, before_BTQD: torch.Tensor, lse_BTQ: torch.Tensor, *, rate: int,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """``joined_with_entries`` with a number for each query and entry: the flash kernel's blocks are 128 entries."""
    B, T, Q, D = q_BTQD.shape
    n = e_BnD.shape[1]
    if n == 0:
        return before_BTQD
    seen_T11 = ((torch.arange(T, device=e_BnD.device) + 1) // rate)[:, None, None]
    scores = (q_BTQD.reshape(B, T * Q, D) @ e_BnD.mT).view(B, T, Q, n).float() * scale
    # The first queries see no entry: with -inf their gradients would be no numbers.
    scores = scores.masked_fill(torch.arange(n, device=e_BnD.device) >= seen_T11, torch.finfo(scores.dtype).min)
    lse_BTQ = lse_BTQ.float()
    total_BTQ = torch.logaddexp(scores.logsumexp(-1), lse_BTQ)
    weights = (scores - total_BTQ[..., None]).exp().to(e_BnD.dtype)
    out = (weights.view(B, T * Q, n) @ e_BnD).view(B, T, Q, D)
    return (out + before_BTQD * (lse_BTQ - total_BTQ).exp()[..., None]).to(before_BTQD.dtype)


def _flash(q_BFnD: torch.Tensor, e_B1nD: torch.Tensor, scale: float) -> tuple[Any, ...]:
    """Causal attention, and the logarithm of its denominators; the rest is what the kernel's backward pass wants."""
    if q_BFnD.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            q_BFnD, e_B1nD, e_B1nD, 0.0, True, False, scale=scale
        )
        return tuple(found[:8])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BFnD, e_B1nD, e_B1nD, 0.0, True, scale=scale
    )
    return out, lse


def _flash_backward(
    grad: torch.Tensor, q_BFnD: torch.Tensor, e_B1nD: torch.Tensor, out: torch.Tensor, lse_BFn: torch.Tensor,
    extra: tuple[Any, ...], scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of queries and entries, given output and denominators of all that was attended to, not of these alone.

    The kernel takes a softmax's weights from the denominators it is given, so those of a larger softmax make its
    gradients those of this part of it.
    """
    if q_BFnD.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q_BFnD, e_B1nD, e_B1nD, out, lse_BFn, *extra[:4], 0.0, True, *extra[4:], scale=scale
        )
        return found[0], found[1] + found[2]
    e_BFnD = e_B1nD.expand(-1, q_BFnD.shape[1], -1, -1)  # its backward pass knows no shared heads
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q_BFnD, e_BFnD, e_BFnD, out, lse_BFn, 0.0, True, scale=scale
    )
    return found[0], (found[1] + found[2]).sum(1, keepdim=True)


class _Joined(torch.autograd.Function):
    """Causal attention over entries, joined with attention that is done already into one softmax."""

    @staticmethod
    def forward(
        ctx: Any, q_BFnD: torch.Tensor, e_B1nD: torch.Tensor, before_BFnD: torch.Tensor, lse_BFn: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        out, entries_lse, *extra = _flash(q_BFnD, e_B1nD, scale)
        total_BFn = torch.logaddexp(entries_lse, lse_BFn.to(entries_lse.dtype)).contiguous()
        of_entries = (entries_lse - total_BFn).exp()[..., None]
        share_BFn1 = (lse_BFn - total_BFn).exp()[..., None]
        joined: torch.Tensor = (out * of_entries + before_BFnD * share_BFn1).to(out.dtype)
        ctx.save_for_backward(q_BFnD, e_B1nD, before_BFnD, lse_BFn, joined, total_BFn)
        ctx.extra, ctx.scale = tuple(extra), scale
        return joined

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_BFnD, e_B1nD, before_BFnD, lse_BFn, joined, total_BFn = ctx.saved_tensors
        grad = grad.to(joined.dtype).contiguous()
        grad_q, grad_e = _flash_backward(grad, q_BFnD, e_B1nD, joined, total_BFn, ctx.extra, ctx.scale)
        share_BFn1 = (lse_BFn - total_BFn).exp()[..., None]
        grad_lse = share_BFn1 * (grad.float() * (before_BFnD.float() - joined.float())).sum(-1, keepdim=True)
        grad_before = (grad * share_BFn1).to(before_BFnD.dtype)
        return grad_q, grad_e, grad_before, grad_lse[..., 0].to(lse_BFn.dtype), None


def joined_with_entries(
    q_BTQD: torch.Tensor, e_BnD: torch.Tensor, before_BTQD: torch.Tensor, lse_BTQ: torch.Tensor, *, rate: int,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attend to every entry a query may see, in one softmax with what ``before`` and ``lse`` attended to."""
    n, n_tokens = e_BnD.shape[1], q_BTQD.shape[1]
    if n == 0:
        return before_BTQD
    alone = rate - 1  # the first queries see no entry
    filled = n * rate + alone - n_tokens

    def folded(x_BTQD: torch.Tensor) -> torch.Tensor:
        """[B, F, n, D]: ``rate`` successive queries as heads of one; the row's end is filled up."""
        x_BTQD = F.pad(x_BTQD[:, alone:], (0, 0, 0, 0, 0, filled))
        return x_BTQD.reshape(x_BTQD.shape[0], n, -1, x_BTQD.shape[-1]).transpose(1, 2)

    found = _Joined.apply(  # type: ignore[no-untyped-call]
        folded(q_BTQD), e_BnD.unsqueeze(1), folded(before_BTQD), folded(lse_BTQ[..., None])[..., 0], scale
    )
    joined = found.transpose(1, 2).reshape(len(q_BTQD), n * rate, q_BTQD.shape[2], -1)
    return torch.cat((before_BTQD[:, :alone], joined[:, : n_tokens - alone]), dim=1)


def _joined_with_chosen(
    q_BCQD: torch.Tensor, e_BnD: torch.Tensor, chosen_BCk: torch.Tensor, before_BCQD: torch.Tensor,
    lse_BCQ: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    first_B11 = torch.arange(len(e_BnD), device=e_BnD.device)[:, None, None] * e_BnD.shape[1]
    at = (chosen_BCk.clamp_min(0) + first_B11).flatten()
    # In fp32, for its gradient adds up what thousands of queries give to one entry.
    picked_BCkD = e_BnD.flatten(0, 1).float().index_select(0, at).to(e_BnD.dtype).view(*chosen_BCk.shape, -1)
    scores_BCQk = (q_BCQD @ picked_BCkD.mT).float() * scale
    scores_BCQk = scores_BCQk.masked_fill(chosen_BCk.unsqueeze(2) < 0, float("-inf"))
    # What was attended to before takes part as one more entry: its denominator for a score, its output for a value.
    weights = torch.cat((scores_BCQk, lse_BCQ[..., None]), -1).softmax(-1)
    out = weights[..., :-1].to(picked_BCkD.dtype) @ picked_BCkD
    return (out + weights[..., -1:] * before_BCQD).to(out.dtype)


def joined_with_chosen(
    q_BTQD: torch.Tensor, e_BnD: torch.Tensor, chosen_BTk: torch.Tensor, before_BTQD: torch.Tensor,
    lse_BTQ: torch.Tensor, *, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attend to chosen entries alone (-1: none), in one softmax with what ``before`` and ``lse`` attended to."""
    parts = []
    for start in range(0, q_BTQD.shape[1], CHOSEN_QUERIES):
        at = slice(start, start + CHOSEN_QUERIES)
        parts.append(
            checkpoint(
                _joined_with_chosen, q_BTQD[:, at], e_BnD, chosen_BTk[:, at], before_BTQD[:, at], lse_BTQ[:, at],
                scale, use_reentrant=False,
            )
        )  # fmt: skip
    return torch.cat(parts, 1)
