"""What a step of fixed addresses needs of a page pool: the place of the next token and the count, on the device.

A step whose every address and shape is fixed can be captured in a CUDA graph and replayed. What changes from step to
step is written into small tensors between replays (``step_counters``); ``attend`` then changes nothing that Python
knows.

Shapes: B batch (1), H KV heads, D head size, S slots (pages), P tokens a page.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from kvscope.methods.base import SequenceCache
from kvscope.methods.kernels.dispatch import unsupported_decode, unsupported_packed
from kvscope.methods.kernels.paged_decode.inputs import PagedKV, TokenPlace
from kvscope.methods.packed_pool import PackedPool, PackedStep
from kvscope.methods.shape import ModelShape
from kvscope.methods.step_batch import StepReads
from kvscope.methods.step_counters import StepCounters
from kvscope.methods.store import PagePool

Pool = PagePool | PackedPool


def open_pool(shape: ModelShape, *, n_tokens: int, dtype: torch.dtype, device: torch.device) -> Pool:
    """Return an empty pool with room for ``n_tokens``, of packed pages where the shape says so."""
    kind = PagePool if shape.kv is None else PackedPool
    return kind(shape, n_tokens=n_tokens, dtype=dtype, device=device)


def unsupported_step(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return every reason why attention of a captured step cannot run here.

    On a CPU nothing is captured, but the same step runs.
    """
    if device.type == "cpu":
        return []
    n_heads = {"n_q_heads": shape.n_q_heads, "n_kv_heads": shape.n_kv_heads}
    if shape.kv is not None:
        return unsupported_packed(device, dtype=dtype, packing=shape.packing(), **n_heads)
    return unsupported_decode(device, dtype=dtype, head_dim=shape.head_dim, **n_heads)


class PagedSequence(SequenceCache):
    """A sequence whose new tokens all go into one page pool: what makes its steps ones of fixed addresses.

    A subclass gives the pool, and does for a step what its storage needs beside it.
    """

    _step: StepPages | PackedStep | None = None

    @property
    @abstractmethod
    def _appended(self) -> Pool:
        """The pool."""

    def static_reasons(self) -> list[str]:
        return unsupported_step(self.shape, self.device, self._appended.dtype)

    def make_static(self, counters: StepCounters) -> None:
        self._step = self._appended.make_step(counters)

    @property
    def static_version(self) -> int:
        return 0 if self._step is None else self._step.version

    def _release_step(self) -> None:
        if self._step is not None:
            self._step.release()


class StepPages:
    """A page pool appended to at a place that the device knows; all layers hold equally many tokens between steps.

    Attributes:
        version: changes when pages moved: what was captured before must be captured again.
        count_11: tokens stored with the step's, int32 [1, 1].
    """

    def __init__(self, pool: PagePool, counters: StepCounters) -> None:
        self.version = 0
        self._pool = pool
        self._layers = pool.shape.layers
        self._page_tokens = pool.shape.page_tokens
        self._room_tokens = 0
        self._counters = [counters.take() for _ in range(3)]
        self._count, self._slot, self._offset = self._counters
        self.count_11 = self._count.device_1[None]

    def place(self, index: int | None = None) -> None:
        """Before a step: make room for its token and tell the device where that is.

        Args:
            index: a stored token to write over; None: behind the last.
        """
        n_stored = self._pool.lengths[self._layers[-1]]
        if index is None:
            index, n_stored = n_stored, n_stored + 1
        if n_stored > self._room_tokens:
            if self._pool.reserve(n_stored):
                self.version += 1
            self._room_tokens = self._page_tokens * min(len(pages) for pages in self._pool.pages.values())
        slot, offset = divmod(index, self._page_tokens)
        self._slot.set(slot)
        self._offset.set(offset)
        self._count.set(n_stored)

    def placed(self) -> None:
        """After a step: its token is stored in every layer."""
        self._pool.lengths = dict.fromkeys(self._layers, self._pool.lengths[self._layers[-1]] + 1)

    def append(self, layer: int, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        """Store the step's token."""
        write_token(self.place_of(layer), k_BH1D, v_BH1D)

    def place_of(self, layer: int) -> TokenPlace:
        """Return where the step's token goes."""
        return TokenPlace(pages=self._pool.pages[layer], slot_1=self._slot.device_1, offset_1=self._offset.device_1)

    def stores(self, layer: int) -> tuple[PagedKV, ...]:
        """Return what attention reads, the step's token included."""
        return (self.store(layer),)

    def store(self, layer: int) -> PagedKV:
        """The same: all of it is in one store."""
        return PagedKV(pages=self._pool.pages[layer], n_tokens=self.count_11)

    def reads(self, layer: int) -> StepReads | None:
        """Return what a step does in a layer, so that many sequences attend in one launch."""
        return StepReads(place=self.place_of(layer), stores=self.stores(layer))

    def release(self) -> None:
        """Give the counters back, once."""
        while self._counters:
            self._counters.pop().release()


def write_token(place: TokenPlace, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
    """Write one token's K and V where the device knows."""
    place.pages[place.slot_1, :, :, place.offset_1] = torch.stack((k_BH1D[:, :, 0], v_BH1D[:, :, 0]), 2)
