"""One sequence under LSA: the storage that recalls what a schedule chooses, and its steps at fixed addresses."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvscope.methods.attention import joint_attention, stored_attention
from kvscope.methods.base import AttentionCall, Residency
from kvscope.methods.kernels.dispatch import triton_version, unsupported_packed
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.kv_format import PagePacking
from kvscope.methods.lsa.labels import token_logits
from kvscope.methods.lsa.layout import ChunkLayout
from kvscope.methods.lsa.pool import ChunkPool, Copier, Copy, Move
from kvscope.methods.lsa.schedule import LsaSequence, Schedule
from kvscope.methods.lsa.selection import Selector
from kvscope.methods.packed_mirror import packed_mirror
from kvscope.methods.packed_pool import PackedPool, PackedStep
from kvscope.methods.shape import Footprint, tensor_bytes
from kvscope.methods.static_step import StepPages, make_step, open_pool, unsupported_step, write_token
from kvscope.methods.step_batch import StepReads, keep_query
from kvscope.methods.step_counters import StepCounters
from kvscope.methods.store import PagePool, PromptKV

if TYPE_CHECKING:
    from kvscope.methods.lsa.slots import ChunkSlots


@dataclass(frozen=True)
class _Arrival:
    """A set chosen one interval ago, its missing chunks on their way."""

    wanted: torch.Tensor
    move: Move
    copy: Copy


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
        self._packing: PagePacking | None = None
        if self.shape.kv is not None:
            self._packing = self.shape.packing(layout.unit_tokens(self.shape.page_tokens))
            self._mirror = packed_mirror(prompt, self._packing, device)
            self._mirror_bytes = tensor_bytes(self._mirror.values())
        n_static = layout.static_tokens
        self._static = open_pool(self.shape, n_tokens=n_static + reserve_tokens, dtype=prompt.dtype, device=device)
        self._static.load(prompt, layout.static_ranges)
        self._pools = {
            layer: ChunkPool(
                self._mirror[layer],
                chunk_tokens=layout.chunk_tokens,
                device=self.shape.device_of(layer, device),
                packing=self._packing,
            )
            for layer in self.shape.layers
        }
        self._arriving: dict[int, _Arrival] = {}
        self._copier = Copier() if schedule.stale else None
        self._recall = next(iter(self._pools.values())).backend
        self._step: StepPages | PackedStep | None = None
        self._slots: ChunkSlots | None = None
        self._n_unread_refreshes = self._first_chosen = 0
        self._first_refresh()

    # -- steps at fixed addresses

    def static_reasons(self) -> list[str]:
        if self._selector.reads_mass:
            return ["chunks are chosen by the attention of the step itself"]
        version, problem = triton_version()
        if version is None:
            return [problem]
        from kvscope.methods.lsa.slots import unsupported_slots

        reasons = unsupported_step(self.shape, self.device, self._static.dtype)
        if self._packing is not None and self.device.type == "cuda":
            n_heads = {"n_q_heads": self.shape.n_q_heads, "n_kv_heads": self.shape.n_kv_heads}
            found = unsupported_packed(self.device, dtype=self._static.dtype, packing=self._packing, **n_heads)
            reasons += [reason for reason in found if reason not in reasons]
        return reasons + unsupported_slots(self._mirror, self._pools)

    def make_static(self, counters: StepCounters) -> None:
        from kvscope.methods.lsa.slots import ChunkSlots

        self._step = make_step(self._static, counters)
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
                spare_share=counters.spare_share,
                most_new=self._selector.most_new,
            )

    @property
    def static_version(self) -> int:
        pages = 0 if self._step is None else self._step.version
        return pages + (0 if self._slots is None else self._slots.version)

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        if self._step is None:
            return super().attend(layer, call)
        keep_query(call, self._selector.query_place(layer))
        write_token(self._step.place_of(layer), call.key, call.value)
        return stored_attention(call, self._step_stores(self._step, layer))

    def _step_stores(self, step: StepPages | PackedStep, layer: int) -> tuple[PagedKV, ...]:
        return step.stores(layer) + (() if self._slots is None else (self._slots.store(layer),))

    def step_reads(self, layer: int) -> StepReads | None:
        if self._step is None or self._packing is not None:
            return None
        stores = self._step_stores(self._step, layer)
        query_place = self._selector.query_place(layer)
        return StepReads(place=self._step.place_of(layer), stores=stores, query_place=query_place)

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
        self._n_fed = dict.fromkeys(self.shape.layers, self._n_fed[self.shape.layers[-1]] + 1)

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
        packed = super().backends()
        if not self._layout.n_candidates:
            return packed
        return (*packed, *self._selector.backends(), f"recall: {self._recall}")

    def residency(self) -> Residency:
        self.settle()
        found = super().residency()
        if self._slots is None or not self._slots.fallbacks:
            return found
        return replace(found, fallbacks=found.fallbacks + self._slots.fallbacks)

    # -- steps as they come

    def _append(self, layer: int, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        self._static.append(layer, k_BH1D, v_BH1D)

    def _attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        pool, static = self._pools[layer], self._static
        if isinstance(static, PackedPool):
            stores = static.stores(layer)
            return stored_attention(call, [*stores, pool.store()] if pool.n_tokens else stores)
        return joint_attention(call, [(static.pages[layer], static.lengths[layer]), (pool.slots, pool.n_tokens)])

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

    def _logits(self, layer: int, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        n_prompt, n_static, static = self._layout.n_tokens, self._layout.static_tokens, self._static
        assert isinstance(static, PagePool)  # ``Lsa`` refuses packed ones
        prompt_QT = token_logits(call, self._mirror[layer], n_tokens=n_prompt)
        static_QT = token_logits(call, static.pages[layer], n_tokens=static.lengths[layer])
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
            table_bytes = self._slots.table_bytes
            tables = Footprint(
                metadata_bytes=table_bytes,
                spare_metadata_bytes=table_bytes,
                spare_kv_bytes=self._slots.spare_bytes,
            )
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
        if self._step is not None:
            self._step.release()
        self._static.clear()
        for pool in self._pools.values():
            pool.clear()
        self._pools.clear()
        self._mirror = {}
        super().close()
