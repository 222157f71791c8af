"""From a transformers config to the ModelShape the methods count with. Loads no weights."""

from __future__ import annotations

from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.backends.deepseek_v4.shape import MODEL_TYPE, compressed_model_shape
from kvscope.methods.shape import DEFAULT_PAGE_TOKENS, ModelShape

# Their attention layers select inside the layer or carry causality beside the mask, so that K and V handed to a cache
# are not what attention reads. They need a backend of their own, as deepseek_v4 has one.
_OWN_BACKEND = {
    "deepseek_v32": "it selects tokens with an indexer of its own",
    "glm_moe_dsa": "it selects tokens with an indexer of its own",
    "minimax_m3": "it selects blocks with an indexer of its own",
    "minimax_m3_vl": "it selects blocks with an indexer of its own",
}
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def text_config(config: Any) -> Any:
    """Return the config of the language model inside a (possibly multimodal) config."""
    return config.get_text_config(decoder=True)


def layer_kinds(config: Any) -> list[str]:
    """Return the cache layer type of every decoder layer, as transformers names them."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds: list[str] = list(get_layer_types_and_kwargs(text_config(config))[0])
    return kinds


def unsupported_reasons(config: Any) -> list[str]:
    """Return every reason why a model of this config cannot be run; empty when it can."""
    text = text_config(config)
    reasons: list[str] = []
    model_types = {getattr(config, "model_type", ""), getattr(text, "model_type", "")}
    for model_type in sorted(model_types & set(_OWN_BACKEND)):
        reasons.append(f"architecture {model_type} needs a backend of its own: {_OWN_BACKEND[model_type]}")
    if reasons:
        return reasons
    if getattr(config, "is_encoder_decoder", False):
        return ["it is an encoder-decoder; only decoder-only causal language models have the cache measured here"]
    if getattr(text, "kv_lora_rank", None):
        reasons.append("multi-head latent attention caches a compressed latent, not K and V")
    if getattr(text, "num_kv_shared_layers", None):
        reasons.append("some of its layers read another layer's KV, so its layers cannot be prefilled one at a time")
    kinds = set(layer_kinds(config)) - {"full_attention", "sliding_attention"}
    if kinds:
        reasons.append(f"its layers of type {', '.join(sorted(kinds))} keep a state that is not a KV cache of K and V")
    elif "full_attention" not in layer_kinds(config):
        reasons.append("every layer is a sliding-window layer, so no layer has a cache that grows with the length")
    return reasons


def model_shape(
    config: Any, *, element_bytes: int, page_tokens: int = DEFAULT_PAGE_TOKENS, revision: str = ""
) -> ModelShape:
    """Return the shape of a model from its config alone.

    Args:
        config: a transformers config.
        element_bytes: bytes of one KV element (4 for fp32, 2 for bf16).
        page_tokens: tokens of one page; a deepseek_v4 model's page is one compressed entry, whatever is asked for.
        revision: identity of the weights.

    Raises:
        UsageError: the architecture is not supported; the message gives every reason.
    """
    if getattr(config, "model_type", "") == MODEL_TYPE:
        return compressed_model_shape(config, element_bytes=element_bytes, revision=revision)
    reasons = unsupported_reasons(config)
    if reasons:
        name = getattr(config, "name_or_path", "") or getattr(config, "model_type", "model")
        raise UsageError(f"Model '{name}' cannot be run: {'; '.join(reasons)}.")
    if page_tokens < 1:
        raise UsageError(f"page_tokens must be 1 or more, got {page_tokens}.")
    text = text_config(config)
    kinds = layer_kinds(config)
    n_q_heads = int(text.num_attention_heads)
    sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return ModelShape(
        layers=tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
        n_layers=len(kinds),
        n_q_heads=n_q_heads,
        n_kv_heads=int(getattr(text, "num_key_value_heads", None) or n_q_heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // n_q_heads),
        hidden_size=int(text.hidden_size),
        element_bytes=element_bytes,
        page_tokens=page_tokens,
        sliding_layers=sliding,
        sliding_window=int(text.sliding_window) if sliding else 0,
        revision=revision,
    )


def max_length_tokens(config: Any) -> int:
    """Return the longest prompt plus answer the model takes.

    A rotary scheme that changes its frequencies past the original length would rotate early and late chunks of one
    prompt differently, so such a model is held to that original length.
    """
    text = text_config(config)
    longest = int(text.max_position_embeddings)
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for parameters in nested:
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            original = parameters.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            longest = min(longest, int(original or longest))
    return longest
