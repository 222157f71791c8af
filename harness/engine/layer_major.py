"""Layer-major, chunked prefill into host pages shared by every method.

Layers are outermost, chunks of tokens innermost, so that only one layer's K and V are on the device at a time. The
model's own code does everything: its forward runs once per chunk over stand-ins that record how each layer is called,
then every layer is called that way, chunk after chunk. This holds for any decoder whose layers talk through hidden
states only. Where layers are on several devices, the hidden states of all tokens go along.

Shapes: B batch (1), N prompt tokens, S tokens of a chunk, H KV heads, P tokens a page, D head size, M hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvscope.harness.engine.backend import ReadyModel
from kvscope.harness.engine.clock import Clock
from kvscope.harness.engine.finite import require_finite_layers, total
from kvscope.harness.engine.glue import (
    EngineCache,
    EngineLayer,
    StockLayer,
    cache_argument,
    called_attention,
    decoder_of,
    layers_of,
    set_layers,
    widened,
)
from kvscope.methods.base import AttentionCall, Collector, Rotation
from kvscope.methods.shape import tensor_bytes
from kvscope.methods.store import PromptKV, empty_host_pages


def layer_major_prefill(
    ready: ReadyModel,
    ids_N: torch.Tensor,
    *,
    listeners: Mapping[int, Sequence[Collector]],
    chunk_tokens: int,
    seed: int,
    prompt_sha256: str,
) -> PromptKV:
    """Prefill a prompt one layer at a time; arguments as ``Backend.prefill``.

    Returns:
        Host pages of every managed layer, the stock layers, and the last token's hidden states.
    """
    run = _LayerMajor(ready, ids_N, chunk_tokens, listeners)
    if len(ids_N):
        run.execute()
    return PromptKV(
        shape=ready.shape,
        n_tokens=len(ids_N),
        pages=run.host_pages,
        dtype=ready.dtype,
        stock=run.stock,
        last_hidden=run.last_hidden,
        seed=seed,
        prompt_sha256=prompt_sha256,
        scores_s=run.clock.total_s(),
        peak_device_kv_bytes=run.peak_device_kv_bytes,
    )


class _LayerMajor:
    """One prefill: records the calls, then replays them layer by layer."""

    def __init__(
        self, ready: ReadyModel, ids_N: torch.Tensor, chunk_tokens: int, listeners: Mapping[int, Sequence[Collector]]
    ) -> None:
        shape = ready.shape
        n_tokens = len(ids_N)
        self.ready = ready
        self.ids_N = ids_N.to(ready.device)
        self.spans = [(start, min(start + chunk_tokens, n_tokens)) for start in range(0, n_tokens, chunk_tokens)]
        self.listeners = listeners
        pinned = ready.device.type == "cuda"
        self.host_pages = {
            layer: empty_host_pages(shape, n_tokens, dtype=ready.dtype, pinned=pinned) for layer in shape.layers
        }
        self.stock: dict[int, Any] = {layer: StockLayer(shape.sliding_window) for layer in shape.sliding_layers}
        self.last_hidden: dict[int, torch.Tensor] = {}
        self.peak_device_kv_bytes = 0
        self.clock = Clock()
        self._totals: dict[int, list[torch.Tensor]] = {}

    def execute(self) -> None:
        shape = self.ready.shape
        states: dict[int, Any] = dict(self.stock)
        for layer in shape.layers:
            states[layer] = PrefillLayer(
                layer,
                self.host_pages[layer],
                page_tokens=shape.page_tokens,
                rotation=self.ready.rotations[layer],
                listeners=[each for each in self.listeners.get(layer, ()) if each.hears_attention],
                clock=self.clock,
            )
        # The last layer's output would only feed the logits, which nobody reads from a prefill.
        if shape.n_layers - 1 in shape.layers:
            states[shape.n_layers - 1].ends_prefill = True
        hidden_BNM, calls = self._record(EngineCache([states[layer] for layer in range(shape.n_layers)]))
        buffer: torch.Tensor | None = None
        for layer, module in enumerate(layers_of(decoder_of(self.ready.model))):
            device = shape.device_of(layer, self.ready.device)
            hidden_BNM = hidden_BNM.to(device)
            if buffer is None or buffer.device != hidden_BNM.device:
                buffer = self._new_buffer(device)
            if layer in shape.layers:
                states[layer].buffer = buffer
            self.last_hidden[layer] = hidden_BNM[:, -1].clone()
            for (start, end), chunk_calls in zip(self.spans, calls, strict=True):
                hidden_BSM = hidden_BNM[:, start:end]
                out_BSM = chunk_calls[layer].on(module, hidden_BSM)
                for collector in self.listeners.get(layer, ()):
                    k_BHSD, v_BHSD = buffer[0, :, :, start:end], buffer[1, :, :, start:end]
                    rotation = self.ready.rotations[layer]
                    if collector.unrotated_keys and rotation is not None:
                        k_BHSD = rotation.undo(k_BHSD, start_tokens=start)
                    collector.chunk(k_BHSD, v_BHSD, hidden_BSM, start_tokens=start)
                if out_BSM is not None:
                    hidden_BSM.copy_(out_BSM)  # in place: one copy of the prompt's hidden states
            # Read once, behind the last layer: nothing waits here.
            out_total = total(hidden_BNM)
            kv_totals = [total(x_BHTD) for x_BHTD in buffer] if layer in shape.layers else [out_total, out_total]
            self._totals[layer] = [*kv_totals, out_total]
            if layer in shape.layers:
                states[layer].buffer = None
            live = [buffer, *(x for state in self.stock.values() for x in (state.keys, state.values))]
            self.peak_device_kv_bytes = max(self.peak_device_kv_bytes, tensor_bytes(live))
        require_finite_layers(self._totals, ("K", "V", "the output"), self.ready.dtype)
        for state in self.stock.values():
            # What a stock layer keeps is a view of the last chunk's keys; a copy lets go of the rest.
            state.keys, state.values = state.keys.clone(), state.values.clone()

    def _new_buffer(self, device: torch.device) -> torch.Tensor:
        """Return room for one layer's K and V, used by every layer of a device in turn."""
        shape = self.ready.shape
        size = (2, 1, shape.n_kv_heads, len(self.ids_N), shape.head_dim)
        return torch.empty(size, dtype=self.ready.dtype, device=device)

    def _record(self, cache: EngineCache) -> tuple[torch.Tensor, list[list[_Call]]]:
        """Run the model over stand-ins: embeddings of all tokens, and how every layer is called for every chunk."""
        device = self.ready.device
        decoder = decoder_of(self.ready.model)
        hidden_BNM: torch.Tensor | None = None
        calls = []
        with _stand_ins(decoder) as log:
            for start, end in self.spans:
                # Models without position_ids take positions from the cache's length (BART).
                for state in cache.layers:
                    state.recorded_tokens = start
                decoder(
                    input_ids=self.ids_N[None, start:end],
                    position_ids=torch.arange(start, end, device=device)[None],
                    use_cache=True,
                    **{cache_argument(decoder): cache},
                )
                embedded = log[0].hidden
                if hidden_BNM is None:
                    hidden_BNM = embedded.new_empty((1, len(self.ids_N), embedded.shape[-1]))
                hidden_BNM[:, start:end] = embedded
                calls.append([_Call(entry.args, entry.kwargs) for entry in log])
                log.clear()
        for state in cache.layers:
            state.recorded_tokens = None
        assert hidden_BNM is not None
        return hidden_BNM, calls


class _PrefillEnds(Exception):  # noqa: N818 - a signal, not an error
    """Leaves the last layer once its K and V are stored."""


@dataclass(frozen=True)
class _Call:
    """How the model called one decoder layer for one chunk, hidden states aside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, module: Any, hidden_BSM: torch.Tensor) -> torch.Tensor | None:
        """Call the layer; None when it stopped after storing K and V."""
        try:
            out = module(hidden_BSM, *self.args, **self.kwargs)
        except _PrefillEnds:
            return None
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return hidden


@dataclass(frozen=True)
class _Recorded(_Call):
    hidden: torch.Tensor


class _StandIn(nn.Module):
    """Takes a decoder layer's place: notes the call and passes the hidden states through."""

    def __init__(self, real: nn.Module, log: list[_Recorded]) -> None:
        super().__init__()
        # Models read plain attributes of a layer in their loop (attention_type); parameters stay with the real one, and
        # so does a forward that was put in the place of its own (accelerate's, which moves what it is called with).
        plain = {key: value for key, value in vars(real).items() if not key.startswith("_") and key != "forward"}
        self.__dict__.update(plain)
        self.log = log

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.log.append(_Recorded(args, kwargs, hidden_states))
        return hidden_states


@contextmanager
def _stand_ins(decoder: Any) -> Iterator[list[_Recorded]]:
    """Put stand-ins in the decoder's place of layers, and the layers back whatever happens."""
    real = layers_of(decoder)
    log: list[_Recorded] = []
    set_layers(decoder, nn.ModuleList([_StandIn(layer, log) for layer in real]))
    try:
        yield log
    finally:
        set_layers(decoder, real)


class PrefillLayer(EngineLayer):
    """One managed layer while prefilling: K and V go to the shared device buffer and to the layer's host pages.

    Attributes:
        ends_prefill: whether the prefill is over once K and V of this layer are stored.
        buffer: where they go, [2, B, H, N, D]; None unless it is the layer's turn.
    """

    def __init__(
        self,
        index: int,
        host_pages: torch.Tensor,
        *,
        page_tokens: int,
        rotation: Rotation | None,
        listeners: Sequence[Collector],
        clock: Clock,
    ) -> None:
        super().__init__(index)
        self.rotation = rotation
        self.ends_prefill = False
        self._listeners, self._clock = listeners, clock
        self.buffer: torch.Tensor | None = None
        self._host_pages = host_pages
        self._page_tokens = page_tokens
        self._n_tokens = 0

    def get_seq_length(self) -> int:
        return self._n_tokens if self.recorded_tokens is None else self.recorded_tokens

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.buffer is not None
        start, self._n_tokens = self._n_tokens, self._n_tokens + key_states.shape[2]
        self.buffer[0, :, :, start : self._n_tokens] = key_states
        wide_states = widened(value_states, self.buffer.shape[-1])
        self.buffer[1, :, :, start : self._n_tokens] = wide_states
        first, last = start // self._page_tokens, -(-self._n_tokens // self._page_tokens)
        target = self._host_pages[first:last]
        if key_states.device.type == "cpu":
            _fill_pages(target, key_states, wide_states)
        else:
            # Pages are put together on the device so that the copy to the host is one contiguous transfer.
            staged = torch.zeros_like(target, device=key_states.device)
            _fill_pages(staged, key_states, wide_states)
            target.copy_(staged, non_blocking=True)
        return super().update(key_states, value_states)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self._refuse_window(call)
        assert self.buffer is not None
        k_BHTD, v_BHTD = self.buffer[:, :, :, : self._n_tokens]
        over_all = call.over(k_BHTD, v_BHTD)
        if self._listeners:
            with self._clock.running(call.query.device):
                for collector in self._listeners:
                    collector.attention(over_all, start_tokens=self._n_tokens - call.query.shape[2])
        if self.ends_prefill:
            raise _PrefillEnds
        return called_attention(over_all)[..., : call.value.shape[-1]]


def _fill_pages(pages: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor) -> None:
    """Write a chunk that begins on a page boundary into pages [page, H, 2, P, D]."""
    P = pages.shape[3]
    full, rest = divmod(k_BHSD.shape[2], P)
    for index, x_BHSD in enumerate((k_BHSD, v_BHSD)):
        x_HSD = x_BHSD[0]
        if full:
            pages[:full, :, index] = x_HSD[:, : full * P].reshape(-1, full, P, x_HSD.shape[-1]).transpose(0, 1)
        if rest:
            pages[full, :, index, :rest] = x_HSD[:, full * P :]
