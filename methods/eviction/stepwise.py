"""Eviction at every step: a cache of fixed size, in which the new token takes the place of the least one.

The size counts the token being decoded, as a sliding window's does. What leaves is chosen by the weights of the step
before, so a cache of C tokens here is one of C - 1 in papers that append first and evict afterwards.

Shapes: Q query heads, H KV heads, G = Q/H, T tokens held, D head size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from kvscope.methods.attention import paged_attention
from kvscope.methods.base import AttentionCall, SequenceCache
from kvscope.methods.eviction.budget import EvictionConfig
from kvscope.methods.eviction.kept import Eviction, held_footprint, stock_footprint
from kvscope.methods.gather import cap, page_logits
from kvscope.methods.shape import Footprint, ModelShape, tensor_bytes
from kvscope.methods.store import PagePool, PromptKV

ConfigT = TypeVar("ConfigT", bound=EvictionConfig)


class StepwiseEviction(Eviction[ConfigT]):
    """A cache that holds at most so many tokens of each KV head, decoded ones included."""

    through_decode = True
    kv_refusal = "each step's token takes the place of an older one, and a packed page is written as a whole"

    def capacity_tokens(self, n_tokens: int) -> int | None:
        """Return the most tokens a KV head holds after a prompt of ``n_tokens``; None: nothing is ever evicted."""
        self.n_kept_tokens(n_tokens)  # refuses a budget that is too small
        if self.config.evicts_nothing:
            return None
        return max(self.least_tokens, self.config.wanted_tokens(n_tokens))

    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        # The first query's own token takes a place, too.
        capacity = self.capacity_tokens(n_tokens)
        return capacity is None or n_tokens < capacity

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return {**super().effective_config(n_tokens, shape), "budget_tokens": self.capacity_tokens(n_tokens)}

    @abstractmethod
    def choosing(self, shape: ModelShape, *, held_tokens: int, room_tokens: int, capacity: int) -> Footprint:
        """Return what choosing costs beside attention: metadata held, and bytes and FLOPs of a step.

        Args:
            held_tokens: tokens of a KV head.
            room_tokens: tokens its pages have room for.
            capacity: most tokens it holds.
        """

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        capacity = self.capacity_tokens(n_tokens)
        held = n_tokens + n_new_tokens if capacity is None else min(n_tokens + n_new_tokens, capacity)
        found = stepwise_footprint(self, shape, held_tokens=held, room_tokens=held, capacity=capacity)
        return found + stock_footprint(shape, n_tokens, n_new_tokens)


def stepwise_footprint(
    method: StepwiseEviction[ConfigT], shape: ModelShape, *, held_tokens: int, room_tokens: int, capacity: int | None
) -> Footprint:
    """Return the footprint of the managed layers; arguments as ``StepwiseEviction.choosing``."""
    n_layers = len(shape.layers)
    found = held_footprint(shape, [held_tokens] * n_layers, room_tokens=[room_tokens] * n_layers)
    if capacity is None:
        return found
    return found + method.choosing(shape, held_tokens=held_tokens, room_tokens=room_tokens, capacity=capacity)


def key_scan(shape: ModelShape, held_tokens: int) -> Footprint:
    """Return what it costs to weigh the tokens held once more, in every managed layer: their keys are read again."""
    return Footprint(
        bytes_read_per_step=len(shape.layers) * held_tokens * shape.layer_bytes_per_token // 2,
        attention_flops_per_step=len(shape.layers) * held_tokens * 2 * shape.n_q_heads * shape.head_dim,
    )


class StepwiseSequence(SequenceCache):
    """Pages of at most so many tokens; each step's token takes the place that the step before gave up."""

    def __init__(
        self,
        method: StepwiseEviction[ConfigT],
        prompt: PromptKV,
        device: torch.device,
        *,
        kept: Mapping[int, torch.Tensor],
        reserve_tokens: int,
    ) -> None:
        """Load what is kept of the prompt.

        Args:
            kept: of each managed layer the positions each KV head keeps, [H, n], no more than the capacity.
        """
        super().__init__(prompt, device)
        self._method = method
        self._capacity = method.capacity_tokens(prompt.n_tokens)
        self._lengths = dict.fromkeys(self.shape.layers, prompt.n_tokens)
        n_kept = kept[self.shape.layers[0]].shape[1]
        room = n_kept + reserve_tokens
        if self._capacity is not None:
            room = min(room, self._capacity)
        self._pool = PagePool(self.shape, n_tokens=room, dtype=prompt.dtype, device=device)
        if n_kept == prompt.n_tokens:
            self._pool.load(prompt, [(0, n_kept)])
        else:
            self._pool.load_heads(prompt, kept)
        H = self.shape.n_kv_heads
        self._places = {}
        if self._capacity is not None:
            self._places = {
                layer: torch.zeros(H, dtype=torch.long, device=pages.device)
                for layer, pages in self._pool.pages.items()
            }

    @property
    def n_tokens(self) -> int:
        return self._lengths[self.shape.layers[-1]]

    def static_reasons(self) -> list[str]:
        return ["what leaves is chosen by each step's own attention"]

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        pool, is_full = self._pool, self._pool.lengths[layer] == self._capacity
        if is_full:
            pool.write_heads(layer, self._places[layer], call.key, call.value)
        else:
            pool.append(layer, call.key, call.value)
        self._lengths[layer] += 1
        n_held = pool.lengths[layer]
        if self._capacity is not None:
            place_H = self._places[layer] if is_full else torch.full_like(self._places[layer], n_held - 1)
            self._stored(layer, place_H)
            self._weighed(layer, call, is_full=n_held == self._capacity)
        return paged_attention(call, pool.pages[layer], n_tokens=n_held)

    def _stored(self, layer: int, place_H: torch.Tensor) -> None:
        """The step's token lies at a place [H] of each KV head; TOVA notes nothing of it."""

    @abstractmethod
    def _weighed(self, layer: int, call: AttentionCall, *, is_full: bool) -> None:
        """Weigh what is held by the step's query; where the pages are full, choose the next token's place."""

    def _weights(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Return the step's attention weights over the tokens held, [H, G, T] in fp32."""
        pages, n_held = self._pool.pages[layer], self._pool.lengths[layer]
        q_HGD = call.query.view(self.shape.n_kv_heads, -1, self.shape.head_dim)
        logits_HGT = cap(page_logits(q_HGD, pages, n_tokens=n_held) * call.scale, call.softcap)
        if call.sink_logits is None:
            return torch.softmax(logits_HGT, -1)
        sink_HG1 = call.sink_logits.float().view(*q_HGD.shape[:2], 1)
        return torch.softmax(torch.cat([logits_HGT, sink_HG1], -1), -1)[..., :n_held]

    def _metadata(self) -> list[torch.Tensor]:
        """Return the tensors held beside K and V."""
        return list(self._places.values())

    def managed_footprint(self) -> Footprint:
        last = self.shape.layers[-1]
        room_tokens = len(self._pool.pages[last]) * self.shape.page_tokens
        found = stepwise_footprint(
            self._method,
            self.shape,
            held_tokens=self._pool.lengths[last],
            room_tokens=room_tokens,
            capacity=self._capacity,
        )
        return replace(found, kv_bytes=self._pool.n_bytes, metadata_bytes=tensor_bytes(self._metadata()))

    def close(self) -> None:
        self._places.clear()
        self._pool.clear()
        super().close()
