"""When LSA chooses, and the record of it, whatever the storage.

A refresh happens at opening and before every tau-th decode step. It chooses from the hidden states of the step before,
or, where attention itself chooses, inside the step from each layer's own query. Between refreshes nothing moves.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch

from kvscope.methods.base import AttentionCall, Residency, SequenceCache
from kvscope.methods.lsa.labels import chunk_mass
from kvscope.methods.lsa.layout import ChunkLayout
from kvscope.methods.lsa.selection import Selector
from kvscope.methods.shape import Footprint
from kvscope.methods.step_batch import keep_query
from kvscope.methods.store import PromptKV


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When chunks are chosen and how they arrive.

    Attributes:
        tau: decode steps between refreshes.
        stale: what a refresh chooses is copied behind the interval that begins and read one interval later.
        fallback_ratio: a choice of more than this share of the candidates makes the interval dense; None never.
        indexer, indexer_tau, indexer_bytes: for the record.
    """

    tau: int
    stale: bool = False
    fallback_ratio: float | None = None
    indexer: str | None = None
    indexer_tau: int | None = None
    indexer_bytes: int = 0


class LsaSequence(SequenceCache):
    """The schedule, whatever the storage: counts steps, refreshes, keeps the record."""

    def __init__(
        self, prompt: PromptKV, device: torch.device, *, layout: ChunkLayout, selector: Selector, schedule: Schedule
    ) -> None:
        super().__init__(prompt, device)
        self._layout, self._selector, self._schedule = layout, selector, schedule
        self._mirror_bytes = prompt.host_bytes
        self._n_fed = dict.fromkeys(self.shape.layers, 0)
        self._resident_tokens: list[int] = []
        self._moved_bytes: list[int] = []
        self._kept = self._chosen = self._fallbacks = self._scored_bytes = 0

    def _first_refresh(self) -> None:
        """Choose for step 0; a subclass calls it once its storage stands."""
        if not self._selector.reads_mass:
            self._refresh(self.shape.layers, self._choose())

    @property
    def n_tokens(self) -> int:
        return self._layout.n_tokens + self._n_fed[self.shape.layers[-1]]

    def scored(self) -> torch.Tensor | None:
        return self._selector.scored

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        self._selector.observe(layer, hidden_BM)

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        layers, step = self.shape.layers, self._n_fed[layer]
        due = step % self._schedule.tau == 0 and self._layout.n_candidates > 0
        if due and step and layer == layers[0] and not self._selector.reads_mass:
            self._refresh(layers, self._choose())
        keep_query(call, self._selector.query_place(layer))
        self._append(layer, call.key, call.value)
        self._n_fed[layer] += 1
        if due and self._selector.reads_mass:
            self._refresh((layer,), self._choose_by_mass(layer, call))
        out = self._attend(layer, call)
        if layer == layers[-1]:
            self._selector.end_step()
        return out

    def _choose(self) -> torch.Tensor:
        return self._checked(self._selector.choose())

    def _choose_by_mass(self, layer: int, call: AttentionCall) -> torch.Tensor:
        prompt_QT, other_QT = self._logits(layer, call)
        # Every key of the mirror crosses over to be scored: the price of this choice.
        self._scored_bytes = self._layout.n_tokens * self.shape.layer_bytes_per_token // 2
        mass_QM = chunk_mass(prompt_QT, other_QT, chunk_tokens=self._layout.chunk_tokens, sink_logits=call.sink_logits)
        mass_M = mass_QM.mean(0)
        mass_n = mass_M[self._layout.first : self._layout.last]
        return self._checked(self._selector.choose_by_mass(mass_n, mass_M.sum() - mass_n.sum()))

    def _checked(self, candidates: torch.Tensor) -> torch.Tensor:
        """Apply the fallback; return chunk ids."""
        n, ratio = self._layout.n_candidates, self._schedule.fallback_ratio
        if ratio is not None and len(candidates) > ratio * n:
            self._fallbacks += 1
            candidates = torch.arange(n)
        return candidates + self._layout.first

    def _refresh(self, layers: tuple[int, ...], wanted: torch.Tensor) -> None:
        """Make chunks resident in some layers, and note what it took."""
        if layers[0] == self.shape.layers[0]:
            self._moved_bytes.append(0)
            self._resident_tokens.append(0)
        for layer in layers:
            moved_bytes, kept = self._place(layer, wanted)
            self._moved_bytes[-1] += moved_bytes + self._scored_bytes
            self.bytes_recalled += moved_bytes + self._scored_bytes
            if len(self._moved_bytes) > 1:  # at the first refresh everything is new, by definition
                self._kept += kept
                self._chosen += len(wanted)
        self._resident_tokens[-1] = self._layout.static_tokens + self._chosen_tokens()

    def residency(self) -> Residency:
        return Residency(
            tau=self._schedule.tau,
            prompt_tokens=self._layout.n_tokens,
            resident_tokens=tuple(self._resident_tokens),
            recalled_bytes=tuple(self._moved_bytes),
            hit_rate=self._kept / self._chosen if self._chosen else None,
            fallbacks=self._fallbacks,
            indexer=self._schedule.indexer,
            indexer_tau=self._schedule.indexer_tau,
            indexer_bytes=self._schedule.indexer_bytes,
        )

    def _scoring(self) -> Footprint:
        """What choosing keeps, and reads a step: a refresh's cost spread over the interval, rounded up."""
        selector, tau = self._selector, self._schedule.tau
        return Footprint(
            metadata_bytes=selector.metadata_bytes,
            bytes_read_per_step=-(-selector.refresh_bytes // tau),
            attention_flops_per_step=-(-selector.refresh_flops // tau),
        )

    def _reads(self, *, kv_bytes: int, static_tokens: int) -> Footprint:
        shape, layout = self.shape, self._layout
        n_chosen = self._chosen_tokens(arriving=False)
        unit = layout.unit_tokens(shape.page_tokens)
        chosen_bytes = len(shape.layers) * shape.packed_bytes(n_chosen, unit_tokens=unit)
        return self._scoring() + Footprint(
            kv_bytes=kv_bytes,
            host_bytes=self._mirror_bytes,
            bytes_read_per_step=shape.read_bytes(static_tokens) + chosen_bytes,
            attention_flops_per_step=shape.attention_flops(static_tokens + n_chosen),
        )

    def close(self) -> None:
        self._selector.close()
        super().close()

    @abstractmethod
    def _append(self, layer: int, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        """Store the current token."""

    @abstractmethod
    def _attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Attend to what is resident."""

    @abstractmethod
    def _place(self, layer: int, wanted: torch.Tensor) -> tuple[int, int]:
        """Make chunks resident in a layer; return (bytes moved, chunks of ``wanted`` that were there already)."""

    @abstractmethod
    def _logits(self, layer: int, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Return attention logits over the whole prompt [Q, N] and over decoded tokens [Q, decoded]."""

    @abstractmethod
    def _chosen_tokens(self, *, arriving: bool = True) -> int:
        """Prompt tokens of chosen chunks on the device, mean over layers; with ``arriving`` those on their way, too."""
