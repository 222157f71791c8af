"""Attention weights of some queries over all keys, written out.

Shapes: G query heads of a KV head, S queries, T tokens, D head size.
"""

import torch

from kvscope.methods.call import AttentionCall
from kvscope.methods.gather import cap, scores


def attention_weights(q_GSD: torch.Tensor, k_TD: torch.Tensor, *, call: AttentionCall, head: int) -> torch.Tensor:
    """Return the softmax weights [G, S, T] in fp32 of the last S of T tokens' queries, causal.

    Args:
        q_GSD: of one KV head's group.
        k_TD: its keys.
        call: for scale, soft cap and sink logits, whose mass the weights leave out.
        head: the KV head.
    """
    G, S, D = q_GSD.shape
    T = len(k_TD)
    logits_GST = scores(q_GSD.reshape(1, G * S, D), k_TD.T[None]).view(G, S, T) * call.scale
    logits_GST = cap(logits_GST, call.softcap)
    if S > 1:
        position_T = torch.arange(T, device=k_TD.device)
        logits_GST = logits_GST.masked_fill(position_T > position_T[T - S :, None], -torch.inf)
    if call.sink_logits is None:
        return torch.softmax(logits_GST, -1)
    sink_GS1 = call.sink_logits.view(-1, G)[head].float()[:, None, None].expand(G, S, 1)
    return torch.softmax(torch.cat([logits_GST, sink_GS1], -1), -1)[..., :T]
