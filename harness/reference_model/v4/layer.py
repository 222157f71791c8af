"""A stock DeepSeek-V4 model whose layers compute as stock ones do, for whole unpadded rows that start at position 0.

A stock layer is some 900 small operations, forward and backward. Its pieces are compiled once for all layers and
lengths (``parts.py`` has those that work token by token); attention stays [B, T, Q, D], so that nothing is transposed.

Shapes: B rows, T tokens, N = B x T, S residual streams, M hidden size, Q query heads, D head size, n entries, r tokens
an entry, E experts, P rotating pairs, J indexer heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4DecoderLayer, DeepseekV4ForCausalLM

from kvscope.harness.reference_model.v4 import attention
from kvscope.harness.reference_model.v4.parts import feed_forward, into_block, out_of_block

Rope = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""``main`` or ``compress`` -> cosines and sines of every position [1, T, P]."""


def rotated(x_BTHD: torch.Tensor, cos_BTP: torch.Tensor, sin_BTP: torch.Tensor) -> torch.Tensor:
    """Rotate the last 2 P numbers of each head, in pairs of neighbours; angles may be the same for all rows."""
    fixed_dims = x_BTHD.shape[-1] - 2 * cos_BTP.shape[-1]
    fixed, turning = x_BTHD[..., :fixed_dims], x_BTHD[..., fixed_dims:]
    a, b = turning.reshape(*turning.shape[:-1], -1, 2).float().unbind(-1)
    cos, sin = cos_BTP[:, :, None], sin_BTP[:, :, None]
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((fixed, turned.to(x_BTHD.dtype)), -1)


def entries_of(maker: Any, hidden_BTM: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the entries [B, n, D] that a compressor or an indexer makes of whole groups of ``r`` tokens.

    A projection of twice the width holds what a token gives to the next entry, then what it gives to its own.
    """
    B, T, _ = hidden_BTM.shape
    r, D, n = maker.compress_rate, maker.head_dim, T // maker.compress_rate
    if n == 0:
        return hidden_BTM.new_zeros((B, 0, D))
    grouped_BTM = hidden_BTM if T % r == 0 else hidden_BTM[:, : n * r]
    value = maker.kv_proj(grouped_BTM).view(B, n, r, -1)
    gate = maker.gate_proj(grouped_BTM).view(B, n, r, -1) + maker.position_bias
    if value.shape[-1] == 2 * D:
        first = (0, 0, 0, 0, 1, 0)
        value = torch.cat((F.pad(value[:, :-1, :, :D], first), value[..., D:]), 2)
        gate = torch.cat((F.pad(gate[:, :-1, :, :D], first, value=float("-inf")), gate[..., D:]), 2)
    weights = gate.softmax(2, dtype=torch.float32).to(value.dtype)
    entries_BnD = maker.kv_norm((value * weights).sum(2))
    cos, sin = (angles[:, : n * r : r] for angles in rope)
    return rotated(entries_BnD[:, :, None], cos, sin)[:, :, 0]


def seen_entries(positions_T: torch.Tensor, rate: int) -> torch.Tensor:
    """Return how many entries a query at each position may see."""
    return (positions_T + 1) // rate


def index_scores(
    indexer: Any, hidden_BTM: torch.Tensor, low_BTR: torch.Tensor, keys_BnD: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Return the native indexer's scores [B, T, n], later entries not masked; ``rope`` at the queries' positions."""
    q_BTJD = rotated(indexer.q_b_proj(low_BTR).unflatten(-1, (-1, indexer.head_dim)), *rope)
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


def queries_and_window(
    module: Any, x_BTM: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rotated queries [B, T, Q, D], rotated window entries [B, T, D], and the queries' low-rank states."""
    low_BTR = module.q_a_norm(module.q_a_proj(x_BTM))
    q_BTQD = rotated(module.q_b_norm(module.q_b_proj(low_BTR).unflatten(-1, (-1, module.head_dim))), *rope)
    kv_BTD = rotated(module.kv_norm(module.kv_proj(x_BTM))[:, :, None], *rope)[:, :, 0]
    return q_BTQD, kv_BTD, low_BTR


def before_entries(
    module: Any, x_NM: torch.Tensor, rows: int, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return queries, what they get of their window and its denominators, their low-rank states, and the entries."""
    x_BTM = x_NM.view(rows, -1, x_NM.shape[1])
    q_BTQD, kv_BTD, low_BTR = queries_and_window(module, x_BTM, (cos, sin))
    kv_BTD = kv_BTD.to(q_BTQD.dtype)  # transformers 5.17's norms return fp32 under autocast
    out_BTQD, lse_BTQ = attention.window_attention(
        q_BTQD, kv_BTD, module.sinks, window=module.sliding_window, scale=module.scaling
    )
    maker = module.compressor
    e_BnD = None if maker is None else entries_of(maker, x_BTM, (cos, sin)).to(q_BTQD.dtype)
    return q_BTQD, out_BTQD, lse_BTQ, low_BTR, e_BnD


def behind_entries(module: Any, out_BTQD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return attention's output [N, M] from what its heads have got."""
    out_NQD = rotated(out_BTQD, cos, -sin).flatten(0, 1)
    grouped_NGR = module.o_a_proj(out_NQD.reshape(len(out_NQD), module.o_a_proj.n_groups, -1))
    out_NM: torch.Tensor = module.o_b_proj(grouped_NGR.flatten(1))
    return out_NM


@dataclass(frozen=True)
class Parts:
    """The pieces of a layer, compiled or not."""

    into: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = into_block
    out_of: Callable[..., torch.Tensor] = out_of_block
    feed_forward: Callable[..., torch.Tensor] = feed_forward
    before_entries: Callable[..., tuple[Any, ...]] = before_entries
    with_all: Callable[..., torch.Tensor] = attention.joined_with_few
    behind_entries: Callable[..., torch.Tensor] = behind_entries


def compiled_parts(**options: Any) -> Parts:
    """Return the pieces compiled for any number of rows and tokens."""
    # Three kinds of attention, and lengths that fill their last block or do not.
    torch._dynamo.config.cache_size_limit = 64
    # As many rows as heads, or tokens as a head's numbers, are chance: such a graph would serve no other length.
    torch.fx.experimental._config.use_duck_shape = False
    whole = {"dynamic": True, **options}
    return Parts(**{name: torch.compile(part, **whole) for name, part in vars(Parts()).items()})


class TrainingLayer(DeepseekV4DecoderLayer):  # type: ignore[misc]  # transformers is untyped
    """A stock layer with the same parameters and another way through them."""

    parts = Parts()

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
        out_NM = self.attend(x_NM, rows, rope, topk)
        streams_NSM = self.parts.out_of(out_NM, back_NS, mix_NSS, hidden_states)
        x_NM, back_NS, mix_NSS = self.parts.into(self.ffn_hc, self.post_attention_layernorm, streams_NSM)
        return self.parts.out_of(self.parts.feed_forward(self.mlp, x_NM), back_NS, mix_NSS, streams_NSM)

    def attend(self, x_NM: torch.Tensor, rows: int, rope: Rope, topk: int) -> torch.Tensor:
        """Return attention's output [N, M] with a stock attention module's parameters."""
        module = self.self_attn
        cos, sin = rope[module.rope_layer_type]
        q_BTQD, out_BTQD, lse_BTQ, low_BTR, e_BnD = self.parts.before_entries(module, x_NM, rows, cos, sin)
        maker = module.compressor
        if maker is not None:
            given = {"scale": module.scaling}
            if hasattr(maker, "indexer") and topk < e_BnD.shape[1]:
                x_BTM = x_NM.view(rows, -1, x_NM.shape[1])
                chosen_BTk = chosen_entries(maker.indexer, x_BTM, low_BTR, (cos, sin), topk)
                out_BTQD = attention.joined_with_chosen(q_BTQD, e_BnD, chosen_BTk, out_BTQD, lse_BTQ, **given)
            else:
                few = e_BnD.shape[1] <= attention.FEW_ENTRIES
                join = self.parts.with_all if few else attention.joined_with_entries
                out_BTQD = join(q_BTQD, e_BnD, out_BTQD, lse_BTQ, rate=maker.compress_rate, **given)
        return self.parts.behind_entries(module, out_BTQD, cos, sin)


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
