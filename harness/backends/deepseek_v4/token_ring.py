"""Tokens of one compressor on their way into an entry, at fixed addresses.

Shapes: M hidden size, R places of the ring, r tokens an entry, F features of the compressor's projections, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch

from kvscope.methods.kernels.token_rows.ops import rotate


@dataclass(frozen=True)
class EntryPlace:
    """Where a token stands among those of an entry, on the device; the same for all compressors of one rate.

    Attributes:
        within: its place in the window [1]; ``ring_slot``: in the ring [1].
        rows: places in the ring of the window before, then of its own [R].
        slot: where the entry is written among the entries [1].
        angles: cosines and sines of the entry, which is at the window's first token.
    """

    within: torch.Tensor
    ring_slot: torch.Tensor
    rows: torch.Tensor
    slot: torch.Tensor
    angles: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, maker: Any, position: torch.Tensor, *, slot: torch.Tensor, like: torch.Tensor) -> "EntryPlace":
        """Work out the place of the token at ``position`` [1].

        Args:
            maker: any compressor of the rate.
            like: of the model's type.
        """
        r, R = maker.compress_rate, ring_tokens(maker)
        within = position % r
        first = position - within
        return cls(
            within=within,
            ring_slot=position % R,
            rows=(first + R - r + torch.arange(R, device=position.device)) % R,
            slot=slot,
            angles=maker.rotary_emb(like, position_ids=first[None], layer_type=maker.rope_layer_type),
        )


def ring_tokens(maker: Any) -> int:
    """Return R: an overlapping compressor projects to twice its width, and an entry of it takes in two windows."""
    overlaps = maker.kv_proj.out_features == 2 * maker.head_dim
    return int(maker.compress_rate) * (2 if overlaps else 1)


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
        F, R = maker.kv_proj.out_features, ring_tokens(maker)
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

    def entry(self, maker: Any, hidden_B1M: torch.Tensor, place: EntryPlace) -> torch.Tensor:
        """Take in a token; return the entry [1, D] that its window makes with the tokens so far."""
        r, D = maker.compress_rate, maker.head_dim
        self.kv_RF.index_copy_(0, place.ring_slot, maker.kv_proj(hidden_B1M)[0])
        gate_1F = maker.gate_proj(hidden_B1M)[0] + maker.position_bias.index_select(0, place.within)
        self.gate_RF.index_copy_(0, place.ring_slot, gate_1F.to(self.gate_RF.dtype))
        value, gate = self.kv_RF, self.gate_RF
        if r < len(value):
            value, gate = (_both(ring_RF.index_select(0, place.rows), r, D) for ring_RF in (value, gate))
        weights = gate.softmax(0, dtype=torch.float32).to(value.dtype)
        entry_1D = maker.kv_norm((value * weights).sum(0, keepdim=True))
        return rotate(entry_1D, *place.angles)


def _both(rows_RF: torch.Tensor, r: int, D: int) -> torch.Tensor:
    """Return what the window before gives to the next entry, and what a window gives to its own: [R, D]."""
    return torch.cat((rows_RF[:r, :D], rows_RF[r:, D:]))
