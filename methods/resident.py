"""Methods whose resident set is chosen once, at opening: a choice of prompt tokens, then everything decoded.

A subclass says which prompt tokens stay; storage, attention and byte counts are here.
"""

from abc import abstractmethod
from typing import TypeVar

import torch

from kvscope.methods.attention import stored_attention
from kvscope.methods.base import AttentionCall, CacheMethod, SequenceCache
from kvscope.methods.joined import Read
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.static_step import PagedSequence, Pool, open_pool
from kvscope.methods.step_batch import StepReads
from kvscope.methods.store import PagePool, PromptKV, TokenRange

ConfigT = TypeVar("ConfigT")


class StaticResidency(CacheMethod[ConfigT]):
    """A residency fixed at opening, and a read of everything resident."""

    spans_devices = True

    @abstractmethod
    def n_resident_tokens(self, n_tokens: int, shape: ModelShape | None) -> int:
        """Return how many of ``n_tokens`` prompt tokens stay."""

    @abstractmethod
    def resident_ranges(self, prompt: PromptKV) -> list[TokenRange]:
        """Return the prompt tokens that stay, ascending and disjoint; their count is ``n_resident_tokens``."""

    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        stored = None if shape is None else self.stored(shape)
        return self.n_resident_tokens(n_tokens, stored) >= n_tokens

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        shape = self.stored(shape)
        n_resident = self.n_resident_tokens(n_tokens, shape) + n_new_tokens
        n_total = n_tokens + n_new_tokens
        return Footprint(
            kv_bytes=shape.paged_kv_bytes(n_resident) + shape.stock_kv_bytes(n_tokens, n_new_tokens),
            bytes_read_per_step=shape.read_bytes(n_resident) + shape.stock_read_bytes(n_total),
            attention_flops_per_step=shape.attention_flops(n_resident) + shape.stock_attention_flops(n_total),
        )

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        prompt = self.stored_prompt(prompt)
        ranges = self.resident_ranges(prompt)
        self._check(ranges, prompt)
        return ResidentSequence(prompt, torch.device(device), ranges=ranges, reserve_tokens=reserve_tokens)

    def _check(self, ranges: list[TokenRange], prompt: PromptKV) -> None:
        """Refuse ranges by which bytes would not be those predicted, or a token would be attended to twice.

        Raises:
            ValueError: saying which.
        """
        end_before = 0
        for start, end in ranges:
            if not end_before <= start <= end <= prompt.n_tokens:
                told = f"({start}, {end}) behind token {end_before} of {prompt.n_tokens}"
                raise ValueError(f"resident_ranges must be ascending and disjoint in the prompt, got {told}")
            end_before = end
        n_kept = sum(end - start for start, end in ranges)
        if n_kept != (n_said := self.n_resident_tokens(prompt.n_tokens, prompt.shape)):
            raise ValueError(f"resident_ranges keeps {n_kept} tokens, and n_resident_tokens says {n_said}")


class ResidentSequence(PagedSequence):
    """Chosen prompt tokens and decoded tokens in one pool of pages; every query reads all of it."""

    def __init__(
        self, prompt: PromptKV, device: torch.device, *, ranges: list[TokenRange], reserve_tokens: int = 0
    ) -> None:
        super().__init__(prompt, device)
        n_kept = sum(end - start for start, end in ranges)
        self.pool = open_pool(prompt.shape, n_tokens=n_kept + reserve_tokens, dtype=prompt.dtype, device=device)
        self.pool.load(prompt, ranges)
        self._n_dropped = prompt.n_tokens - n_kept

    @property
    def n_tokens(self) -> int:
        return self._n_dropped + self._n_resident

    @property
    def _n_resident(self) -> int:
        return self.pool.lengths[self.shape.layers[-1]]

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        if self._step is not None:
            self._step.append(layer, call.key, call.value)
            return stored_attention(call, self._step.stores(layer))
        self.pool.append(layer, call.key, call.value)
        return self.pool.attend(layer, call)

    def reads(self, layer: int, call: AttentionCall) -> tuple[Read, ...] | None:
        if self._step is not None or not isinstance(self.pool, PagePool):
            return None
        self.pool.append(layer, call.key, call.value)
        return (self.pool.read(layer),)

    @property
    def _appended(self) -> Pool:
        return self.pool

    def begin_step(self) -> None:
        if self._step is not None:
            self._step.place()

    def end_step(self) -> None:
        if self._step is not None:
            self._step.placed()

    def managed_footprint(self) -> Footprint:
        return Footprint(
            kv_bytes=self.pool.n_bytes,
            bytes_read_per_step=self.shape.read_bytes(self._n_resident),
            attention_flops_per_step=self.shape.attention_flops(self._n_resident),
        )

    def step_reads(self, layer: int) -> StepReads | None:
        return None if self._step is None else self._step.reads(layer)

    def close(self) -> None:
        self._release_step()
        self.pool.clear()
        super().close()
