"""From a transformers config to the ModelShape of a cache of K and V, or every reason why there is none."""

from __future__ import annotations

import sys
from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.engine.configs import layer_kinds, text_config
from kvscope.methods.shape import ModelShape

# Their attention layers select inside the layer or carry causality beside the mask, so that K and V handed to a cache
# are not what attention reads. A line in the table of backends takes a model type out of here.
_NEED_THEIR_OWN = {
    "deepseek_v32": "it selects tokens with an indexer of its own",
    "glm_moe_dsa": "it selects tokens with an indexer of its own",
    "minimax_m3": "it selects blocks with an indexer of its own",
    "minimax_m3_vl": "it selects blocks with an indexer of its own",
}
# Their modelling code calls attention by name, but hands it other K and V than the cache returned. A router in their
# attention keeps a model without weights from showing it.
_REPEAT_BEHIND_THE_CACHE = {"jetmoe"}


def unsupported_reasons(config: Any) -> list[str]:
    """Return every reason why a model of this config cannot be run; empty when it can."""
    text = text_config(config)
    reasons: list[str] = []
    model_types = {getattr(config, "model_type", ""), getattr(text, "model_type", "")}
    for model_type in sorted(model_types & set(_NEED_THEIR_OWN)):
        reasons.append(f"architecture {model_type} needs a backend of its own: {_NEED_THEIR_OWN[model_type]}")
    if reasons:
        return reasons
    if getattr(config, "is_encoder_decoder", False):
        return ["it is an encoder-decoder; only decoder-only causal language models have the cache measured here"]
    if getattr(text, "kv_lora_rank", None):
        reasons.append("multi-head latent attention caches a compressed latent, not K and V")
    if getattr(text, "num_kv_shared_layers", None):
        # At once: transformers 5.23 fails to name the layers of such a config (Gemma 4's assistants).
        return [*reasons, "some of its layers read another layer's KV, so its layers cannot be prefilled one at a time"]
    if not all(getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads")):
        return ["its config names no attention heads: it keeps no KV cache of K and V"]
    if getattr(text, "H_cycles", None):
        return ["its layers run several times a token, so they cannot be prefilled one at a time"]
    if getattr(text, "cross_attention_layers", None):
        return ["some of its layers attend to images, not to the text before"]
    if model_types & _REPEAT_BEHIND_THE_CACHE or not _has_interface(config, text):
        return ["its attention does not go through transformers' attention interface"]
    kinds = set(layer_kinds(config)) - {"full_attention", "sliding_attention"}
    if "chunked_attention" in kinds:
        reasons.append("its chunked_attention layers see their own chunk of the text only")
    elif kinds:
        reasons.append(f"its layers of type {', '.join(sorted(kinds))} keep a state that is not a KV cache of K and V")
    elif "full_attention" not in layer_kinds(config):
        reasons.append("every layer is a sliding-window layer, so no layer has a cache that grows with the length")
    return reasons


def _has_interface(config: Any, text: Any) -> bool:
    """Whether the modelling code of this config calls its attention by name. Loads no weights."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(part.model_type) for part in (config, text)} - {None}
    modules = [sys.modules[getattr(transformers, name).__module__] for name in names]
    return not modules or any(hasattr(module, "ALL_ATTENTION_FUNCTIONS") for module in modules)


def paged_shape(config: Any, *, element_bytes: int, page_tokens: int, revision: str) -> ModelShape:
    """Return the shape of a model from its config alone; arguments and errors as ``Backend.shape``."""
    reasons = unsupported_reasons(config)
    if reasons:
        name = getattr(config, "name_or_path", "") or getattr(config, "model_type", "model")
        raise UsageError(f"Model '{name}' cannot be run: {'; '.join(reasons)}.")
    if page_tokens < 1:
        raise UsageError(f"page_tokens must be 1 or more, got {page_tokens}.")
    text = text_config(config)
    kinds = layer_kinds(config)
    managed = {_layer_heads(text, i) for i, kind in enumerate(kinds) if kind == "full_attention"}
    windows = {_layer_heads(text, i) for i, kind in enumerate(kinds) if kind == "sliding_attention"} or managed
    if len(managed) > 1 or len(windows) > 1:
        raise UsageError(f"Model '{config.model_type}' cannot be run: its layers of one kind differ in heads or width.")
    n_q_heads, n_kv_heads, k_width, v_width = next(iter(managed))
    sliding_n_q_heads, sliding_n_kv_heads, *sliding_widths = next(iter(windows))
    sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return ModelShape(
        layers=tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
        n_layers=len(kinds),
        n_q_heads=n_q_heads,
        n_kv_heads=n_kv_heads,
        head_dim=max(k_width, v_width),
        hidden_size=int(text.hidden_size),
        element_bytes=element_bytes,
        page_tokens=page_tokens,
        sliding_layers=sliding,
        sliding_window=int(text.sliding_window) if sliding else 0,
        v_head_dim=v_width if v_width < k_width else 0,
        sliding_n_q_heads=sliding_n_q_heads if sliding else 0,
        sliding_n_kv_heads=sliding_n_kv_heads if sliding else 0,
        sliding_kv_width=sum(sliding_widths) if sliding else 0,
        revision=revision,
    )


def _layer_heads(text: Any, layer: int) -> tuple[int, int, int, int]:
    """Return query heads, KV heads, K width and V width of one layer."""
    config = text.per_layer_config[layer] if hasattr(type(text), "per_layer_config") else text
    n_q_heads = int(config.num_attention_heads)
    n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_q_heads)
    if text.model_type == "mimo_v2_flash" and text.layer_types[layer] == "sliding_attention":
        n_kv_heads *= 2  # its modelling code says so, its config does not
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // n_q_heads)
    by_layer = getattr(text, "num_attention_heads_per_layer", None)
    if by_layer:
        n_q_heads = int(by_layer[layer])
    return n_q_heads, n_kv_heads, head_dim, int(getattr(config, "v_head_dim", None) or head_dim)
