"""Methods whose resident set is chosen once, at opening: a choice of prompt tokens, then everything decoded.

A subclass says which prompt tokens stay; storage, attention, byte counts and the masked oracle are here.
"""

from abc import abstractmethod
from typing import TypeVar

import torch

from kvscope.methods.attention import paged_attention, stored_attention
from kvscope.methods.base import AttentionExtras, CacheMethod, SequenceCache
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.static_step import StepPages, unsupported_step
from kvscope.methods.store import PagePool, PromptKV, TokenRange

ConfigT = TypeVar("ConfigT")


class StaticResidency(CacheMethod[ConfigT]):
    """A residency fixed at opening, and a read of everything resident."""

    @abstractmethod
    def n_resident_tokens(self, n_tokens: int, shape: ModelShape | None) -> int:
        """Return how many of ``n_tokens`` prompt tokens stay."""

    @abstractmethod
    def resident_ranges(self, prompt: PromptKV) -> list[TokenRange]:
        """Return the prompt tokens that stay, ascending and disjoint; their count is ``n_resident_tokens``."""

    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        return self.n_resident_tokens(n_tokens, shape) >= n_tokens

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        n_resident = self.n_resident_tokens(n_tokens, shape) + n_new_tokens
        n_total = n_tokens + n_new_tokens
        return Footprint(
            kv_bytes=shape.paged_kv_bytes(n_resident) + shape.stock_kv_bytes(n_tokens, n_new_tokens),
            bytes_read_per_step=shape.read_bytes(n_resident) + shape.stock_read_bytes(n_total),
            attention_flops_per_step=shape.attention_flops(n_resident) + shape.stock_attention_flops(n_total),
        )

    def open(
        self, prompt: PromptKV, device: torch.device | str, *, physical: bool = True, reserve_tokens: int = 0
    ) -> SequenceCache:
        ranges = self.resident_ranges(prompt)
        sequence = ResidentSequence if physical else MaskedSequence
        return sequence(prompt, torch.device(device), ranges=ranges, reserve_tokens=reserve_tokens)


class ResidentSequence(SequenceCache):
    """Chosen prompt tokens and decoded tokens in one pool of pages; every query reads all of it."""

    def __init__(
        self, prompt: PromptKV, device: torch.device, *, ranges: list[TokenRange], reserve_tokens: int = 0
    ) -> None:
        super().__init__(prompt, device)
        n_kept = sum(end - start for start, end in ranges)
        self.pool = PagePool(prompt.shape, n_tokens=n_kept + reserve_tokens, dtype=prompt.dtype, device=device)
        self.pool.load(prompt, ranges)
        self._n_dropped = prompt.n_tokens - n_kept
        self._step: StepPages | None = None

    @property
    def n_tokens(self) -> int:
        return self._n_dropped + self._n_resident

    @property
    def _n_resident(self) -> int:
        return self.pool.lengths[self.shape.layers[-1]]

    def attend(
        self,
        layer: int,
        q_BQ1D: torch.Tensor,
        k_BH1D: torch.Tensor,
        v_BH1D: torch.Tensor,
        *,
        scale: float,
        extras: AttentionExtras,
    ) -> torch.Tensor:
        if self._step is not None:
            self._step.append(layer, k_BH1D, v_BH1D)
            stores = [self._step.store(layer)]
            return stored_attention(q_BQ1D, stores, scale=scale, softcap=extras.softcap, sink_logits=extras.sink_logits)
        self.pool.append(layer, k_BH1D, v_BH1D)
        return paged_attention(
            q_BQ1D,
            self.pool.pages[layer],
            n_tokens=self.pool.lengths[layer],
            scale=scale,
            softcap=extras.softcap,
            sink_logits=extras.sink_logits,
            keep_SP=self._keep(layer),
        )

    def _keep(self, layer: int) -> torch.Tensor | None:
        del layer
        return None

    def static_reasons(self) -> list[str]:
        return unsupported_step(self.shape, self.device, self.pool.dtype)

    def make_static(self) -> None:
        self._step = StepPages(self.pool, self.device)

    @property
    def static_version(self) -> int:
        return 0 if self._step is None else self._step.version

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

    def close(self) -> None:
        self.pool.clear()
        super().close()


class MaskedSequence(ResidentSequence):
    """The oracle of the tests: everything stays on the device, and what the method would drop is masked."""

    def __init__(
        self, prompt: PromptKV, device: torch.device, *, ranges: list[TokenRange], reserve_tokens: int = 0
    ) -> None:
        super().__init__(prompt, device, ranges=[(0, prompt.n_tokens)], reserve_tokens=reserve_tokens)
        self._kept = torch.zeros(prompt.n_tokens, dtype=torch.bool, device=device)
        for start, end in ranges:
            self._kept[start:end] = True

    def static_reasons(self) -> list[str]:
        return ["a masked step is made anew each time"]

    def _keep(self, layer: int) -> torch.Tensor:
        n_slots, P = self.pool.pages[layer].shape[0], self.shape.page_tokens
        keep = torch.ones(n_slots * P, dtype=torch.bool, device=self.device)
        keep[: self._kept.shape[0]] = self._kept
        return keep.view(n_slots, P)
