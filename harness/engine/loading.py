"""Reads of a model's config and tokenizer, each error as one sentence. Nothing here runs a model's own code or asks.

``plan`` reads the same files by the same functions, so that it knows what a run would meet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import Handler, LogRecord
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from kvscope.errors import KvscopeError, UsageError, shown
from kvscope.harness.engine.configs import text_config
from kvscope.harness.engine.folder_files import check_small_files, check_tokenizer_files, json_object
from kvscope.harness.engine.names import cannot_load, resolve_model
from kvscope.harness.engine.oom import is_oom
from kvscope.harness.engine.presets import is_preset, preset_config

_SIZES = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "n_embd",
    "vocab_size",
    "max_position_embeddings",
    "n_positions",
)
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers")
_MOST_LAYERS = 10_000
_REASON_CHARACTERS = 300


@contextmanager
def held_back() -> Iterator[None]:
    """Hold transformers' warnings back, and drop them where an error ends the block: its sentence says it all.

    transformers prints a table of the tensors that a checkpoint lacks, and what it makes of quantised weights.
    """
    from transformers.utils import logging

    handlers = list(logging.get_logger().handlers)
    held: list[tuple[Handler, LogRecord]] = []

    def holder(handler: Handler) -> Callable[[LogRecord], bool]:
        def hold(record: LogRecord) -> bool:
            held.append((handler, record))
            return False

        return hold

    holders = [(handler, holder(handler)) for handler in handlers]
    for handler, hold in holders:
        handler.addFilter(hold)
    try:
        yield
    except BaseException:
        held.clear()
        raise
    finally:
        for handler, hold in holders:
            handler.removeFilter(hold)
        for handler, record in held:
            handler.handle(record)


@contextmanager
def explained(spec: str, what: str = "") -> Iterator[None]:
    """Turn whatever transformers raises over a model's files into one sentence; the end of memory passes.

    What it warns of on the way is printed where nothing is raised.

    Args:
        spec: the model as asked for.
        what: the part that is read, where it is not all of the model.

    Raises:
        UsageError: with transformers' first sentence.
    """
    try:
        with held_back():
            yield
    except KvscopeError:
        raise
    except Exception as error:
        if is_oom(error):
            raise
        reason = _reason(error)
        raise UsageError(_of_part(spec, what, reason) if what else cannot_load(spec, reason)) from error


def load_config(spec: str) -> Any:
    """Return the transformers config of a model without loading its weights.

    Raises:
        UsageError: as ``resolve_model``, transformers cannot read the config, its sizes are none, its base of RoPE is
            another than it says, or it is not of a causal language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    where, _ = resolve_model(spec)
    if is_preset(spec):
        return preset_config(spec)
    with explained(spec):
        written: dict[str, Any] = {}
        if Path(where).is_dir():
            written = json_object(Path(where) / "config.json")
            _check_sizes(written)
            check_small_files(Path(where))
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        _check_sizes(text_config(config).to_dict())
        _check_rope(written, text_config(config))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"Model '{spec}' cannot be run: a {config.model_type} is no causal language model.")
    return config


def load_tokenizer(spec: str, where: str, config: Any) -> Any:
    """Return the tokenizer of a model; None for a preset.

    Raises:
        UsageError: it cannot be read, gives ids the model has no embedding for, or ends a prompt with a token.
    """
    from transformers import AutoTokenizer

    if is_preset(spec):
        return None
    part = "tokenizer"
    with explained(spec, part):
        if Path(where).is_dir():
            check_tokenizer_files(Path(where))
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        plain, prompt = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        vocabulary = tokenizer.get_vocab()
        # Gemma 3's text models have an image token above their embedding: no text makes one, as it is special.
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} - set(prompt)
    vocab_size = int(text_config(config).vocab_size)
    above = sorted(set(vocabulary.values()) - special - set(range(vocab_size)))
    if above:
        reason = f"it has token ids up to {above[-1]:,}, and the model's vocab_size is {vocab_size:,} tokens"
        raise UsageError(_of_part(spec, part, reason))
    if prompt[-1:] != plain[-1:]:
        last = shown(tokenizer.convert_ids_to_tokens(prompt[-1]))
        reason = f"it ends every prompt with {last}, so that the model would not go on (add_eos_token?)"
        raise UsageError(_of_part(spec, part, reason))
    return tokenizer


def _check_sizes(values: Mapping[str, Any]) -> None:
    for name in ("text_config", "quantization_config"):
        if not isinstance(values.get(name) or {}, Mapping):
            raise ValueError(f"{name} in its config is no JSON object")
    for sizes in (values, values.get("text_config") or {}):
        counts = {name: value for name in _SIZES if isinstance(value := sizes.get(name), int)}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value} in its config, and must be 1 or more")
            if name in _LAYER_COUNTS and value > _MOST_LAYERS:
                raise ValueError(f"{name} is {value:,} in its config, and no model has over {_MOST_LAYERS:,}")
        heads, kv_heads = counts.get("num_attention_heads"), counts.get("num_key_value_heads")
        if heads and kv_heads and heads % kv_heads:
            raise ValueError(f"its config has {heads} attention heads, no multiple of its {kv_heads} KV heads")


def _check_rope(written: Mapping[str, Any], config: Any) -> None:
    """Refuse a file of transformers 5 to which ``rope_scaling`` was added: it takes the place of the base beside it.

    As model cards say how a context gets longer (YaRN), for files of transformers 4: their base stood by itself. See
    ``findings/rope_scaling_in_a_v5_config_resets_theta.sh``.
    """
    read = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    for values in (written, written.get("text_config") or {}):
        parameters, scaling = values.get("rope_parameters"), values.get("rope_scaling")
        said = parameters.get("rope_theta") if isinstance(parameters, Mapping) else None
        if scaling and None not in (read, said) and read != said:
            raise ValueError(
                f"rope_scaling in its config makes the base of RoPE {read:,.0f}, where rope_parameters say "
                f"{said:,.0f}: write what rope_scaling says into rope_parameters"
            )


def _of_part(spec: str, what: str, reason: str) -> str:
    return f"The {what} of model '{spec}' cannot be used: {reason.rstrip('.')}."


def _reason(error: Exception) -> str:
    """Return the first sentence of an error, and of the frequent ones what they mean."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it needs code of its own (auto_map), and kvscope runs no code that comes with a model"
    if isinstance(error, UnpicklingError):
        return "its pickled weights are damaged or hold more than tensors, which could run code: use safetensors"
    if text.startswith("Unrecognized model in"):
        return "its config.json has no model_type that transformers knows"
    if isinstance(error, KeyError):
        return f"it asks for {text}, which transformers does not know"
    if type(error).__name__.startswith("StrictDataclass"):
        text = text.rpartition("Error: ")[2]
    elif not isinstance(error, OSError | ValueError | ImportError):
        text = f"{type(error).__name__}: {text}"
    text = re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0] or type(error).__name__
    return text if len(text) <= _REASON_CHARACTERS else f"{text[:_REASON_CHARACTERS]}..."
