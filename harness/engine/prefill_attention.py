"""Exact attention of a chunk of queries over everything before it and itself, for prefill and stock layers.

Shapes: B batch, Q query heads, H KV heads, G = Q/H, S new tokens, T keys (the queries are the last S of them), D head
size.

Torch's fused kernels align a causal mask to the first key, which is wrong for a chunk behind a past. So the past is one
call without a mask (query heads of a group folded into the query length: K and V are not repeated), the diagonal block
one causal call, and the two are joined by their log-sum-exp.
"""

import torch
import torch.nn.functional as F

from kvscope.methods.flash import (
    attention_with_lse,
    flash_runs_on,
    flash_window_runs_on,
    masked_attention,
    windowed_attention,
)

_EXPLICIT_ELEMENTS = 2**26
_QUERY_BLOCK = 512
_WINDOW_QUERY_BLOCK = 256
# A fused kernel keeps no logits, so small blocks cost nothing: of b + window keys, b are met in vain.
_FUSED_QUERY_BLOCK = 64


def chunk_attention(
    q_BQSD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return causal attention of the last S of T positions, [B, Q, S, D].

    Args:
        window: tokens a query sees, itself included; None for all.
        softcap: logits become softcap * tanh(logits / softcap).
        sink_logits: [Q], one logit a head that takes mass and has no value.
    """
    S, T = q_BQSD.shape[2], k_BHTD.shape[2]
    if window is not None and window >= T:
        window = None
    if window is not None and S == 1 and softcap is None and flash_runs_on(q_BQSD):
        # One query sees the last keys and nothing else: no mask is needed.
        k_BHTD, v_BHTD, window = k_BHTD[:, :, T - window :], v_BHTD[:, :, T - window :], None
    if window is not None and softcap is None and sink_logits is None and flash_window_runs_on(q_BQSD):
        past = min(T - S, window - 1)
        k, v = k_BHTD[:, :, T - S - past :], v_BHTD[:, :, T - S - past :]
        return windowed_attention(q_BQSD, k, v, scale=scale, window=window)
    is_fused = softcap is None and q_BQSD.device.type == "cpu"
    if window is not None and not is_fused:
        return _windowed(q_BQSD, k_BHTD, v_BHTD, scale=scale, window=window, softcap=softcap, sink_logits=sink_logits)
    if window is not None:
        out, lse = _fused_windowed(q_BQSD, k_BHTD, v_BHTD, scale=scale, window=window)
    elif softcap is not None or not flash_runs_on(q_BQSD):
        out, lse = _explicit(q_BQSD, k_BHTD, v_BHTD, scale=scale, softcap=softcap)
    elif S == 1:
        out, lse = _folded(q_BQSD, k_BHTD, v_BHTD, scale=scale)
    else:
        G = q_BQSD.shape[1] // k_BHTD.shape[1]
        k_new, v_new = (
            x[:, :, T - S :].repeat_interleave(G, 1) if G > 1 else x[:, :, T - S :] for x in (k_BHTD, v_BHTD)
        )
        out, lse = attention_with_lse(q_BQSD, k_new, v_new, causal=True, scale=scale)
        if T > S:
            past_out, past_lse = _folded(q_BQSD, k_BHTD[:, :, : T - S], v_BHTD[:, :, : T - S], scale=scale)
            # exp(a) / (exp(a) + exp(b)) is a sigmoid of the difference.
            out = torch.lerp(out, past_out, torch.sigmoid(past_lse - lse)[..., None].to(out.dtype))
            lse = torch.logaddexp(lse, past_lse)
    if sink_logits is not None:
        out = out * torch.sigmoid(lse - sink_logits.float()[None, :, None])[..., None].to(out.dtype)
    return out


def _folded(
    q_BQSD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a mask; the G query heads of a group become G*S queries of one head."""
    B, Q, S, D = q_BQSD.shape
    H = k_BHTD.shape[1]
    out, lse = attention_with_lse(q_BQSD.reshape(B, H, Q // H * S, D), k_BHTD, v_BHTD, causal=False, scale=scale)
    return out.reshape(B, Q, S, D), lse.reshape(B, Q, S)


def _windowed(
    q_BQSD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    *,
    scale: float,
    window: int,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Sliding-window attention in fp32, where no fused kernel takes it.

    A block of queries meets the keys its queries see, many blocks at once.

    A block of b queries meets b + window keys whatever the length (the first of them is nobody's: it keeps strides
    whole). Missing keys before the first and behind the last are zeros that no query that counts can see.
    """
    B, Q, S, D = q_BQSD.shape
    H = k_BHTD.shape[1]
    q, k, v, hidden_NbK = _window_blocks(q_BQSD, k_BHTD, v_BHTD, window=window, block=_WINDOW_QUERY_BLOCK)
    n_blocks, b, K = hidden_NbK.shape
    q = q * scale
    outs = []
    step = max(1, _EXPLICIT_ELEMENTS // (B * Q * b * K))
    for first in range(0, n_blocks, step):
        part = slice(first, min(n_blocks, first + step))
        logits = torch.matmul(q[:, :, part], k[:, :, part].mT).view(B, H, -1, Q // H, b, K)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits.masked_fill_(hidden_NbK[part, None], -torch.inf)
        if sink_logits is None:
            weight = torch.softmax(logits, -1)
        else:
            sink = sink_logits.float().view(H, 1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            weight = torch.softmax(torch.cat((logits, sink), -1), -1)[..., :-1]
        outs.append(torch.matmul(weight.flatten(3, 4), v[:, :, part]).view(B, H, -1, Q // H, b, D))
    out = torch.cat(outs, 2).transpose(2, 3).reshape(B, Q, -1, D)[:, :, :S]
    return out.to(q_BQSD.dtype)


def _fused_windowed(
    q_BQSD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, *, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on a CPU, whose fused kernel takes a mask: a block of queries is a head of it."""
    B, Q, S, D = q_BQSD.shape
    G = Q // k_BHTD.shape[1]
    q, k, v, hidden_NbK = _window_blocks(q_BQSD, k_BHTD, v_BHTD, window=window, block=_FUSED_QUERY_BLOCK)
    n_blocks, b, K = hidden_NbK.shape
    # Only the first blocks reach keys before the first, and have masks of their own.
    n_edge = min(n_blocks, -(-max(0, window - (k_BHTD.shape[2] - S)) // b))
    step = max(1, _EXPLICIT_ELEMENTS // (G * b * K))
    parts = [slice(first, min(n_edge, first + step)) for first in range(0, n_edge, step)]
    if n_edge < n_blocks:
        parts.append(slice(n_edge, n_blocks))
    outs, lses = [], []
    for part in parts:
        hidden = hidden_NbK[part if part.start < n_edge else slice(n_edge, n_edge + 1)].repeat(1, G, 1)
        mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        q_part, k_part, v_part = (x[:, :, part].flatten(0, 1) for x in (q, k, v))
        out, lse = masked_attention(q_part, k_part, v_part, mask[None], scale=scale)
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs, 1).view(B, -1, n_blocks, G, b, D).transpose(2, 3).reshape(B, Q, -1, D)[:, :, :S]
    lse = torch.cat(lses, 1).view(B, -1, n_blocks, G, b).transpose(2, 3).reshape(B, Q, -1)[:, :, :S]
    return out.to(q_BQSD.dtype), lse


def _window_blocks(
    q_BQSD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, *, window: int, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return blocks of queries, the keys and values each meets, and which of them a query does not see.

    n blocks of b queries, ``block`` at most, meet K = b + window keys each: q [B, H, n, G*b, D], k and v [B, H, n, K,
    D], all fp32, and [n, b, K].
    """
    B, Q, S, D = q_BQSD.shape
    H, T = k_BHTD.shape[1:3]
    b = min(window, block, S)
    n_blocks = -(-S // b)
    behind = n_blocks * b - S
    past = min(T - S, window)
    q = F.pad(q_BQSD, (0, 0, 0, behind)).float().view(B, H, Q // H, n_blocks, b, D)
    k, v = (
        F.pad(x[:, :, T - S - past :], (0, 0, window - past, behind)).float().unfold(2, b + window, b).mT
        for x in (k_BHTD, v_BHTD)
    )
    of_query = torch.arange(b, device=q.device)[:, None]
    of_key = torch.arange(b + window, device=q.device)[None]
    hidden = (of_key <= of_query) | (of_key > of_query + window)
    # Before the first key there is nothing: position counts from the start of the first block's keys.
    start = torch.arange(0, n_blocks * b, b, device=q.device)[:, None, None]
    return q.transpose(2, 3).reshape(B, H, n_blocks, -1, D), k, v, hidden | (of_key + start < window - past)


def _explicit(
    q_BQSD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, *, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention in fp32 with the logits written out, block by block of queries: soft caps, odd head sizes."""
    B, Q, S, D = q_BQSD.shape
    H, T = k_BHTD.shape[1:3]
    block = max(1, min(_QUERY_BLOCK, _EXPLICIT_ELEMENTS // (B * Q * T)))
    outs, lses = [], []
    for start in range(0, S, block):
        end = min(S, start + block)
        last = T - S + end
        k, v = k_BHTD[:, :, :last].float(), v_BHTD[:, :, :last].float()
        q = q_BQSD[:, :, start:end].float().reshape(B, H, -1, D) * scale
        logits = torch.matmul(q, k.transpose(2, 3)).view(B, H, Q // H, end - start, last)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        position_q = torch.arange(T - S + start, last, device=q.device)[:, None]
        logits = logits.masked_fill(torch.arange(last, device=q.device)[None] > position_q, -torch.inf)
        lse = torch.logsumexp(logits, -1)
        weight = torch.exp(logits - lse[..., None]).view(B, H, -1, last)
        outs.append(torch.matmul(weight, v).view(B, Q, end - start, D))
        lses.append(lse.view(B, Q, end - start))
    return torch.cat(outs, 2).to(q_BQSD.dtype), torch.cat(lses, 2)
