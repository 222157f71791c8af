"""Between transformers and kvscope: one registered attention function, and the cache layers it finds its way by.

transformers hands the attention function no cache. What ``Cache.update`` returns does reach it, so every cache layer
here marks the key tensor it returns with itself, and the attention function asks that layer to attend. The name is not
registered as a mask function, so transformers builds no mask: causality and windows are this module's duty.

Shapes: B batch, Q query heads, H KV heads, S new tokens, D head size, M hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

import torch

from kvscope.errors import KvscopeError
from kvscope.harness.engine.late_scipy import assignment_imported_late
from kvscope.harness.engine.listed_models import models_listed_once
from kvscope.harness.engine.prefill_attention import chunk_attention
from kvscope.methods.base import AttentionCall, Rotation

with models_listed_once(), assignment_imported_late():
    from transformers import AttentionInterface
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

ATTENTION_NAME = "kvscope"
_MARK = "kvscope_layer"
# Keyword arguments of tensor type that models pass along and that attention may ignore.
_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "input_ids", "inputs_embeds"}


def register_attention() -> None:
    """Make ``attn_implementation="kvscope"`` known to transformers. Safe to call again."""
    AttentionInterface.register(ATTENTION_NAME, kvscope_attention)


def kvscope_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function models call: q [B, Q, S, D], k and v of the new tokens [B, H, S, D] -> [B, S, Q, D].

    Raises:
        KvscopeError: the model passes something attention would have to honour and does not know: a mask, dropout, a
            bias, attention that is not causal.
    """
    unknown = [name for name, arg in kwargs.items() if isinstance(arg, torch.Tensor) and name not in _HARMLESS]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown or dropout or is_causal is False or getattr(module, "is_causal", True) is False:
        what = ", ".join(unknown) or ("dropout" if dropout else "attention that is not causal")
        raise KvscopeError(f"{type(module).__name__} asks for {what}, which kvscope's attention does not implement.")
    layer = getattr(key, _MARK, None)
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sink_logits=s_aux,
        rotation=None if layer is None else layer.rotation,
        module=module,
    )
    out = called_attention(call, window=call.window) if layer is None else layer.attend(call)
    return out.transpose(1, 2).contiguous(), None


def called_attention(call: AttentionCall, *, window: int | None = None) -> torch.Tensor:
    """Return ``chunk_attention`` of a call whose key and value are those of all tokens."""
    out = chunk_attention(
        call.query,
        call.key,
        widened(call.value, call.key.shape[-1]),
        scale=call.scale,
        window=window,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
    )
    return out[..., : call.value.shape[-1]]


def widened(value: torch.Tensor, width: int) -> torch.Tensor:
    """Return V padded with zeros to ``width``, that of K and of a page; where it has that width, V itself."""
    return value if value.shape[-1] == width else torch.nn.functional.pad(value, (0, width - value.shape[-1]))


class EngineLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """A full-attention cache layer that hands new K and V on and keeps nothing by itself.

    Attributes:
        rotation: of the layer's queries, for calls to carry; None where no method may ask for it.
        recorded_tokens: the length to answer while calls of a prefill are recorded and layers hold nothing yet.
    """

    rotation: Rotation | None = None
    recorded_tokens: int | None = None

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Only the tensor points to the layer; the other way round would be a cycle that delays freeing K and V.
        setattr(key_states, _MARK, self)
        return key_states, value_states

    @abstractmethod
    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attend the queries of one call, [B, Q, S, D]; K and V are the ones ``update`` returned."""

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def _refuse_window(self, call: AttentionCall) -> None:
        if call.window is not None:
            raise KvscopeError(
                f"Layer {self.index} attends within a window of {call.window} tokens although the model's config calls "
                "it a full-attention layer; this architecture is not supported."
            )


class StockLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]  # transformers is untyped
    """The model's own sliding-window layer: transformers' cache, kvscope's attention."""

    # transformers registers a subclass under this name for every model; this one is for kvscope's caches alone.
    _layer_type = None
    rotation: Rotation | None = None
    recorded_tokens: int | None = None

    def get_seq_length(self) -> int:
        held: int = super().get_seq_length()
        return held if self.recorded_tokens is None else self.recorded_tokens

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        setattr(keys, _MARK, self)
        return keys, values

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attend the queries of one call; K and V are the ones ``update`` returned."""
        return called_attention(call, window=self.sliding_window)


class EngineCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A transformers cache of the layers above."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)


def cache_argument(module: Any) -> str:
    """Return what the forward of a model, or of its decoder, calls its cache: ``cache`` from transformers 5.24 on.

    Older ones swallow a ``cache`` without a word and store nothing, so the name is read from the signature.

    Raises:
        KvscopeError: neither name is there; the message is a clause that ends a sentence.
    """
    return _cache_argument(type(module).forward)


@cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    parameters = signature(forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    raise KvscopeError(f"{forward.__qualname__} takes no cache.")


def decoder_of(model: Any) -> Any:
    """Return the module that holds embeddings and decoder layers."""
    found = model.get_decoder()
    # Some models call their output projection `decoder`.
    return found if _layers_name(found) else model.base_model


_LAYER_NAMES = ("layers", "h", "blocks")


def _layers_name(decoder: Any) -> str | None:
    return next((name for name in _LAYER_NAMES if isinstance(getattr(decoder, name, None), torch.nn.ModuleList)), None)


def layers_of(decoder: Any) -> Any:
    """Return the list of a decoder's layers; empty where it has none under a known name."""
    name = _layers_name(decoder)
    return () if name is None else getattr(decoder, name)


def set_layers(decoder: Any, layers: torch.nn.ModuleList) -> None:
    """Put another list in the place of a decoder's layers."""
    name = _layers_name(decoder)
    assert name is not None
    setattr(decoder, name, layers)


@contextmanager
def observing(model: Any, layers: tuple[int, ...], callback: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call ``callback(layer, hidden_BM)`` with the hidden state of the last position entering each of ``layers``.

    The hook sits on the decoder layer: a hook on its attention would see the normed input on some architectures and
    the raw residual on others.
    """
    modules = layers_of(decoder_of(model))
    with _hooked({layer: modules[layer] for layer in layers}, callback):
        yield


@contextmanager
def observing_attention(
    model: Any, layers: tuple[int, ...], callback: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """The same for the state entering each layer's attention, for DeepSeek-V4: collapsed and normed.

    Its decoder layers take several residual streams.
    """
    modules = layers_of(decoder_of(model))
    with _hooked({layer: modules[layer].self_attn for layer in layers}, callback):
        yield


@contextmanager
def _hooked(modules: dict[int, Any], callback: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    def hook_for(index: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_BSM = args[0] if args else kwargs["hidden_states"]
            callback(index, hidden_BSM[:, -1])

        return hook

    handles = [module.register_forward_pre_hook(hook_for(index), with_kwargs=True) for index, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
