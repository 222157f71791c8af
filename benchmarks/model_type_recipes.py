"""Tiny random models of every causal-LM type of transformers: one recipe for all, and a table for the odd ones.

The recipe starts from the type's default config and shrinks what is a size. Layers are few, but one of each kind that
the default has (windows, states, experts) stays. Windows are shorter than the prompts of the check.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from model_type_overrides import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, OVERRIDES, VOCABULARY

WINDOW_TOKENS = 24
MAX_POSITIONS = 512
_MIN_LAYERS = 4

# Field -> its small value, wherever a config has the field and the default is a number.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "emb_dim",
            "embedding_size",
            "embedding_dim",
            "input_embedding_size",
            "output_embedding_size",
            "lru_width",
            "attention_hidden_size",
            "word_embed_proj_dim",
        ),
        HIDDEN,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "d_inner",
            "dff",
            "dim_ff",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "feed_forward_size",
            "n_inner",
        ),
        INTERMEDIATE,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "moe_shared_expert_intermediate_size",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "attention_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "swa_num_attention_heads",
            "num_global_attention_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("zero_expert_num", "num_zero_experts"), 2),
    **dict.fromkeys(
        (
            "sliding_window",
            "sliding_window_size",
            "window_size",
            "local_attention",
            "attention_window_size",
            "attention_chunk_size",
            "local_attention_window_len",
        ),
        WINDOW_TOKENS,
    ),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "model_max_length",
            "max_target_positions",
            "max_source_positions",
            "context_length",
            "max_seq_len",
        ),
        MAX_POSITIONS,
    ),
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "state_size": 16,
    "ssm_state_size": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "rotary_dim": 8,
    "encoder_hash_byte_group_vocab": 1000,
    "pronunciation_vocab_size": 64,
    "shape_vocab_size": 64,
    "pronunciation_embed_dim": 32,
    "shape_embed_dim": 32,
    "attention_head_size": 16,
}
# Fields whose value follows from others: left to the config.
_DERIVED = {"qk_head_dim", "time_step_rank", "mamba_dt_rank", "attention_layers", "attn_layers"}
_LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_blocks",
)
_META = {"architectures", "transformers_version", "model_type", "torch_dtype", "dtype", "id2label", "label2id"}


def tiny_config(model_type: str) -> Any:
    """Return the small config of a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    changes = OVERRIDES.get(model_type, {})
    return _shrunk(CONFIG_MAPPING[model_type], None, changes)


def _shrunk(cls: Any, default: Any, changes: dict[str, Any]) -> Any:
    default = _default(cls) if default is None else default
    declared = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in _META}
    # Not getattr: configs whose layers differ refuse to say what a layer's value is.
    aliases = getattr(cls, "attribute_map", {})
    values = {name: vars(default).get(aliases.get(name, name)) for name in declared}
    kept = _kept_layers(values)
    small: dict[str, Any] = {}
    for name, value in values.items():
        new = _small_value(name, value, declared[name], values, kept)
        if new is not _SAME:
            small[name] = new
    for name in getattr(cls, "sub_configs", {}):
        inner = getattr(default, name, None)
        if inner is not None:
            prefix = f"{name}."
            inner_changes = {key.removeprefix(prefix): v for key, v in changes.items() if key.startswith(prefix)}
            small[name] = _shrunk(type(inner), inner, inner_changes)
    small.update({key: value for key, value in changes.items() if "." not in key})
    return cls(**{key: value for key, value in small.items() if value is not _DROP})


_SAME = object()
_DROP = object()


def _small_value(name: str, value: Any, declared: Any, values: dict[str, Any], kept: list[int]) -> Any:
    if name in _DERIVED or isinstance(value, bool):
        return True if name == "is_decoder" else _SAME
    if name in _LAYER_COUNTS and isinstance(value, int):
        return len(kept)
    if name.endswith(("_token_id", "_token_ids", "_token_index")):
        return _small_token(name, value)
    if name == "head_dim":
        return _SAME if declared is None else HEAD_DIM
    if name in ("num_key_value_heads", "n_head_kv", "num_kv_heads"):
        if values.get("kv_lora_rank") or value == 1:
            return HEADS if value != 1 else 1
        return KV_HEADS
    if isinstance(value, list) and len(value) == _n_layers(values) and kept:
        chosen = [value[index] for index in kept]
        return [_SIZES[name]] * len(kept) if name in _SIZES and isinstance(value[0], int) else chosen
    if name in _SIZES and isinstance(value, int) and value > 0:
        return min(value, _SIZES[name])
    return _SAME


def _small_token(name: str, value: Any) -> Any:
    """Special tokens lie in the vocabulary, above the ids that prompts are made of."""
    if name == "eos_token_id":
        return None
    if name == "pad_token_id":
        return 0 if value is not None else _SAME
    return 256 + value % (VOCABULARY - 256) if isinstance(value, int) and value >= VOCABULARY else _SAME


def _n_layers(values: dict[str, Any]) -> int:
    return next((int(values[name]) for name in _LAYER_COUNTS if isinstance(values.get(name), int)), 0)


def _kept_layers(values: dict[str, Any]) -> list[int]:
    """One layer of every kind, then the last ones, in order: at least four."""
    n_layers = _n_layers(values)
    if not n_layers:
        return []
    per_layer = [
        value
        for value in values.values()
        if isinstance(value, list) and len(value) == n_layers and len({str(item) for item in value}) <= 4
    ]
    first: dict[tuple[str, ...], int] = {}
    for index in range(n_layers):
        first.setdefault(tuple(str(value[index]) for value in per_layer), index)
    kept = set(first.values())
    for index in reversed(range(n_layers)):
        if len(kept) >= _MIN_LAYERS:
            break
        kept.add(index)
    return sorted(kept)


def _default(cls: Any) -> Any:
    if cls.model_type != "gemma4_assistant":
        return cls()
    # Its own default config does not pass its own check.
    from transformers import Gemma4TextConfig

    text = Gemma4TextConfig(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=30)
    return cls(text_config=text)


# Initial weights are so small that attention hardly moves a logit.
_WEIGHT_GAIN, _EMBEDDING_GAIN = 8.0, 2.0
# AutoModelForCausalLM takes no config of these types: the class takes the config inside.
_INNER = {"musicgen": "decoder", "musicgen_melody": "decoder", "gemma3n": "text_config"}


def build_tiny(config: Any) -> Any:
    """Return a random model of a config, fp32, eager attention, every parameter off its initial value."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    torch.manual_seed(0)
    inner = _INNER.get(config.model_type)
    if inner is None:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    else:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type].replace("ForConditionalGeneration", "ForCausalLM")
        model = getattr(transformers, name)._from_config(getattr(config, inner), attn_implementation="eager")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2:
                parameter.mul_(_EMBEDDING_GAIN if id(parameter) in embeddings else _WEIGHT_GAIN)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.float().eval()
