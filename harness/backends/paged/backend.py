"""The backend of pages: the engine's layer-major prefill, its attention, and every method as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from kvscope.harness.backends.paged.shape import paged_shape
from kvscope.harness.engine.backend import Backend, ReadyModel
from kvscope.harness.engine.device_map import found_devices
from kvscope.harness.engine.glue import ATTENTION_NAME, observing, register_attention
from kvscope.harness.engine.layer_major import layer_major_prefill
from kvscope.harness.engine.rotation import UnknownRotation, probe_rotations, try_attention
from kvscope.methods.base import CacheMethod, Collector
from kvscope.methods.kernels.dispatch import decode_backend
from kvscope.methods.shape import DEFAULT_PAGE_TOKENS, ModelShape
from kvscope.methods.store import PromptKV


class Paged(Backend[ModelShape]):
    """K and V of single tokens in pages; sliding-window layers keep their stock cache."""

    name = "paged"
    packs_pages = True
    spans_devices = True

    def shape(
        self, config: Any, *, element_bytes: int, page_tokens: int = DEFAULT_PAGE_TOKENS, revision: str = ""
    ) -> ModelShape:
        return paged_shape(config, element_bytes=element_bytes, page_tokens=page_tokens, revision=revision)

    def attention_text(self, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> str:
        """Name what computes attention: the prefill is torch's, decode over pages a kernel's or torch's, and why."""
        found = decode_backend(
            device, dtype=dtype, head_dim=shape.head_dim, n_q_heads=shape.n_q_heads, n_kv_heads=shape.n_kv_heads
        )
        prefill = f"torch {torch.__version__}: fused prefill"
        padded = f"; {_padding(shape)}" if shape.v_head_dim else ""
        if found.name == "torch":
            return f"{prefill}, paged decode in torch operations ({'; '.join(found.reasons)}){padded}"
        return f"{prefill}; {found.name} {found.version}: paged_decode{padded}"

    def try_code(self, model: Any, shape: ModelShape) -> None:
        """Refuse layers that attend by themselves, twice or with a mask, or keep other K and V than the config says."""
        register_attention()
        model.set_attn_implementation(ATTENTION_NAME)
        try_attention(model, shape)

    def prepare(self, model: Any, shape: ModelShape) -> ReadyModel:
        """Switch the attention to kvscope's and measure how each layer encodes positions."""
        register_attention()
        model.set_attn_implementation(ATTENTION_NAME)
        rotations = probe_rotations(model, shape)
        unknown = tuple(layer for layer in shape.layers if isinstance(rotations[layer], UnknownRotation))
        parameter = next(model.parameters())
        return ReadyModel(
            model=model,
            shape=dataclasses.replace(shape, unknown_rotation_layers=unknown, devices=found_devices(model)),
            device=parameter.device,
            dtype=parameter.dtype,
            attention_backend=self.attention_text(shape, parameter.device, parameter.dtype),
            rotations=rotations,
        )

    def prefill(
        self,
        ready: ReadyModel,
        ids_N: torch.Tensor,
        *,
        listeners: Mapping[int, Sequence[Collector]],
        chunk_tokens: int,
        seed: int,
        prompt_sha256: str,
    ) -> PromptKV:
        return layer_major_prefill(
            ready, ids_N, listeners=listeners, chunk_tokens=chunk_tokens, seed=seed, prompt_sha256=prompt_sha256
        )

    def form_of(self, method: CacheMethod[Any], shape: ModelShape) -> CacheMethod[Any]:
        return method

    def observe(
        self, model: Any, layers: tuple[int, ...], callback: Callable[[int, torch.Tensor], None]
    ) -> AbstractContextManager[None]:
        return observing(model, layers, callback)

    def synthetic_gap(self, shape: ModelShape) -> str | None:
        return "sliding-window layers, whose stock cache is" if shape.sliding_layers else None

    def note(self, shape: ModelShape, n_tokens: int) -> str | None:
        """Say where a page is wider than what the model stores."""
        del n_tokens
        return f"{_padding(shape)}." if shape.v_head_dim else None

    def prefill_peak_bytes(self, shape: ModelShape, n_tokens: int, *, chunk_tokens: int, intermediate_size: int) -> int:
        """Estimate the peak of a layer-major prefill.

        Hidden states of all tokens, the KV of one layer, and one chunk's activations (MLP gate, up and product;
        queries, keys, values and output).
        """
        hidden_bytes = n_tokens * shape.hidden_size * shape.element_bytes
        layer_kv_bytes = shape.dense_kv_bytes(n_tokens) // max(1, len(shape.layers))
        chunk = min(chunk_tokens, n_tokens)
        activation_bytes = chunk * (3 * intermediate_size + 6 * shape.hidden_size) * shape.element_bytes
        return hidden_bytes + layer_kv_bytes + activation_bytes


def _padding(shape: ModelShape) -> str:
    """Say what padding V costs, as a clause."""
    return (
        f"V is padded from {shape.v_head_dim} to K's {shape.head_dim} elements a head: every method holds "
        f"{shape.padded_share:.3g} times the bytes of transformers' own cache in the layers it manages"
    )
