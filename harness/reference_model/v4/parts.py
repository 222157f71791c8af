"""What a training layer consists of, in pieces that are compiled once for all layers and lengths.

Streams stay flat over rows and tokens, and no piece is given a view: a view of another tensor would be another graph.

Shapes: N = rows x tokens, S residual streams, M hidden size, E experts, I width of an expert.
"""

from typing import Any

import torch
import torch.nn.functional as F

from kvscope.methods.kernels.sinkhorn.ops import sinkhorn


def into_block(mixer: Any, norm: Any, streams_NSM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a block is given [N, M], and the weights of its way back: [N, S] and [N, S, S]."""
    S, eps = mixer.hc_mult, mixer.hc_eps
    flat = streams_NSM.flatten(1)
    # A norm without weights is one factor a token; behind the projection it costs no copy of the streams.
    factor_N1 = torch.rsqrt(flat.float().square().mean(-1, keepdim=True) + mixer.input_norm.eps)
    mixed = F.linear(flat, mixer.fn.to(flat.dtype)).float() * factor_N1
    pre, back, mix = mixed.tensor_split((S, 2 * S), -1)
    pre_base, back_base, mix_base = mixer.base.tensor_split((S, 2 * S))
    pre_scale, back_scale, mix_scale = mixer.scale.unbind(0)
    pre_NS = torch.sigmoid(pre * pre_scale + pre_base) + eps
    back_NS = 2 * torch.sigmoid(back * back_scale + back_base)
    mix_NSS = sinkhorn((mix * mix_scale + mix_base).unflatten(1, (S, S)), 2 * mixer.hc_sinkhorn_iters - 1, eps)
    x_NM = (pre_NS[..., None] * streams_NSM).sum(1).to(streams_NSM.dtype)
    return norm(x_NM), back_NS, mix_NSS


def out_of_block(
    out_NM: torch.Tensor, back_NS: torch.Tensor, mix_NSS: torch.Tensor, streams_NSM: torch.Tensor
) -> torch.Tensor:
    """Return the streams behind a block."""
    # Products of 4 x 4 matrices: written out, a compiler reads the streams once for all of them.
    mixed_NSM = (mix_NSS[..., None] * streams_NSM[:, :, None]).sum(1)
    return (back_NS[..., None] * out_NM[:, None] + mixed_NSM).to(streams_NSM.dtype)


def routed(gate: Any, x_NM: torch.Tensor) -> torch.Tensor:
    """Return each expert's weight for each token [N, E] in fp32, 0 where a token is not routed to it."""
    scores_NE = gate.score_fn(F.linear(x_NM, gate.weight).float())
    rank_NE = scores_NE + gate.e_score_correction_bias
    # A few experts are ranked by comparing each with each; of equal ones the first is taken.
    first_EE = torch.ones(gate.num_experts, gate.num_experts, device=x_NM.device, dtype=torch.bool).tril(-1)
    mine, other = rank_NE[..., None], rank_NE[:, None]
    better_NE = ((other > mine) | ((other == mine) & first_EE)).sum(-1)
    chosen_NE = scores_NE.masked_fill(better_NE >= gate.top_k, 0.0)
    weights_NE: torch.Tensor = chosen_NE / (chosen_NE.sum(-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor
    return weights_NE


def feed_forward(block: Any, x_NM: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, weighed 0 where it is not routed: with few experts cheaper than sorting tokens.

    The shared expert is one more with weight 1: two products of matrices do it all.
    """
    experts, shared, limit = block.experts, block.shared_experts, block.experts.limit
    gate_EIM, up_EIM = experts.gate_up_proj.chunk(2, dim=1)
    gate_weight = torch.cat((gate_EIM.flatten(0, 1), shared.gate_proj.weight))
    up_weight = torch.cat((up_EIM.flatten(0, 1), shared.up_proj.weight))
    down_weight = torch.cat((experts.down_proj.transpose(0, 1).flatten(1), shared.down_proj.weight), 1)
    gate, up = F.linear(x_NM, torch.cat((gate_weight, up_weight))).chunk(2, -1)
    inner = experts.act_fn(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    weights_NE = routed(block.gate, x_NM)
    share = weights_NE[..., None].expand(-1, -1, gate_EIM.shape[1]).flatten(1)
    share = torch.cat((share, share.new_ones((len(share), shared.gate_proj.out_features))), 1)
    return F.linear((inner * share).to(x_NM.dtype), down_weight)
