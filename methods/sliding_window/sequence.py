"""One sequence under StreamingLLM, evicting (a ring) and masked (the oracle).

Positions in the cache: sinks 0..s-1, then the window. A key keeps the rotation of its own position, so distances inside
the window are right as they are; a sink is ``n_evicted`` tokens nearer in the cache than in the text. Instead of
turning the sinks' keys at every step, the query is turned back by ``n_evicted`` for them alone: R(p-e)q . R(i)k depends
on (p - e) - i only, which is the distance in the cache.
"""

import torch

from kvscope.methods.attention import merge_partials, paged_partial, stored_partial
from kvscope.methods.base import AttentionExtras, Rotation, SequenceCache
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.shape import Footprint
from kvscope.methods.static_step import StepPages, unsupported_step
from kvscope.methods.store import PagePool, PromptKV


class StreamingSequence(SequenceCache):
    """Sinks in pages of their own, and a ring of W tokens in pages: a new token overwrites the oldest."""

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
        self._step: StepPages | None = None
        self._angles: dict[Rotation, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def n_tokens(self) -> int:
        return self._lengths[self.shape.layers[-1]]

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
            return self._attend_static(self._step, layer, q_BQ1D, k_BH1D, v_BH1D, scale, extras)
        ring, oldest = self._ring, self._oldest[layer]
        if ring.lengths[layer] < self._window:
            ring.append(layer, k_BH1D, v_BH1D)
        else:
            ring.write(layer, oldest, k_BH1D, v_BH1D)
            self._oldest[layer] = (oldest + 1) % self._window
        self._lengths[layer] += 1
        n_ring = ring.lengths[layer]
        parts = [
            paged_partial(q_BQ1D, ring.pages[layer], n_tokens=n_ring, scale=scale, softcap=extras.softcap),
        ]
        if self._sinks:
            q_sink = back(q_BQ1D, extras, self._lengths[layer] - self._sinks - n_ring)
            sink_pages = self._sink_pool.pages[layer]
            parts.append(paged_partial(q_sink, sink_pages, n_tokens=self._sinks, scale=scale, softcap=extras.softcap))
        return merge_partials(parts, q_BQ1D, sink_logits=extras.sink_logits)

    # -- steps at fixed addresses

    def static_reasons(self) -> list[str]:
        return unsupported_step(self.shape, self.device, self._ring.dtype)

    def make_static(self) -> None:
        self._step = StepPages(self._ring, self.device)

    @property
    def static_version(self) -> int:
        return 0 if self._step is None else self._step.version

    @property
    def _full(self) -> bool:
        return self._ring.lengths[self.shape.layers[-1]] == self._window

    def _n_evicted(self) -> int:
        """Tokens evicted once the step's own is stored."""
        n_ring = min(self._ring.lengths[self.shape.layers[-1]] + 1, self._window)
        return self.n_tokens + 1 - self._sinks - n_ring

    def begin_step(self) -> None:
        if self._step is None:
            return
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

    def _attend_static(
        self,
        step: StepPages,
        layer: int,
        q_BQ1D: torch.Tensor,
        k_BH1D: torch.Tensor,
        v_BH1D: torch.Tensor,
        scale: float,
        extras: AttentionExtras,
    ) -> torch.Tensor:
        step.append(layer, k_BH1D, v_BH1D)
        parts = [stored_partial(q_BQ1D, step.store(layer), scale=scale, softcap=extras.softcap)]
        if self._sinks:
            rotation = extras.rotation
            if rotation is not None and rotation not in self._angles:
                # Met in the trial before the capture; written anew before each step from then on.
                self._angles[rotation] = rotation.angles(self._n_evicted())
            q_sink = q_BQ1D if rotation is None else rotation.back_by(q_BQ1D, *self._angles[rotation])
            store = PagedKV(pages=self._sink_pool.pages[layer], n_tokens=self._sinks)
            parts.append(stored_partial(q_sink, store, scale=scale, softcap=extras.softcap))
        return merge_partials(parts, q_BQ1D, sink_logits=extras.sink_logits)

    def managed_footprint(self) -> Footprint:
        n_resident = self._sinks + self._ring.lengths[self.shape.layers[-1]]
        return Footprint(
            kv_bytes=self._sink_pool.n_bytes + self._ring.n_bytes,
            bytes_read_per_step=self.shape.read_bytes(n_resident),
            attention_flops_per_step=self.shape.attention_flops(n_resident),
        )

    def close(self) -> None:
        self._angles.clear()
        self._sink_pool.clear()
        self._ring.clear()
        super().close()


class MaskedStreaming(SequenceCache):
    """The oracle of the tests: every token stays, sinks and window are masks over the same full cache."""

    def __init__(
        self, prompt: PromptKV, device: torch.device, *, sinks: int, window_tokens: int, reserve_tokens: int = 0
    ) -> None:
        super().__init__(prompt, device)
        self._sinks = sinks
        self._window = window_tokens
        self._pool = PagePool(self.shape, n_tokens=prompt.n_tokens + reserve_tokens, dtype=prompt.dtype, device=device)
        self._pool.load(prompt, [(0, prompt.n_tokens)])

    @property
    def n_tokens(self) -> int:
        return self._pool.lengths[self.shape.layers[-1]]

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
        self._pool.append(layer, k_BH1D, v_BH1D)
        pages, n_tokens = self._pool.pages[layer], self._pool.lengths[layer]
        position = torch.arange(pages.shape[0] * self.shape.page_tokens, device=self.device).view(pages.shape[0], -1)
        first = max(self._sinks, n_tokens - self._window)
        keep_window = (position >= first) & (position < n_tokens)
        q_by_set = [(q_BQ1D, keep_window)]
        if self._sinks:
            q_by_set.append((back(q_BQ1D, extras, first - self._sinks), position < self._sinks))
        parts = [
            paged_partial(q, pages, n_tokens=n_tokens, scale=scale, softcap=extras.softcap, keep_SP=keep)
            for q, keep in q_by_set
        ]
        return merge_partials(parts, q_BQ1D, sink_logits=extras.sink_logits)

    def managed_footprint(self) -> Footprint:
        n_resident = min(self.n_tokens, self._sinks + self._window)
        return Footprint(
            kv_bytes=self._pool.n_bytes,
            bytes_read_per_step=self.shape.read_bytes(n_resident),
            attention_flops_per_step=self.shape.attention_flops(n_resident),
        )

    def close(self) -> None:
        self._pool.clear()
        super().close()


def back(q_BQ1D: torch.Tensor, extras: AttentionExtras, n_evicted: int) -> torch.Tensor:
    """Return the query at its position in the cache; unchanged on a layer without rotation, or before any eviction."""
    if extras.rotation is None or n_evicted == 0:
        return q_BQ1D
    return extras.rotation.back(q_BQ1D, n_evicted)
