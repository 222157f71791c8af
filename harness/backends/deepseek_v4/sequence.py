"""One sequence of DeepSeek-V4 under one residency: the stock cache of the steps, its CSA entries a resident set.

Shapes: B batch (1), M hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvscope.harness.backends.deepseek_v4.cache import Change, ResidentCSA, live_bytes, opened_cache
from kvscope.harness.backends.deepseek_v4.one_step import one_step, step_backends
from kvscope.harness.backends.deepseek_v4.prefill import CompressedPrompt
from kvscope.harness.backends.deepseek_v4.shape import CompressedModelShape
from kvscope.harness.backends.deepseek_v4.static_step import StaticCache
from kvscope.methods.base import AttentionCall, Residency, SequenceCache
from kvscope.methods.lsa.schedule import Schedule
from kvscope.methods.lsa.selection import Selector
from kvscope.methods.shape import Footprint
from kvscope.methods.step_counters import StepCounters


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the resident set changes while decoding.

    Attributes:
        first, last: entries chosen from, ``last`` excluded.
        selector: what chooses among them.
        schedule: when.
    """

    first: int
    last: int
    selector: Selector
    schedule: Schedule


class CompressedSequence(SequenceCache):
    """Fixed prompt entries, chosen ones, and all that are decoded. The stock model attends, over ``model_cache``."""

    def __init__(
        self,
        prompt: CompressedPrompt,
        device: torch.device,
        *,
        fixed: torch.Tensor,
        choice: Choice | None = None,
        reserve_tokens: int = 0,
    ) -> None:
        """Open a prompt.

        Args:
            fixed: entries that always stay, ascending, on the CPU.
            choice: none: the resident set never changes.
            reserve_tokens: decode steps whose entries are preallocated; past them each is appended with a copy.
        """
        super().__init__(prompt, device)
        assert isinstance(prompt.shape, CompressedModelShape)
        self._prompt, self._shape, self._fixed, self._choice = prompt, prompt.shape, fixed, choice
        rate = prompt.shape.page_tokens
        self._reserved = (prompt.n_tokens + reserve_tokens) // rate - prompt.n_entries
        self._cache = opened_cache(prompt.config, prompt.rest, prompt.host, device, reserve_entries=self._reserved)
        self._static: StaticCache | None = None
        self._reserve_tokens = reserve_tokens
        self._steps = 0
        self._resident_tokens: list[int] = []
        self._moved_bytes: list[int] = []
        self._chosen = self._kept = self._fallbacks = 0
        self._arriving: torch.Tensor | None = None
        if choice is None:
            self._set_resident(fixed)

    @property
    def model_cache(self) -> DynamicCache | StaticCache:
        return self._cache if self._static is None else self._static

    @property
    def static_version(self) -> int:
        return 0 if self._static is None else self._static.version

    def backends(self) -> tuple[str, ...]:
        return () if self._static is None else step_backends(self._shape, self.device, self._dtype)

    def static_reasons(self) -> list[str]:
        return []

    def make_static(self, counters: StepCounters) -> None:
        """See the base class. CSA layers go on holding the resident entries; all else moves into a static cache."""
        prompt = self._prompt
        chooses_freely = self._choice is not None and self._choice.selector.n_chosen is None
        self._static = StaticCache(
            self._cache,
            prompt.modules,
            config=prompt.config,
            n_tokens=prompt.n_tokens,
            n_prompt_entries=prompt.n_entries,
            reserve_tokens=self._reserve_tokens,
            spare_share=counters.spare_share if chooses_freely else 0.0,
            like=torch.empty((0, prompt.shape.head_dim), dtype=self._dtype, device=self.device),
            counters=counters,
        )

    def call_model(self, model: Any, **arguments: Any) -> Any:
        if self._static is None:
            return model(**arguments)
        self._static.place(arguments["position_ids"][0])
        with one_step(model):
            # The stock model takes a mask as it is where it comes by kind of layer.
            return model(**arguments, attention_mask={"sliding_attention": self._static.window_bias})

    @property
    def n_tokens(self) -> int:
        return self._prompt.n_tokens + self._steps

    @property
    def layers(self) -> dict[int, ResidentCSA]:
        """CSA layer -> its cache."""
        return {layer: self._cache.layers[layer] for layer in self._shape.layers}

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        if self._choice is not None:
            self._choice.selector.observe(layer, hidden_BM)

    def scored(self) -> torch.Tensor | None:
        return None if self._choice is None else self._choice.selector.scored

    def begin_step(self) -> None:
        """Refresh where it is due, with the states of the step before."""
        if self._choice is not None:
            if self._steps:
                self._choice.selector.end_step()
            if self._steps % self._choice.schedule.tau == 0:
                self._refresh(self._choice)
        if self._static is not None:
            self._static.begin_step(self.n_tokens)

    def end_step(self) -> None:
        """A token has been fed."""
        self._steps += 1
        if self._static is not None:
            self._static.end_step(self.n_tokens)

    def _refresh(self, choice: Choice) -> None:
        """Choose, and make resident what is to be read from here on.

        What is read an interval late is copied when that interval begins, not behind the one before: the choice is the
        deployed one, and no room is held for what arrives.
        """
        chosen = self._choose(choice)
        if choice.schedule.stale:
            newest, chosen = chosen, chosen if self._arriving is None else self._arriving
            self._arriving = newest
        if self._moved_bytes:  # at the first refresh everything is new, by definition
            before = next(iter(self.layers.values())).resident
            self._kept += int(torch.isin(chosen, before, assume_unique=True).sum())
            self._chosen += len(chosen)
        moved_bytes = self._set_resident(torch.cat([self._fixed, chosen]).sort().values)
        self.bytes_recalled += moved_bytes
        self._moved_bytes.append(moved_bytes)
        entries = len(self._fixed) + len(chosen)
        rate = self._shape.page_tokens
        self._resident_tokens.append(entries * rate + self._prompt.n_tokens % rate)

    def _choose(self, choice: Choice) -> torch.Tensor:
        n_candidates = choice.last - choice.first
        chosen = choice.selector.choose()
        ratio = choice.schedule.fallback_ratio
        if ratio is not None and len(chosen) > ratio * n_candidates:
            chosen = torch.arange(n_candidates)
            self._fallbacks += 1
        return chosen + choice.first

    def _set_resident(self, entries: torch.Tensor) -> int:
        layers = list(self.layers.values())
        change = Change.between(layers[0].resident, entries, self.device)
        return sum(layer.change(change) for layer in layers)

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        raise ValueError("DeepSeek-V4 attends by its stock classes, over model_cache")

    def managed_footprint(self) -> Footprint:
        """Exact bytes of the live tensors, and what the step that made them read."""
        csa = next(iter(self.layers.values()))
        n_entries = n_attended = csa.compressed_kv["compressor"].shape[1]
        held = Footprint(kv_bytes=sum(self.bytes_by_kind().values()))
        if self._static is not None:
            n_attended = min(n_entries, self._prompt.config.index_topk)
            eager = self._shape.cache.by_kind(
                self.n_tokens,
                n_resident_entries=max(len(csa.resident) + self._reserved, n_entries),
                during_step=self._steps > 0,
            )
            held += Footprint(spare_kv_bytes=held.kv_bytes - sum(eager.values()))
        held += self._shape.step_reads(self.n_tokens, n_entries, n_attended=n_attended)
        if self._choice is None:
            return held
        selector, tau = self._choice.selector, self._choice.schedule.tau
        return held + Footprint(
            metadata_bytes=selector.metadata_bytes,
            host_bytes=self._prompt.host_bytes,
            bytes_read_per_step=-(-selector.refresh_bytes // tau),
            attention_flops_per_step=-(-selector.refresh_flops // tau),
        )

    def bytes_by_kind(self) -> dict[str, int]:
        """Return the bytes of the live cache by kind: ``footprint().kv_bytes``, taken apart."""
        return live_bytes(self._cache) if self._static is None else self._static.live_bytes()

    def residency(self) -> Residency | None:
        if self._choice is None:
            return None
        schedule = self._choice.schedule
        return Residency(
            tau=schedule.tau,
            prompt_tokens=self._prompt.n_tokens,
            resident_tokens=tuple(self._resident_tokens),
            recalled_bytes=tuple(self._moved_bytes),
            hit_rate=self._kept / self._chosen if self._chosen else None,
            fallbacks=self._fallbacks,
            indexer=schedule.indexer,
            indexer_tau=schedule.indexer_tau,
            indexer_bytes=schedule.indexer_bytes,
        )

    def close(self) -> None:
        self._cache.layers = []
        if self._static is not None:
            self._static.clear()
            self._static = None
        if self._choice is not None:
            self._choice.selector.close()
        super().close()
