"""A stock DeepSeek-V4 model whose layers compute as stock ones do, for whole unpadded rows that start at position 0.

What works token by token (mixing of the residual streams, experts) is apart from attention, so that it can be compiled
once for all layers and lengths: a stock layer has some 300 small operations in the mixing alone. Streams stay flat over
rows and tokens, and no part is given a view: a view of another tensor would be another graph.

Shapes: B rows, T tokens, N = B x T, S residual streams, M hidden size, Q query heads, D head size, n entries, r tokens
an entry, E experts, P rotating pairs, J indexer heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4ForCausalLM,
    apply_rotary_pos_emb,
)

from kvscope.harness.reference_model.v4 import attention

Rope = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""``main`` or ``compress`` -> cosines and sines of every position [1, T, P]."""


def into_block(mixer: Any, norm: Any, streams_NSM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a block is given [N, M], and the weights of its way back: [N, S] and [N, S, S]."""
    back_1NS, mix_1NSS, x_1NM = mixer(streams_NSM[None])
    return norm(x_1NM[0]), back_1NS[0], mix_1NSS[0]


def out_of_block(
    out_NM: torch.Tensor, back_NS: torch.Tensor, mix_NSS: torch.Tensor, streams_NSM: torch.Tensor
) -> torch.Tensor:
    """Return the streams behind a block."""
    dtype = streams_NSM.dtype
    return back_NS.to(dtype)[..., None] * out_NM[:, None] + mix_NSS.to(dtype).mT @ streams_NSM


def feed_forward(block: Any, x_NM: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, weighed 0 where it is not routed: with few experts cheaper than sorting tokens."""
    _, weights_Nk, expert_Nk = block.gate(x_NM)
    experts = block.experts
    nothing_NE = weights_Nk.new_zeros((len(weights_Nk), experts.num_experts))
    weights_EN1 = nothing_NE.scatter(1, expert_Nk, weights_Nk).T[..., None]
    gate_ENI, up_ENI = (x_NM @ experts.gate_up_proj.mT).chunk(2, dim=-1)
    inner_ENI = experts.act_fn(gate_ENI.clamp(max=experts.limit)) * up_ENI.clamp(-experts.limit, experts.limit)
    routed_NM = ((inner_ENI @ experts.down_proj.mT) * weights_EN1).sum(0)
    out: torch.Tensor = routed_NM + block.shared_experts(x_NM)
    return out


@dataclass(frozen=True)
class TokenParts:
    """The parts of a layer that work token by token, compiled or not."""

    into: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = into_block
    out_of: Callable[..., torch.Tensor] = out_of_block
    feed_forward: Callable[..., torch.Tensor] = feed_forward


def compiled_parts(**options: Any) -> TokenParts:
    """Return the parts compiled for any number of tokens."""
    whole = {"dynamic": True, **options}
    return TokenParts(
        into=torch.compile(into_block, **whole),
        out_of=torch.compile(out_of_block, **whole),
        feed_forward=torch.compile(feed_forward, **whole),
    )


def entries_of(maker: Any, hidden_BTM: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the entries [B, n, D] that a compressor or an indexer makes of whole groups of ``r`` tokens.

    A projection of twice the width holds what a token gives to the next entry, then what it gives to its own.
    """
    B, T, _ = hidden_BTM.shape
    r, D, n = maker.compress_rate, maker.head_dim, T // maker.compress_rate
    if n == 0:
        return hidden_BTM.new_zeros((B, 0, D))
    value = maker.kv_proj(hidden_BTM[:, : n * r]).view(B, n, r, -1)
    gate = maker.gate_proj(hidden_BTM[:, : n * r]).view(B, n, r, -1) + maker.position_bias
    if value.shape[-1] == 2 * D:
        first = (0, 0, 0, 0, 1, 0)
        value = torch.cat((F.pad(value[:, :-1, :, :D], first), value[..., D:]), 2)
        gate = torch.cat((F.pad(gate[:, :-1, :, :D], first, value=float("-inf")), gate[..., D:]), 2)
    weights = gate.softmax(2, dtype=torch.float32).to(value.dtype)
    entries_BnD = maker.kv_norm((value * weights).sum(2))
    cos, sin = (angles[:, : n * r : r].to(entries_BnD.dtype) for angles in rope)
    rotated: torch.Tensor = apply_rotary_pos_emb(entries_BnD[:, None], cos, sin)[:, 0]
    return rotated


def seen_entries(positions_T: torch.Tensor, rate: int) -> torch.Tensor:
    """Return how many entries a query at each position may see."""
    return (positions_T + 1) // rate


def index_scores(
    indexer: Any, hidden_BTM: torch.Tensor, low_BTR: torch.Tensor, keys_BnD: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Return the native indexer's scores [B, T, n], later entries not masked; ``rope`` at the queries' positions."""
    q_BJTD = indexer.q_b_proj(low_BTR).unflatten(-1, (-1, indexer.head_dim)).transpose(1, 2)
    q_BTJD = apply_rotary_pos_emb(q_BJTD, *rope).transpose(1, 2)
    scores: torch.Tensor = indexer.scorer(q_BTJD, keys_BnD, hidden_BTM)
    return scores


@torch.no_grad()
def chosen_entries(
    indexer: Any, hidden_BTM: torch.Tensor, low_BTR: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], topk: int
) -> torch.Tensor:
    """Return the native indexer's choice [B, T, k], -1 where a query sees fewer entries than k."""
    keys_BnD = entries_of(indexer, hidden_BTM, rope)
    seen_T = seen_entries(torch.arange(hidden_BTM.shape[1], device=hidden_BTM.device), indexer.compress_rate)
    entry_n = torch.arange(keys_BnD.shape[1], device=hidden_BTM.device)
    parts = []
    for start in range(0, hidden_BTM.shape[1], attention.CHOSEN_QUERIES):
        at = slice(start, start + attention.CHOSEN_QUERIES)
        scores = index_scores(indexer, hidden_BTM[:, at], low_BTR[:, at], keys_BnD, (rope[0][:, at], rope[1][:, at]))
        scores = scores.masked_fill(entry_n >= seen_T[at, None], float("-inf"))
        best = scores.topk(min(topk, len(entry_n)), sorted=False)
        parts.append(best.indices.masked_fill(best.values == float("-inf"), -1))
    return torch.cat(parts, 1)


class TrainingLayer(DeepseekV4DecoderLayer):  # type: ignore[misc]  # transformers is untyped
    """A stock layer with the same parameters and another way through them."""

    parts = TokenParts()

    def entering_attention(self, streams_NSM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what attention is given [N, M], and the weights of its way back."""
        return self.parts.into(self.attn_hc, self.input_layernorm, streams_NSM)

    def forward(self, hidden_states: torch.Tensor, *, rows: int, rope: Rope, topk: int) -> torch.Tensor:
        """Return the streams [N, S, M] behind the layer, from those before it.

        Args:
            rows: B.
            topk: entries that a query of a compressed-sparse layer attends to, by its indexer.
        """
        x_NM, back_NS, mix_NSS = self.entering_attention(hidden_states)
        out_NM = attend(self.self_attn, x_NM.view(rows, -1, x_NM.shape[1]), rope=rope, topk=topk)
        streams_NSM = self.parts.out_of(out_NM, back_NS, mix_NSS, hidden_states)
        x_NM, back_NS, mix_NSS = self.parts.into(self.ffn_hc, self.post_attention_layernorm, streams_NSM)
        return self.parts.out_of(self.parts.feed_forward(self.mlp, x_NM), back_NS, mix_NSS, streams_NSM)


def queries_and_window(
    module: Any, x_BTM: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rotated queries [B, Q, T, D], rotated window entries [B, 1, T, D], and the queries' low-rank states."""
    low_BTR = module.q_a_norm(module.q_a_proj(x_BTM))
    q_BQTD = module.q_b_norm(module.q_b_proj(low_BTR).unflatten(-1, (-1, module.head_dim)).transpose(1, 2))
    kv_B1TD = module.kv_norm(module.kv_proj(x_BTM))[:, None]
    return apply_rotary_pos_emb(q_BQTD, *rope), apply_rotary_pos_emb(kv_B1TD, *rope), low_BTR


def attend(module: Any, x_BTM: torch.Tensor, *, rope: Rope, topk: int) -> torch.Tensor:
    """Return attention's output [N, M] with a stock attention module's parameters."""
    cos, sin = rope[module.rope_layer_type]
    q_BQTD, kv_B1TD, low_BTR = queries_and_window(module, x_BTM, (cos, sin))
    kv_B1TD = kv_B1TD.to(q_BQTD.dtype)  # transformers 5.17's norms return fp32 under autocast
    given = {"scale": module.scaling}
    out_BQTD, lse_BQT = attention.window_attention(q_BQTD, kv_B1TD, module.sinks, window=module.sliding_window, **given)
    maker = module.compressor
    if maker is not None:
        e_BnD = entries_of(maker, x_BTM, (cos, sin)).to(q_BQTD.dtype)
        if hasattr(maker, "indexer") and topk < e_BnD.shape[1]:
            chosen_BTk = chosen_entries(maker.indexer, x_BTM, low_BTR, (cos, sin), topk)
            out_BQTD = attention.joined_with_chosen(q_BQTD, e_BnD, chosen_BTk, out_BQTD, lse_BQT, **given)
        else:
            rate = maker.compress_rate
            out_BQTD = attention.joined_with_entries(q_BQTD, e_BnD, out_BQTD, lse_BQT, rate=rate, **given)
    out_NQD = apply_rotary_pos_emb(out_BQTD, cos, -sin).transpose(1, 2).flatten(0, 1)
    grouped_NGR = module.o_a_proj(out_NQD.flatten(1).unflatten(1, (module.o_a_proj.n_groups, -1)))
    out_NM: torch.Tensor = module.o_b_proj(grouped_NGR.flatten(1))
    return out_NM


class TrainingV4(DeepseekV4ForCausalLM):  # type: ignore[misc]  # transformers is untyped
    """A stock model with training's layers: parameters have the stock names.

    Attributes:
        in_fp32: names of modules and parameters that the stock classes keep in fp32, whatever the model's type.
    """

    in_fp32 = frozenset(DeepseekV4ForCausalLM._keep_in_fp32_modules_strict)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers = [TrainingLayer(config, at) for at in range(config.num_hidden_layers)]
        self.model.layers = nn.ModuleList(layers)
        self.post_init()
