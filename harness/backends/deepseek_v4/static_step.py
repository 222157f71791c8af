"""The step of one sequence of DeepSeek-V4 at fixed addresses, as a CUDA graph needs it.

Everything that changes follows from the token's position, which the device reads, and from one number of the resident
set. A compressor makes an entry at every step and writes it where its next one stands; it counts from the step on that
has all of its tokens. So no step is another one than the steps between entries, and a step that runs twice at one
position leaves what it leaves running once.

The stock forward runs as it is, but for what waits for the device or moves tensors: compressors with their caches, and
experts (``one_step``).

Shapes: W window, D head size, n entries that a buffer has room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvscope.harness.backends.deepseek_v4.cache import ResidentCSA
from kvscope.harness.backends.deepseek_v4.token_ring import EntryPlace, TokenRing
from kvscope.harness.engine.glue import EngineCache, EngineLayer
from kvscope.methods.base import AttentionCall
from kvscope.methods.shape import tensor_bytes
from kvscope.methods.step_counters import StepCounters

GROWTH_ENTRIES = 16
"""Decoded entries that full buffers get room for."""


@dataclass(frozen=True)
class Place:
    """Where a step writes and what it sees, on the device: the same for all layers.

    Attributes:
        window_slot: the token's place in a window's ring [1].
        csa: of the next CSA entry; ``csa_count``: how many are seen [1].
        query_angles: cosines and sines of the native indexers' queries.
        hca: of the next HCA entry; None without such layers.
        window_bias: 0 for the places of a window's ring that hold a token, -inf for others [1, 1, 1, W].
        hca_bias: the same for HCA entries [1, 1, 1, n].
    """

    window_slot: torch.Tensor
    csa: EntryPlace
    csa_count: torch.Tensor
    query_angles: tuple[torch.Tensor, torch.Tensor]
    hca: EntryPlace | None
    window_bias: torch.Tensor
    hca_bias: torch.Tensor


class StaticLayer(EngineLayer):
    """One layer: its window as a ring, and what it has of entries.

    Attributes:
        window: [1, 1, W, D]; the order within it means nothing, since keys are rotated at their own position.
        rings: name -> tokens on their way into an entry.
        csa: entries and indexer keys of a CSA layer.
        hca_BnD: entries of an HCA layer.
        place: of the step that runs.
    """

    place: Place

    def __init__(
        self,
        index: int,
        stock: Any,
        *,
        window_tokens: int,
        makers: Mapping[str, Any],
        n_tokens: int,
        like: torch.Tensor,
        hca_entries: int,
    ) -> None:
        """Take over a stock layer's state; it holds no window and no pending token afterwards.

        Args:
            stock: of the sequence's own cache.
            makers: name -> compressor or indexer.
            n_tokens: so far.
            like: of the model's type and device.
            hca_entries: n, where it is an HCA layer.
        """
        super().__init__(index)
        D = like.shape[-1]
        self.window = like.new_zeros((1, 1, window_tokens, D))
        if stock.keys is not None:
            n_kept = min(stock.keys.shape[2], n_tokens)
            at = torch.arange(n_tokens - n_kept, n_tokens, device=like.device) % window_tokens
            self.window[:, :, at] = stock.keys[:, :, stock.keys.shape[2] - n_kept :]
        self.rings = {
            name: TokenRing(maker, stock, name, n_tokens=n_tokens, like=like) for name, maker in makers.items()
        }
        self.csa = stock if isinstance(stock, ResidentCSA) else None
        self.hca_BnD: torch.Tensor | None = None
        if makers and self.csa is None:
            self.hca_BnD = like.new_zeros((1, hca_entries, D))
            held = stock.compressed_kv["compressor"]
            if held is not None:
                self.hca_BnD[:, : held.shape[1]] = held
                stock.compressed_kv["compressor"] = None
        stock.keys = stock.values = None
        for name in makers:
            stock.buffer_kv[name] = stock.buffer_gate[name] = None
            if self.csa is not None:
                stock.overlap_kv[name] = stock.overlap_gate[name] = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store the token's entry over the oldest; key and value are one."""
        self.window.index_copy_(2, self.place.window_slot, key_states)
        return self.window, self.window

    def attend(self, call: AttentionCall) -> torch.Tensor:
        raise ValueError("the stock classes attend, over what update returned and the entries")

    def clear(self) -> None:
        """Drop every tensor."""
        self.rings.clear()
        self.window = torch.empty(0)
        self.csa = self.hca_BnD = None


class StaticCache(EngineCache):
    """What the stock model is called with at every step.

    Attributes:
        version: changes when tensors moved.
    """

    layers: list[StaticLayer]

    def __init__(
        self,
        cache: DynamicCache,
        modules: Any,
        *,
        config: Any,
        n_tokens: int,
        n_prompt_entries: int,
        reserve_tokens: int,
        spare_share: float,
        like: torch.Tensor,
        counters: StepCounters,
    ) -> None:
        """Take over the cache of a sequence that was opened and fed nothing.

        Args:
            cache: CSA layers are ``ResidentCSA``, which go on holding the entries; all else moves here.
            modules: the model's decoder layers.
            n_tokens: of the prompt.
            n_prompt_entries: of every CSA layer.
            reserve_tokens: steps to have room for.
            spare_share: room beyond the resident entries, as ``ResidentCSA.keep_buffers``.
            like: an empty tensor [0, D] of the model's type, on its device.
            counters: takes one number.
        """
        self.version = 0
        rates = config.compress_rates
        self._csa_rate = rates["compressed_sparse_attention"]
        self._hca_rate = rates["heavily_compressed_attention"]
        self._window_tokens = config.sliding_window
        self._n_prompt_entries, self._like = n_prompt_entries, like
        makers = [makers_of(module)["compressor"] for module in modules if makers_of(module)]
        self._makers = {maker.compress_rate: maker for maker in reversed(makers)}
        # One more than will be whole: every step writes where the next entry stands.
        self._hca_entries = (n_tokens + reserve_tokens) // self._hca_rate + 1
        self._shift = counters.take()
        layers = []
        for index, (stock, module) in enumerate(zip(cache.layers, modules, strict=True)):
            layers.append(
                StaticLayer(
                    index, stock, window_tokens=self._window_tokens, makers=makers_of(module), n_tokens=n_tokens,
                    like=like, hca_entries=self._hca_entries,
                )
            )  # fmt: skip
        super().__init__(layers)
        reserved = (n_tokens + reserve_tokens) // self._csa_rate - n_prompt_entries + 1
        for csa in self.csa_layers:
            csa.keep_buffers(spare_share, reserve_entries=reserved)
        self._addresses: list[tuple[int, int]] | None = None

    @property
    def csa_layers(self) -> list[ResidentCSA]:
        """The holders of CSA entries."""
        return [layer.csa for layer in self.layers if layer.csa is not None]

    def _buffers(self) -> list[tuple[int, int]]:
        return [(each.data_ptr(), each.shape[1]) for csa in self.csa_layers for each in csa.buffers.values()]

    def begin_step(self, n_tokens: int) -> None:
        """Before the step of the token at position ``n_tokens``: make room, tell the device of the resident set."""
        for csa in self.csa_layers:
            if csa.compressed_kv["compressor"].shape[1] == csa.buffers["compressor"].shape[1]:
                csa.grow(GROWTH_ENTRIES)
        if n_tokens // self._hca_rate == self._hca_entries:
            self._hca_entries += GROWTH_ENTRIES
            for layer in self.layers:
                if layer.hca_BnD is not None:
                    layer.hca_BnD = torch.nn.functional.pad(layer.hca_BnD, (0, 0, 0, GROWTH_ENTRIES))
            self.version += 1
        addresses = self._buffers()
        if addresses != self._addresses:
            self.version += self._addresses is not None  # at the first step nothing is captured yet
            self._addresses = addresses
        resident = next((len(csa.resident) for csa in self.csa_layers), 0)
        self._shift.set(resident - self._n_prompt_entries)

    def end_step(self, n_tokens: int) -> None:
        """The sequence is ``n_tokens`` long now."""
        if n_tokens % self._csa_rate == 0:
            for csa in self.csa_layers:
                csa.count_entry()

    def place(self, position: torch.Tensor) -> None:
        """Work out, on the device, where the step of the token at ``position`` [1] writes and what it sees."""
        device, like, shift = position.device, self._like, self._shift.device_1
        csa, hca = (self._makers.get(rate) for rate in (self._csa_rate, self._hca_rate))
        assert csa is not None

        def bias(seen: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1, 1, 1, len(seen), dtype=like.dtype, device=device).masked_fill(~seen, float("-inf"))

        place = Place(
            window_slot=position % self._window_tokens,
            csa=EntryPlace.of(csa, position, slot=position // self._csa_rate + shift, like=like),
            csa_count=(position + 1) // self._csa_rate + shift,
            query_angles=csa.rotary_emb(like, position_ids=position[None], layer_type=csa.rope_layer_type),
            hca=None if hca is None else EntryPlace.of(hca, position, slot=position // self._hca_rate, like=like),
            window_bias=bias(torch.arange(self._window_tokens, device=device) <= position),
            hca_bias=bias(torch.arange(self._hca_entries, device=device) < (position + 1) // self._hca_rate),
        )
        for layer in self.layers:
            layer.place = place

    @property
    def window_bias(self) -> torch.Tensor:
        """Of the step that runs."""
        bias: torch.Tensor = self.layers[0].place.window_bias
        return bias

    def live_bytes(self) -> dict[str, int]:
        """Return the bytes of every live tensor by kind (``compressed_bytes.KINDS``)."""
        csa, layers = self.csa_layers, self.layers
        rings = [ring for layer in layers for ring in layer.rings.values()]
        return {
            "csa_kv": tensor_bytes(each.buffers["compressor"] for each in csa),
            "indexer_keys": tensor_bytes(each.buffers["indexer"] for each in csa),
            "hca_kv": tensor_bytes(layer.hca_BnD for layer in layers),
            "window": tensor_bytes(layer.window for layer in layers),
            "buffers": tensor_bytes(tensor for ring in rings for tensor in (ring.kv_RF, ring.gate_RF)),
        }

    def clear(self) -> None:
        """Drop every tensor, and give the counter back."""
        for layer in self.layers:
            layer.clear()
        self.layers = []
        self._shift.release()
        self._makers.clear()


def makers_of(module: Any) -> dict[str, Any]:
    """Return what makes entries in a decoder layer, under the names of the stock cache."""
    compressor = module.self_attn.compressor
    if compressor is None:
        return {}
    indexer = getattr(compressor, "indexer", None)
    return {"compressor": compressor} | ({} if indexer is None else {"indexer": indexer})
