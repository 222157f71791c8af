"""Exact attention of a chunk of queries over everything before it and itself, for prefill and stock layers.

Shapes: B batch, Q query heads, H KV heads, G = Q/H, S new tokens, T keys (the queries are the last S of them), D head
size.

Torch's fused kernels align a causal mask to the first key, which is wrong for a chunk behind a past. So the past is one
call without a mask (query heads of a group folded into the query length: K and V are not repeated), the diagonal block
one causal call, and the two are joined by their log-sum-exp.
"""

import torch
import torch.nn.functional as F

from kvscope.methods.flash import attention_with_lse, flash_runs_on, flash_window_runs_on, windowed_attention

_EXPLICIT_ELEMENTS = 2**26
_QUERY_BLOCK = 512
_WINDOW_QUERY_BLOCK = 256


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
    if window is not None:
        return _windowed(q_BQSD, k_BHTD, v_BHTD, scale=scale, window=window, softcap=softcap, sink_logits=sink_logits)
    if softcap is not None or not flash_runs_on(q_BQSD):
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
    H, T = k_BHTD.shape[1:3]
    b = min(window, _WINDOW_QUERY_BLOCK, S)
    n_blocks = -(-S // b)
    behind = n_blocks * b - S
    past = min(T - S, window)
    q = F.pad(q_BQSD, (0, 0, 0, behind)).float().view(B, H, Q // H, n_blocks, b, D)
    q = q.transpose(2, 3).reshape(B, H, n_blocks, -1, D) * scale
    k, v = (
        F.pad(x[:, :, T - S - past :], (0, 0, window - past, behind)).float().unfold(2, b + window, b)
        for x in (k_BHTD, v_BHTD)
    )  # [B, H, n, D, b + window]
    of_query = torch.arange(b, device=q.device)[:, None]
    of_key = torch.arange(b + window, device=q.device)[None]
    hidden = (of_key <= of_query) | (of_key > of_query + window)
    # Before the first key there is nothing: position counts from the start of the first block's keys.
    start = torch.arange(0, n_blocks * b, b, device=q.device)[:, None, None]
    hidden_NbK = hidden | (of_key + start < window - past)
    outs = []
    step = max(1, _EXPLICIT_ELEMENTS // (B * Q * b * (b + window)))
    for first in range(0, n_blocks, step):
        part = slice(first, min(n_blocks, first + step))
        logits = torch.matmul(q[:, :, part], k[:, :, part]).view(B, H, -1, Q // H, b, b + window)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits.masked_fill_(hidden_NbK[part, None], -torch.inf)
        if sink_logits is None:
            weight = torch.softmax(logits, -1)
        else:
            sink = sink_logits.float().view(H, 1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            weight = torch.softmax(torch.cat((logits, sink), -1), -1)[..., :-1]
        outs.append(torch.matmul(weight.flatten(3, 4), v[:, :, part].mT).view(B, H, -1, Q // H, b, D))
    out = torch.cat(outs, 2).transpose(2, 3).reshape(B, Q, -1, D)[:, :, :S]
    return out.to(q_BQSD.dtype)


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
