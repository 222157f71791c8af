"""One sequence under LSA: recalling (the real thing) and masked (the oracle of the tests).

A refresh happens at opening and before every tau-th decode step. It chooses from the hidden states of the step before,
or, for the attention oracle, inside the step from each layer's own query. Between refreshes nothing moves.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvscope.methods.attention import joint_attention, paged_attention, stored_attention
from kvscope.methods.base import AttentionExtras, Residency, SequenceCache, tensor_bytes
from kvscope.methods.kernels.dispatch import triton_version
from kvscope.methods.lsa.labels import chunk_mass, token_logits
from kvscope.methods.lsa.layout import ChunkLayout
from kvscope.methods.lsa.pool import ChunkPool, Copier, Copy, Move
from kvscope.methods.lsa.selection import Selector
from kvscope.methods.shape import Footprint
from kvscope.methods.static_step import StepPages, unsupported_step
from kvscope.methods.store import PagePool, PromptKV

if TYPE_CHECKING:
    from kvscope.methods.lsa.slots import ChunkSlots


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


@dataclass(frozen=True)
class _Arrival:
    """A set chosen one interval ago, its missing chunks on their way."""

    wanted: torch.Tensor
    move: Move
    copy: Copy


class LsaSequence(SequenceCache):
    """The schedule, common to both kinds: counts steps, refreshes, keeps the record."""

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

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        self._selector.observe(layer, hidden_BM)

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
        layers, step = self.shape.layers, self._n_fed[layer]
        due = step % self._schedule.tau == 0 and self._layout.n_candidates > 0
        if due and step and layer == layers[0] and not self._selector.reads_mass:
            self._refresh(layers, self._choose())
        self._append(layer, k_BH1D, v_BH1D)
        self._n_fed[layer] += 1
        if due and self._selector.reads_mass:
            self._refresh((layer,), self._choose_by_mass(layer, q_BQ1D, scale, extras))
        out = self._attend(layer, q_BQ1D, scale, extras)
        if layer == layers[-1]:
            self._selector.end_step()
        return out

    def _choose(self) -> torch.Tensor:
        return self._checked(self._selector.choose())

    def _choose_by_mass(self, layer: int, q_BQ1D: torch.Tensor, scale: float, extras: AttentionExtras) -> torch.Tensor:
        prompt_QT, other_QT = self._logits(layer, q_BQ1D, scale, extras.softcap)
        # Every key of the mirror crosses over to be scored: the price of this oracle.
        self._scored_bytes = self._layout.n_tokens * self.shape.layer_bytes_per_token // 2
        mass_QM = chunk_mass(
            prompt_QT, other_QT, chunk_tokens=self._layout.chunk_tokens, sink_logits=extras.sink_logits
        )
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
        shape = self.shape
        n_read = static_tokens + self._chosen_tokens(arriving=False)
        return self._scoring() + Footprint(
            kv_bytes=kv_bytes,
            host_bytes=self._mirror_bytes,
            bytes_read_per_step=shape.read_bytes(n_read),
            attention_flops_per_step=shape.attention_flops(n_read),
        )

    def close(self) -> None:
        self._selector.close()
        super().close()

    @abstractmethod
    def _append(self, layer: int, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        """Store the current token."""

    @abstractmethod
    def _attend(self, layer: int, q_BQ1D: torch.Tensor, scale: float, extras: AttentionExtras) -> torch.Tensor:
        """Attend to what is resident."""

    @abstractmethod
    def _place(self, layer: int, wanted: torch.Tensor) -> tuple[int, int]:
        """Make chunks resident in a layer; return (bytes moved, chunks of ``wanted`` that were there already)."""

    @abstractmethod
    def _logits(
        self, layer: int, q_BQ1D: torch.Tensor, scale: float, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return attention logits over the whole prompt [Q, N] and over decoded tokens [Q, decoded]."""

    @abstractmethod
    def _chosen_tokens(self, *, arriving: bool = True) -> int:
        """Prompt tokens of chosen chunks on the device, mean over layers; with ``arriving`` those on their way, too."""


class RecallingSequence(LsaSequence):
    """Chosen chunks in pools of their own, sinks, window and decoded tokens in pages that are appended to."""

    def __init__(
        self,
        prompt: PromptKV,
        device: torch.device,
        *,
        layout: ChunkLayout,
        selector: Selector,
        schedule: Schedule,
        reserve_tokens: int = 0,
    ) -> None:
        super().__init__(prompt, device, layout=layout, selector=selector, schedule=schedule)
        self._mirror = prompt.pages
        n_static = layout.static_tokens
        self._static = PagePool(self.shape, n_tokens=n_static + reserve_tokens, dtype=prompt.dtype, device=device)
        self._static.load(prompt, layout.static_ranges)
        self._pools = {
            layer: ChunkPool(prompt.pages[layer], chunk_tokens=layout.chunk_tokens, device=device)
            for layer in self.shape.layers
        }
        self._arriving: dict[int, _Arrival] = {}
        self._copier = Copier(device) if schedule.stale else None
        self._recall = next(iter(self._pools.values())).backend
        self._step: StepPages | None = None
        self._slots: ChunkSlots | None = None
        self._n_unread_refreshes = self._first_chosen = 0
        self._first_refresh()

    # -- steps at fixed addresses

    def static_reasons(self) -> list[str]:
        if self._selector.reads_mass:
            return ["the attention oracle chooses inside the step"]
        version, problem = triton_version()
        if version is None:
            return [problem]
        from kvscope.methods.lsa.slots import unsupported_slots

        reasons = unsupported_step(self.shape, self.device, self._static.dtype)
        return reasons + unsupported_slots(self._mirror, self._pools)

    def make_static(self) -> None:
        from kvscope.methods.lsa.slots import ChunkSlots

        self._step = StepPages(self._static, self.device)
        self._first_chosen = len(next(iter(self._pools.values())).ids)
        budgeted = self._selector.n_chosen is not None
        if self._layout.n_candidates and not (budgeted and not self._first_chosen):
            self._slots = ChunkSlots(
                self._pools,
                self._mirror,
                layout=self._layout,
                budgeted=budgeted,
                stale=self._schedule.stale,
                fallback_ratio=self._schedule.fallback_ratio,
            )

    @property
    def static_version(self) -> int:
        pages = 0 if self._step is None else self._step.version
        return pages + (0 if self._slots is None else self._slots.version)

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
        if self._step is None:
            return super().attend(layer, q_BQ1D, k_BH1D, v_BH1D, scale=scale, extras=extras)
        self._step.append(layer, k_BH1D, v_BH1D)
        stores = [self._step.store(layer)]
        if self._slots is not None:
            stores.append(self._slots.store(layer))
        return stored_attention(q_BQ1D, stores, scale=scale, softcap=extras.softcap, sink_logits=extras.sink_logits)

    def begin_step(self) -> None:
        if self._step is None:
            return
        step = self._n_fed[self.shape.layers[-1]]
        if step and step % self._schedule.tau == 0 and self._layout.n_candidates:
            if self._slots is not None:
                self._slots.refresh(self._selector)
            self._n_unread_refreshes += 1
        self._step.place()

    def end_step(self) -> None:
        if self._step is None:
            return
        self._step.placed()
        self._selector.end_step()
        for layer in self.shape.layers:
            self._n_fed[layer] += 1

    def settle(self) -> None:
        """Enter into the record what refreshes did that were left to the device."""
        n_new, self._n_unread_refreshes = self._n_unread_refreshes, 0
        if not n_new:
            return
        if self._slots is None:  # a budget that leaves no room for any chunk
            self._moved_bytes += [0] * n_new
            self._resident_tokens += [self._layout.static_tokens] * n_new
            return
        counts, n_layers = self._slots.counts(), len(self.shape.layers)
        for index in range(len(counts.chosen) - n_new, len(counts.chosen)):
            chosen, missing = counts.chosen[index], counts.missing[index]
            self._moved_bytes.append(missing * self._slots.chunk_bytes * n_layers)
            self.bytes_recalled += self._moved_bytes[-1]
            self._kept += (chosen - missing) * n_layers
            self._chosen += chosen * n_layers
            held = chosen
            if self._schedule.stale:
                before = counts.chosen[index - 1] if index else self._first_chosen
                held = before + missing
            self._resident_tokens.append(self._layout.static_tokens + held * self._layout.chunk_tokens)

    def backends(self) -> tuple[str, ...]:
        if not self._layout.n_candidates:
            return ()
        return (*self._selector.backends(), f"recall: {self._recall}")

    def residency(self) -> Residency:
        self.settle()
        found = super().residency()
        if self._slots is None or not self._slots.fallbacks:
            return found
        return replace(found, fallbacks=found.fallbacks + self._slots.fallbacks)

    # -- steps as they come

    def _append(self, layer: int, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        self._static.append(layer, k_BH1D, v_BH1D)

    def _attend(self, layer: int, q_BQ1D: torch.Tensor, scale: float, extras: AttentionExtras) -> torch.Tensor:
        pool, static = self._pools[layer], self._static
        stores = [(static.pages[layer], static.lengths[layer]), (pool.slots, pool.n_tokens)]
        return joint_attention(q_BQ1D, stores, scale=scale, softcap=extras.softcap, sink_logits=extras.sink_logits)

    def _place(self, layer: int, wanted: torch.Tensor) -> tuple[int, int]:
        pool = self._pools[layer]
        first = len(self._moved_bytes) == 1
        if self._copier is None or first:
            move = pool.plan(wanted)
            pool.fetch(move)
            pool.apply(wanted, move)
        else:
            arrived = self._arriving.pop(layer, None)
            if arrived is not None:
                arrived.copy.wait()
                pool.apply(arrived.wanted, arrived.move)
            move = pool.plan(wanted)
            self._arriving[layer] = _Arrival(wanted, move, self._copier.start(pool, move))
        return len(move.missing) * pool.chunk_bytes, len(wanted) - len(move.missing)

    def _logits(
        self, layer: int, q_BQ1D: torch.Tensor, scale: float, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n_prompt, n_static = self._layout.n_tokens, self._layout.static_tokens
        prompt_QT = token_logits(q_BQ1D, self._mirror[layer], n_tokens=n_prompt, scale=scale, softcap=softcap)
        static = self._static
        static_QT = token_logits(
            q_BQ1D, static.pages[layer], n_tokens=static.lengths[layer], scale=scale, softcap=softcap
        )
        return prompt_QT, static_QT[:, n_static:]

    def _chosen_tokens(self, *, arriving: bool = True) -> int:
        if self._slots is not None:
            return self._slots.n_tokens
        total = sum(pool.n_tokens for pool in self._pools.values())
        if arriving:
            total += sum(len(a.move.missing) for a in self._arriving.values()) * self._layout.chunk_tokens
        return round(total / len(self._pools))

    def managed_footprint(self) -> Footprint:
        static_tokens = self._static.lengths[self.shape.layers[-1]]
        if self._slots is not None:
            kv_bytes = self._static.n_bytes + self._slots.kv_bytes
            tables = Footprint(metadata_bytes=self._slots.table_bytes)
            return self._reads(kv_bytes=kv_bytes, static_tokens=static_tokens) + tables
        slots = [pool.slots for pool in self._pools.values()]
        staged = [arrival.move.staged for arrival in self._arriving.values()]
        kv_bytes = self._static.n_bytes + tensor_bytes([*slots, *staged])
        return self._reads(kv_bytes=kv_bytes, static_tokens=static_tokens)

    def close(self) -> None:
        for arrival in self._arriving.values():
            arrival.copy.wait()
        self._arriving.clear()
        if self._copier is not None:
            self._copier.close()
        if self._slots is not None:
            self.settle()  # the record outlives the tensors
            self._slots.close()
        self._static.clear()
        for pool in self._pools.values():
            pool.clear()
        self._pools.clear()
        self._mirror = {}
        super().close()


class MaskedLsaSequence(LsaSequence):
    """The oracle of the tests: everything stays on the device, and what is not resident is masked."""

    def __init__(
        self,
        prompt: PromptKV,
        device: torch.device,
        *,
        layout: ChunkLayout,
        selector: Selector,
        schedule: Schedule,
        reserve_tokens: int = 0,
    ) -> None:
        super().__init__(prompt, device, layout=layout, selector=selector, schedule=schedule)
        self._pool = PagePool(self.shape, n_tokens=prompt.n_tokens + reserve_tokens, dtype=prompt.dtype, device=device)
        self._pool.load(prompt, [(0, prompt.n_tokens)])
        nothing = torch.empty(0, dtype=torch.long)
        self._ids = dict.fromkeys(self.shape.layers, nothing)
        self._next: dict[int, torch.Tensor] = {}
        self._first_refresh()

    def _append(self, layer: int, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        self._pool.append(layer, k_BH1D, v_BH1D)

    def _attend(self, layer: int, q_BQ1D: torch.Tensor, scale: float, extras: AttentionExtras) -> torch.Tensor:
        pages, layout = self._pool.pages[layer], self._layout
        keep = torch.ones(pages.shape[0] * self.shape.page_tokens, dtype=torch.bool, device=self.device)
        C = layout.chunk_tokens
        keep[layout.first * C : layout.last * C] = False
        for chunk in self._ids[layer].tolist():
            keep[chunk * C : (chunk + 1) * C] = True
        return paged_attention(
            q_BQ1D,
            pages,
            n_tokens=self._pool.lengths[layer],
            scale=scale,
            softcap=extras.softcap,
            sink_logits=extras.sink_logits,
            keep_SP=keep.view(pages.shape[0], -1),
        )

    def _place(self, layer: int, wanted: torch.Tensor) -> tuple[int, int]:
        if self._schedule.stale and len(self._moved_bytes) > 1:
            self._ids[layer] = self._next.get(layer, self._ids[layer])
            self._next[layer] = wanted
        n_kept = int(torch.isin(wanted, self._ids[layer]).sum())
        if layer not in self._next:
            self._ids[layer] = wanted
        chunk_bytes = self._layout.chunk_tokens * self.shape.layer_bytes_per_token
        return (len(wanted) - n_kept) * chunk_bytes, n_kept

    def _logits(
        self, layer: int, q_BQ1D: torch.Tensor, scale: float, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n_prompt, n_tokens = self._layout.n_tokens, self._pool.lengths[layer]
        logits_QT = token_logits(q_BQ1D, self._pool.pages[layer], n_tokens=n_tokens, scale=scale, softcap=softcap)
        return logits_QT[:, :n_prompt], logits_QT[:, n_prompt:]

    def _chosen_tokens(self, *, arriving: bool = True) -> int:
        total = 0
        for layer, ids in self._ids.items():
            coming = self._next.get(layer, ids[:0]) if arriving else ids[:0]
            total += len(torch.unique(torch.cat([ids, coming])))
        return round(total * self._layout.chunk_tokens / len(self._ids))

    def managed_footprint(self) -> Footprint:
        n_static = self._pool.lengths[self.shape.layers[-1]] - self._layout.candidate_tokens
        return self._reads(kv_bytes=self._pool.n_bytes, static_tokens=n_static)

    def close(self) -> None:
        self._pool.clear()
        super().close()
