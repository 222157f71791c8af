"""Another kind of cache in one file: K and V as two growing tensors a layer, read by the model's own attention.

Nothing in kvscope knows of it: a test gives it the line ``olmo = plain_backend:Plain`` in an entry point.

Shapes: N prompt tokens, B batch (1), H KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from kvscope.harness.engine.backend import Backend, NoForm, ReadyModel
from kvscope.harness.engine.glue import cache_argument, observing
from kvscope.methods.base import AttentionCall, SequenceCache
from kvscope.methods.dense.method import Dense
from kvscope.methods.recency.method import Recency
from kvscope.methods.shape import Footprint, ModelShape, tensor_bytes
from kvscope.methods.store import PromptKV

MODEL_TYPE = "olmo"
ATTENTION = "stock attention over plain tensors"


@dataclass(kw_only=True)
class PlainPrompt(PromptKV):
    """A prompt whose K and V are [B, H, N, D] a layer, in host memory."""

    kv: dict[int, tuple[torch.Tensor, torch.Tensor]]
    pages: dict[int, torch.Tensor] = field(default_factory=dict)


class PlainSequence(SequenceCache):
    """The kept tokens and the decoded ones in the stock cache."""

    def __init__(self, prompt: PlainPrompt, device: torch.device, *, keep_N: torch.Tensor) -> None:
        super().__init__(prompt, device)
        self._n_tokens = prompt.n_tokens
        self._cache = DynamicCache()
        for layer, (k_BHND, v_BHND) in prompt.kv.items():
            self._cache.update(k_BHND[:, :, keep_N].to(device), v_BHND[:, :, keep_N].to(device), layer)

    @property
    def n_tokens(self) -> int:
        return self._n_tokens

    @property
    def model_cache(self) -> DynamicCache:
        return self._cache

    def end_step(self) -> None:
        self._n_tokens += 1

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        raise ValueError("the model attends itself, over model_cache")

    def managed_footprint(self) -> Footprint:
        held_bytes = tensor_bytes(x for layer in self._cache.layers for x in (layer.keys, layer.values))
        return Footprint(kv_bytes=held_bytes, bytes_read_per_step=held_bytes)

    def close(self) -> None:
        self._cache.layers = []
        super().close()


class _Form:
    """A residency that is fixed at opening, over plain tensors."""

    def open(self, prompt: Any, device: Any, *, reserve_tokens: int = 0) -> PlainSequence:
        ranges = self.resident_ranges(prompt)  # type: ignore[attr-defined]
        keep_N = torch.tensor([token for start, end in ranges for token in range(start, end)], dtype=torch.long)
        return PlainSequence(prompt, torch.device(device), keep_N=keep_N)


class PlainDense(_Form, Dense):
    pass


class PlainRecency(_Form, Recency):
    pass


FORMS = {Dense: PlainDense, Recency: PlainRecency}


class Plain(Backend[ModelShape]):
    name = "plain"
    instead_of_tokens = "plain tensors"

    def shape(self, config, *, element_bytes, page_tokens=1, revision=""):
        return ModelShape(
            layers=tuple(range(config.num_hidden_layers)),
            n_layers=config.num_hidden_layers,
            n_q_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            hidden_size=config.hidden_size,
            element_bytes=element_bytes,
            page_tokens=1,
            revision=revision,
        )

    def prepare(self, model, shape):
        model.set_attn_implementation("sdpa")
        parameter = next(model.parameters())
        return ReadyModel(
            model=model,
            shape=shape,
            device=parameter.device,
            dtype=parameter.dtype,
            attention_backend=ATTENTION,
            rotations=dict.fromkeys(range(shape.n_layers)),
        )

    def prefill(self, ready, ids_N, *, listeners, chunk_tokens, seed, prompt_sha256):
        cache, last_hidden = DynamicCache(), {}
        with self.observe(ready.model, ready.shape.layers, last_hidden.__setitem__):
            for start in range(0, len(ids_N), chunk_tokens):
                part = ids_N[None, start : start + chunk_tokens].to(ready.device)
                ready.model(input_ids=part, use_cache=True, logits_to_keep=1, **{cache_argument(ready.model): cache})
        return PlainPrompt(
            shape=ready.shape,
            n_tokens=len(ids_N),
            dtype=ready.dtype,
            kv={index: (layer.keys.cpu(), layer.values.cpu()) for index, layer in enumerate(cache.layers)},
            last_hidden=last_hidden,
            seed=seed,
            prompt_sha256=prompt_sha256,
        )

    def form_of(self, method, shape):
        if isinstance(method, _Form | NoForm):
            return method
        if type(method) not in FORMS:
            return NoForm(method, f"{method.name} needs pages, and {self.name} has none")
        return FORMS[type(method)](method.config, label=method.label)

    def observe(self, model, layers, callback):
        return observing(model, layers, callback)

    def prefill_peak_bytes(self, shape, n_tokens, *, chunk_tokens, intermediate_size):
        return shape.dense_kv_bytes(n_tokens)

    def synthetic_gap(self, shape):
        return "plain tensors, which are"

    def note(self, shape, n_tokens):
        return f"plain tensors of {n_tokens} tokens."
