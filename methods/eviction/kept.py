"""Eviction when the prompt ends: each KV head keeps tokens of its own, packed; the rest is not on the device.

Keys are stored as they were rotated, so a page may hold, for each head, tokens of other positions.

Shapes: H KV heads, N prompt tokens, n tokens kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from kvscope.methods.attention import stored_attention
from kvscope.methods.base import AttentionCall, CacheMethod, Collector, SequenceCache
from kvscope.methods.eviction.budget import EvictionConfig, kept_tokens
from kvscope.methods.eviction.choice import prompt_scores, top_tokens
from kvscope.methods.eviction.collectors import ScoreCollector
from kvscope.methods.joined import Read
from kvscope.methods.packed_pool import PackedStep
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.static_step import Pool, StepPages, make_step, open_pool, unsupported_step
from kvscope.methods.step_batch import StepReads
from kvscope.methods.step_counters import StepCounters
from kvscope.methods.store import PagePool, PromptKV

ConfigT = TypeVar("ConfigT", bound=EvictionConfig)


class Eviction(CacheMethod[ConfigT]):
    """What the eviction methods share: the budget, and scores from the prefill."""

    saving_kind = "freed"
    spans_devices = True

    @property
    def least_tokens(self) -> int:
        """Tokens that stay whatever their scores."""
        return 1

    @property
    def least(self) -> str:
        """What these are, for a message: the subject of a clause."""
        return "the smallest set"

    @abstractmethod
    def collector(self, layer: int) -> ScoreCollector:
        """Return a fresh collector of the scores of one layer."""

    def collectors(self, layer: int) -> list[Collector]:
        return [self.collector(layer)]

    def n_kept_tokens(self, n_tokens: int) -> int:
        """Return the tokens of a prompt that a KV head keeps, mean over layers and heads."""
        return kept_tokens(self.name, n_tokens, self.config, least_tokens=self.least_tokens, least=self.least)

    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        return self.n_kept_tokens(n_tokens) >= n_tokens

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return {"budget_tokens": self.n_kept_tokens(n_tokens), "budget_fraction": self.config.budget_fraction}

    def scores(self, prompt: PromptKV, layer: int) -> torch.Tensor:
        """Return the scores of a layer's prompt tokens, [H, N] or [1, N].

        Raises:
            ValueError: the prompt was prefilled without this method's collectors.
            KvscopeError: a score is NaN.
        """
        return prompt_scores(prompt, self.collector(layer).name, layer, method=self.name)


class KeptTokens(Eviction[ConfigT]):
    """Every head of a layer keeps equally many tokens; what is decoded stays, too."""

    kv_refusal = ""

    def layer_tokens(self, n_tokens: int, n_layers: int) -> list[int]:
        """Return the tokens a KV head keeps in each of the managed layers, first to last."""
        return [self.n_kept_tokens(n_tokens)] * n_layers

    def kept(self, prompt: PromptKV) -> dict[int, torch.Tensor]:
        """Return of each managed layer the positions each KV head keeps, [H, n], ascending."""
        layers, H = prompt.shape.layers, prompt.shape.n_kv_heads
        found = {}
        for layer, n_kept in zip(layers, self.layer_tokens(prompt.n_tokens, len(layers)), strict=True):
            if n_kept >= prompt.n_tokens:
                found[layer] = torch.arange(prompt.n_tokens).expand(H, -1)
            else:
                found[layer] = top_tokens(self.scores(prompt, layer), n_kept).expand(H, -1)
        return found

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        shape = self.stored(shape)
        layer_tokens = self.layer_tokens(n_tokens, len(shape.layers))
        held = [n_kept + n_new_tokens for n_kept in layer_tokens]
        return held_footprint(shape, held, room_tokens=held) + stock_footprint(shape, n_tokens, n_new_tokens)

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        prompt = self.stored_prompt(prompt)
        return KeptSequence(prompt, torch.device(device), kept=self.kept(prompt), reserve_tokens=reserve_tokens)


def held_footprint(shape: ModelShape, layer_tokens: Sequence[int], *, room_tokens: Sequence[int]) -> Footprint:
    """Return the footprint of managed layers that hold, and read, so many tokens each.

    Args:
        room_tokens: what their pages have room for.
    """
    return Footprint(
        kv_bytes=sum(shape.layer_paged_bytes(n_tokens) for n_tokens in room_tokens),
        bytes_read_per_step=sum(shape.layer_read_bytes(n_tokens) for n_tokens in layer_tokens),
        attention_flops_per_step=sum(layer_tokens) * 4 * shape.n_q_heads * shape.head_dim,
    )


def stock_footprint(shape: ModelShape, n_tokens: int, n_new_tokens: int) -> Footprint:
    """Return the footprint of the model's own sliding-window layers."""
    n_total = n_tokens + n_new_tokens
    return Footprint(
        kv_bytes=shape.stock_kv_bytes(n_tokens, n_new_tokens),
        bytes_read_per_step=shape.stock_read_bytes(n_total),
        attention_flops_per_step=shape.stock_attention_flops(n_total),
    )


class KeptSequence(SequenceCache):
    """Kept and decoded tokens in pages, a pool for all layers of equally many tokens; every query reads all of them."""

    def __init__(
        self, prompt: PromptKV, device: torch.device, *, kept: Mapping[int, torch.Tensor], reserve_tokens: int = 0
    ) -> None:
        super().__init__(prompt, device)
        groups: dict[int, list[int]] = {}
        for layer in self.shape.layers:
            groups.setdefault(kept[layer].shape[1], []).append(layer)
        self._pool_of: dict[int, Pool] = {}
        self._pools: list[Pool] = []
        self._steps: dict[int, StepPages | PackedStep] = {}
        for n_kept, layers in groups.items():
            part = replace(self.shape, layers=tuple(layers))
            pool = open_pool(part, n_tokens=n_kept + reserve_tokens, dtype=prompt.dtype, device=device)
            if n_kept == prompt.n_tokens:
                pool.load(prompt, [(0, n_kept)])
            else:
                pool.load_heads(prompt, kept)
            self._pools.append(pool)
            self._pool_of |= dict.fromkeys(layers, pool)
        last = self.shape.layers[-1]
        self._n_dropped = prompt.n_tokens - kept[last].shape[1]

    @property
    def n_tokens(self) -> int:
        last = self.shape.layers[-1]
        return self._n_dropped + self._pool_of[last].lengths[last]

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        if self._steps:
            step = self._steps[layer]
            step.append(layer, call.key, call.value)
            return stored_attention(call, step.stores(layer))
        pool = self._pool_of[layer]
        pool.append(layer, call.key, call.value)
        return pool.attend(layer, call)

    def reads(self, layer: int, call: AttentionCall) -> tuple[Read, ...] | None:
        pool = self._pool_of[layer]
        if self._steps or not isinstance(pool, PagePool):
            return None
        pool.append(layer, call.key, call.value)
        return (pool.read(layer),)

    # -- steps at fixed addresses

    def static_reasons(self) -> list[str]:
        return unsupported_step(self.shape, self.device, self._pools[0].dtype)

    def make_static(self, counters: StepCounters) -> None:
        for pool in self._pools:
            self._steps |= dict.fromkeys(pool.shape.layers, make_step(pool, counters))

    @property
    def static_version(self) -> int:
        return sum(step.version for step in self._each_step())

    def _each_step(self) -> list[StepPages | PackedStep]:
        return [self._steps[pool.shape.layers[0]] for pool in self._pools] if self._steps else []

    def begin_step(self) -> None:
        for step in self._each_step():
            step.place()

    def end_step(self) -> None:
        for step in self._each_step():
            step.placed()

    def step_reads(self, layer: int) -> StepReads | None:
        return self._steps[layer].reads(layer) if self._steps else None

    # -- bytes

    def managed_footprint(self) -> Footprint:
        held = [self._pool_of[layer].lengths[layer] for layer in self.shape.layers]
        return replace(held_footprint(self.shape, held, room_tokens=()), kv_bytes=sum(p.n_bytes for p in self._pools))

    def close(self) -> None:
        for step in self._each_step():
            step.release()
        for pool in self._pools:
            pool.clear()
        super().close()
