"""What the engine reads from a transformers config itself. Loads no weights; the shape is the backend's to read."""

from __future__ import annotations

from typing import Any

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_LENGTH_NAMES = ("max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len")


def text_config(config: Any) -> Any:
    """Return the config of the language model inside a (possibly multimodal) config."""
    return config.get_text_config(decoder=True)


def layer_kinds(config: Any) -> list[str]:
    """Return the cache layer type of every decoder layer, as transformers names them."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds: list[str] = list(get_layer_types_and_kwargs(text_config(config))[0])
    return kinds


def max_length_tokens(config: Any) -> int:
    """Return the longest prompt plus answer the model takes.

    A rotary scheme that changes its frequencies past the original length would rotate early and late chunks of one
    prompt differently, so such a model is held to that original length.
    """
    text = text_config(config)
    longest = next(int(value) for name in _LENGTH_NAMES if (value := getattr(text, name, None)))
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for parameters in nested:
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            original = parameters.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            longest = min(longest, int(original or longest))
    return longest
