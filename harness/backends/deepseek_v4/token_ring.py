"""Tokens of one compressor on their way into an entry, at fixed addresses.

Shapes: M hidden size, R places of the ring, r tokens an entry, F features of the compressor's projections, D head size.
"""

from typing import Any

import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb


class TokenRing:
    """Tokens on their way into an entry, each at its position modulo the ring's size.

    An overlapping compressor's entry takes in tokens of the entry before, too: its ring holds those of two.

    Attributes:
        kv_RF, gate_RF: their projections; gates with the compressor's position biases.
    """

    def __init__(self, maker: Any, stock: Any, name: str, *, n_tokens: int, like: torch.Tensor) -> None:
        """Take over what a stock cache layer holds after ``n_tokens``.

        Args:
            maker: the compressor or indexer.
            name: of its state in ``stock``.
            like: of the model's type and device.
        """
        r, D = maker.compress_rate, maker.head_dim
        F = maker.kv_proj.out_features
        R = 2 * r if F == 2 * D else r
        gate_dtype = torch.promote_types(like.dtype, maker.position_bias.dtype)
        self.kv_RF = like.new_zeros((R, F))
        self.gate_RF = like.new_full((R, F), float("-inf"), dtype=gate_dtype)
        first = n_tokens - n_tokens % r
        pending = stock.buffer_kv[name]
        if pending is not None and pending.shape[1]:
            at = torch.arange(first, n_tokens, device=like.device) % R
            self.kv_RF[at] = pending[0]
            self.gate_RF[at] = (stock.buffer_gate[name][0] + maker.position_bias[: len(at)]).to(gate_dtype)
        if r < R and stock.overlap_kv[name] is not None:
            at = torch.arange(first - r, first, device=like.device) % R
            self.kv_RF[at, :D] = stock.overlap_kv[name][0].to(like.dtype)
            self.gate_RF[at, :D] = stock.overlap_gate[name][0].to(gate_dtype)

    def entry(self, maker: Any, hidden_B1M: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Take in a token; return the entry [1, D] that its window makes with the tokens so far.

        Args:
            position: of the token [1].
        """
        r, D, R = maker.compress_rate, maker.head_dim, len(self.kv_RF)
        within = position % r
        first = position - within
        self.kv_RF.index_copy_(0, position % R, maker.kv_proj(hidden_B1M)[0])
        gate_1F = maker.gate_proj(hidden_B1M)[0] + maker.position_bias[within]
        self.gate_RF.index_copy_(0, position % R, gate_1F.to(self.gate_RF.dtype))
        value, gate = self.kv_RF, self.gate_RF
        if r < R:
            own = (first + torch.arange(r, device=position.device)) % R
            before = (own + r) % R
            value = torch.cat((value[before, :D], value[own, D:]))
            gate = torch.cat((gate[before, :D], gate[own, D:]))
        weights = gate.softmax(0, dtype=torch.float32).to(value.dtype)
        entry_11D = maker.kv_norm((value * weights).sum(0, keepdim=True))[None]
        angles = maker.rotary_emb(entry_11D, position_ids=first[None], layer_type=maker.rope_layer_type)
        made: torch.Tensor = apply_rotary_pos_emb(entry_11D[None], *angles)[0, 0]
        return made
