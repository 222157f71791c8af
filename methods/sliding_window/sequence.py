"""One sequence under StreamingLLM: sinks, and a ring.

Positions in the cache: sinks 0..s-1, then the window. A key keeps the rotation of its own position, so distances inside
the window are right as they are; a sink is ``n_evicted`` tokens nearer in the cache than in the text. Instead of
turning the sinks' keys at every step, the query is turned back by ``n_evicted`` for them alone: R(p-e)q . R(i)k depends
on (p - e) - i only, which is the distance in the cache.
"""

import torch

from kvscope.methods.attention import merge_partials, paged_partial, stored_partial
from kvscope.methods.base import AttentionCall, Rotation
from kvscope.methods.joined import Read
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.shape import Footprint
from kvscope.methods.static_step import PagedSequence, StepPages
from kvscope.methods.step_batch import StepReads
from kvscope.methods.step_counters import Counter, StepCounters
from kvscope.methods.store import PagePool, PromptKV


class StreamingSequence(PagedSequence):
    """Sinks in pages of their own, and a ring of W tokens in pages: a new token overwrites the oldest."""

    _step: StepPages | None = None

    def __init__(
        self, prompt: PromptKV, device: torch.device, *, sinks: int, window_tokens: int, reserve_tokens: int = 0
    ) -> None:
        super().__init__(prompt, device)
        self._sinks = sinks
        self._window = window_tokens
        self._lengths = dict.fromkeys(self.shape.layers, prompt.n_tokens)
        n_behind = prompt.n_tokens - sinks
        n_kept = min(n_behind, window_tokens)
        capacity = min(n_behind + reserve_tokens, window_tokens)
        self._sink_pool = PagePool(self.shape, n_tokens=sinks, dtype=prompt.dtype, device=device)
        self._sink_pool.load(prompt, [(0, sinks)])
        self._ring = PagePool(self.shape, n_tokens=max(n_kept, capacity), dtype=prompt.dtype, device=device)
        self._ring.load(prompt, [(prompt.n_tokens - n_kept, prompt.n_tokens)])
        self._oldest = dict.fromkeys(self.shape.layers, 0)
        self._angles: dict[Rotation, tuple[torch.Tensor, torch.Tensor]] = {}
        self._evicted: Counter | None = None

    @property
    def n_tokens(self) -> int:
        return self._lengths[self.shape.layers[-1]]

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        if self._step is not None:
            return self._attend_static(self._step, layer, call)
        self._append(layer, call)
        ring, n_ring = self._ring.pages[layer], self._ring.lengths[layer]
        scale, softcap = call.scale, call.softcap
        parts = [paged_partial(call.query, ring, n_tokens=n_ring, scale=scale, softcap=softcap)]
        if self._sinks:
            q_sink = back(call, self._lengths[layer] - self._sinks - n_ring)
            sink_pages = self._sink_pool.pages[layer]
            parts.append(paged_partial(q_sink, sink_pages, n_tokens=self._sinks, scale=scale, softcap=softcap))
        return merge_partials(parts, call.query, sink_logits=call.sink_logits)

    def reads(self, layer: int, call: AttentionCall) -> tuple[Read, ...] | None:
        if self._step is not None:
            return None
        self._append(layer, call)
        ring = self._ring.read(layer)
        if not self._sinks:
            return (ring,)
        n_evicted = self._lengths[layer] - self._sinks - ring.n_tokens
        return ring, self._sink_pool.read(layer, turn_tokens=n_evicted)

    def _append(self, layer: int, call: AttentionCall) -> None:
        """Store a token: over the oldest where the window is full."""
        ring, oldest = self._ring, self._oldest[layer]
        if ring.lengths[layer] < self._window:
            ring.append(layer, call.key, call.value)
        else:
            ring.write(layer, oldest, call.key, call.value)
            self._oldest[layer] = (oldest + 1) % self._window
        self._lengths[layer] += 1

    # -- steps at fixed addresses

    @property
    def _appended(self) -> PagePool:
        return self._ring

    @property
    def _full(self) -> bool:
        return self._ring.lengths[self.shape.layers[-1]] == self._window

    def _n_evicted(self) -> int:
        """Tokens evicted once the step's own is stored."""
        n_ring = min(self._ring.lengths[self.shape.layers[-1]] + 1, self._window)
        return self.n_tokens + 1 - self._sinks - n_ring

    def make_static(self, counters: StepCounters) -> None:
        super().make_static(counters)
        self._evicted = counters.take()

    def step_reads(self, layer: int) -> StepReads | None:
        if self._step is None or self._evicted is None:
            return None
        place, ring = self._step.place_of(layer), self._step.store(layer)
        if not self._sinks:
            return StepReads(place=place, stores=(ring,))
        sinks = PagedKV(pages=self._sink_pool.pages[layer], n_tokens=self._sinks)
        return StepReads(place=place, stores=(ring, sinks), turn_1=self._evicted.device_1)

    def begin_step(self) -> None:
        if self._step is None or self._evicted is None:
            return
        self._evicted.set(self._n_evicted())
        self._step.place(self._oldest[self.shape.layers[-1]] if self._full else None)
        for rotation, held in self._angles.items():
            for tensor, new in zip(held, rotation.angles(self._n_evicted()), strict=True):
                tensor.copy_(new)

    def end_step(self) -> None:
        if self._step is None:
            return
        if self._full:
            for layer in self.shape.layers:
                self._oldest[layer] = (self._oldest[layer] + 1) % self._window
        else:
            self._step.placed()
        for layer in self.shape.layers:
            self._lengths[layer] += 1

    def _attend_static(self, step: StepPages, layer: int, call: AttentionCall) -> torch.Tensor:
        step.append(layer, call.key, call.value)
        parts = [stored_partial(call.query, step.store(layer), scale=call.scale, softcap=call.softcap)]
        if self._sinks:
            rotation = call.rotation
            if rotation is not None and rotation not in self._angles:
                # Met in the trial before the capture; written anew before each step from then on.
                self._angles[rotation] = rotation.angles(self._n_evicted())
            q_sink = call.query if rotation is None else rotation.back_by(call.query, *self._angles[rotation])
            store = PagedKV(pages=self._sink_pool.pages[layer], n_tokens=self._sinks)
            parts.append(stored_partial(q_sink, store, scale=call.scale, softcap=call.softcap))
        return merge_partials(parts, call.query, sink_logits=call.sink_logits)

    def managed_footprint(self) -> Footprint:
        n_resident = self._sinks + self._ring.lengths[self.shape.layers[-1]]
        return Footprint(
            kv_bytes=self._sink_pool.n_bytes + self._ring.n_bytes,
            bytes_read_per_step=self.shape.read_bytes(n_resident),
            attention_flops_per_step=self.shape.attention_flops(n_resident),
        )

    def close(self) -> None:
        if self._evicted is not None:
            self._evicted.release()
            self._evicted = None
        self._release_step()
        self._angles.clear()
        self._sink_pool.clear()
        self._ring.clear()
        super().close()


def back(call: AttentionCall, n_evicted: int) -> torch.Tensor:
    """Return the query at its position in the cache; unchanged on a layer without rotation, or before any eviction."""
    if call.rotation is None or n_evicted == 0:
        return call.query
    return call.rotation.back(call.query, n_evicted)
