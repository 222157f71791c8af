"""The model's own sliding-window layers in a step of fixed addresses: a ring in pages instead of tensors that move.

What a stock layer keeps (the last ``window - 1`` tokens) is copied into the ring when steps begin; the order within it
means nothing, since keys are rotated at their own position.

Shapes: H KV heads, D head size, S pages, P tokens a page.
"""

from __future__ import annotations

from typing import Any

import torch

from kvscope.harness.engine.glue import EngineLayer
from kvscope.methods.attention import stored_attention
from kvscope.methods.base import SequenceCache
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.shape import ModelShape
from kvscope.methods.static_step import unsupported_step, write_token


def unsupported_stock(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return every reason why the model's sliding-window layers cannot run at fixed addresses."""
    return [f"sliding-window layers: {reason}" for reason in unsupported_step(shape, device, dtype)]


class Rings:
    """The sliding-window layers of one sequence. Their place and count are the same in all of them."""

    def __init__(self, sequence: SequenceCache, dtype: torch.dtype) -> None:
        """Take over the stock layers' tensors; the sequence's own hold the ring's memory afterwards."""
        shape = sequence.shape
        self._window = shape.sliding_window
        self._page_tokens = shape.page_tokens
        device = sequence.device
        self._count_11 = torch.zeros((1, 1), dtype=torch.int32, device=device)
        self._slot_1 = torch.zeros(1, dtype=torch.long, device=device)
        self._offset_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.layers: dict[int, RingLayer] = {}
        for layer, state in sequence.stock.items():
            pages = self._filled(sequence.shape, state, dtype, device, n_tokens=sequence.n_tokens)
            self.layers[layer] = RingLayer(layer, self, sequence, pages)
            # Bytes are counted where the stock layer's were, and freed with them.
            state.keys, state.values = pages[:, :, 0], pages[:, :, 1]

    def place(self, position: int) -> None:
        """Before the step of the token at ``position``."""
        if not self.layers:
            return
        slot, offset = divmod(position % self._window, self._page_tokens)
        self._slot_1.fill_(slot)
        self._offset_1.fill_(offset)
        self._count_11.fill_(min(position + 1, self._window))

    def store(self, pages: torch.Tensor) -> PagedKV:
        """Return what a query reads of a layer's ring."""
        return PagedKV(pages=pages, n_tokens=self._count_11)

    def write(self, pages: torch.Tensor, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        """Store the step's token over the oldest."""
        write_token(pages, self._slot_1, self._offset_1, k_BH1D, v_BH1D)

    def clear(self) -> None:
        """Free the rings."""
        for layer in self.layers.values():
            layer.pages = torch.empty(0)
        self.layers.clear()

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


class RingLayer(EngineLayer):
    """One sliding-window layer: the new token overwrites the oldest, and the query sees all there is."""

    def __init__(self, index: int, rings: Rings, sequence: SequenceCache, pages: torch.Tensor) -> None:
        super().__init__(index)
        self.pages = pages
        self._rings, self._sequence = rings, sequence

    def get_seq_length(self) -> int:
        return self._sequence.n_tokens

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        s_aux: torch.Tensor | None,
    ) -> torch.Tensor:
        self._rings.write(self.pages, key, value)
        stores = [self._rings.store(self.pages)]
        return stored_attention(query, stores, scale=scale, softcap=softcap, sink_logits=s_aux)
