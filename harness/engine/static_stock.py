"""The model's own sliding-window layers in a step of fixed addresses: a ring in pages instead of tensors that move.

What a stock layer keeps (the last ``window - 1`` tokens) is copied into the ring when steps begin; the order within it
means nothing, since keys are rotated at their own position.

Shapes: H KV heads, D head size, S pages, P tokens a page.
"""

from __future__ import annotations

from typing import Any

import torch

from kvscope.methods.attention import stored_attention
from kvscope.methods.base import AttentionCall, SequenceCache
from kvscope.methods.kernels.paged_decode.inputs import PagedKV, TokenPlace
from kvscope.methods.shape import ModelShape
from kvscope.methods.static_step import unsupported_step, write_token
from kvscope.methods.step_batch import StepReads
from kvscope.methods.step_counters import StepCounters


def unsupported_stock(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return every reason why the model's sliding-window layers cannot run at fixed addresses."""
    reasons = unsupported_step(shape, device, dtype)
    if not shape.sliding_is_uniform:
        reasons = [*reasons, "their KV heads or widths are not those of the managed layers"]
    return [f"sliding-window layers: {reason}" for reason in reasons]


class Rings:
    """The sliding-window layers of one sequence. Their place and count are the same in all of them.

    Attributes:
        pages: layer -> its ring [S, H, 2, P, D].
    """

    def __init__(self, sequence: SequenceCache, dtype: torch.dtype, counters: StepCounters) -> None:
        """Take over the stock layers' tensors; the sequence's own hold the rings' memory afterwards."""
        shape = sequence.shape
        self._window = shape.sliding_window
        self._page_tokens = shape.page_tokens
        device = sequence.device
        self._count, self._slot, self._offset = (counters.take() for _ in range(3))
        self.pages: dict[int, torch.Tensor] = {}
        for layer, state in sequence.stock.items():
            pages = self._filled(sequence.shape, state, dtype, device, n_tokens=sequence.n_tokens)
            self.pages[layer] = pages
            # Bytes are counted where the stock layer's were, and freed with them.
            state.keys, state.values = pages[:, :, 0], pages[:, :, 1]

    def place(self, position: int) -> None:
        """Before the step of the token at ``position``."""
        if not self.pages:
            return
        slot, offset = divmod(position % self._window, self._page_tokens)
        self._slot.set(slot)
        self._offset.set(offset)
        self._count.set(min(position + 1, self._window))

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Store the step's token over the oldest, then attend to all there is. Returns [1, Q, 1, D]."""
        reads = self.reads(layer)
        write_token(reads.place, call.key, call.value)
        return stored_attention(call, reads.stores)

    def reads(self, layer: int) -> StepReads:
        """Return where the step's token goes and what attention reads."""
        pages = self.pages[layer]
        return StepReads(
            place=TokenPlace(pages=pages, slot_1=self._slot.device_1, offset_1=self._offset.device_1),
            stores=(PagedKV(pages=pages, n_tokens=self._count.device_1[None]),),
        )

    def clear(self) -> None:
        """Free the rings, and give the counters back."""
        self.pages.clear()
        for counter in (self._count, self._slot, self._offset):
            counter.release()

    def _filled(
        self, shape: ModelShape, state: Any, dtype: torch.dtype, device: torch.device, *, n_tokens: int
    ) -> torch.Tensor:
        """Return a ring that holds what a stock layer holds, each token at its position modulo the window."""
        n_pages = -(-self._window // self._page_tokens)
        pages = torch.zeros(
            (n_pages, shape.n_kv_heads, 2, self._page_tokens, shape.head_dim), dtype=dtype, device=device
        )
        if not state.is_initialized:
            return pages
        n_kept = min(state.keys.shape[2], n_tokens, self._window)
        at = torch.arange(n_tokens - n_kept, n_tokens, device=device) % self._window
        for kind, x_BHTD in enumerate((state.keys, state.values)):
            kept_THD = x_BHTD[0, :, x_BHTD.shape[2] - n_kept :].transpose(0, 1)
            pages[at // self._page_tokens, :, kind, at % self._page_tokens] = kept_THD
        return pages
