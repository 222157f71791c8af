"""``preset:NAME``: published shapes with random weights, for bytes and times. There is nothing to download.

Shapes are those of the models' own configuration files. Two things differ: weights are random (a seed decides them),
and the longest context is lifted to ``PRESET_MAX_TOKENS``, since what a model was trained for bounds neither bytes nor
times. What such a model says means nothing, so no task is ever scored on one. No torch at import.
"""

from dataclasses import dataclass, field
from typing import Any

from kvscope.errors import UsageError, did_you_mean

PREFIX = "preset:"
PRESET_MAX_TOKENS = 4 * 1024 * 1024
WEIGHTS_SEED = 0
_LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


_CSA, _HCA = "compressed_sparse_attention", "heavily_compressed_attention"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One shape.

    Attributes:
        description: for ``kvscope list models``; empty for one that is there for tests alone.
        architecture: transformers' config class.
        values: its arguments.
        plan_only: whether its weights fit no machine kvscope knows, so that it is planned with and never built.
    """

    description: str
    architecture: str
    values: dict[str, Any] = field(default_factory=dict)
    plan_only: bool = False


PRESETS = {
    "llama-2-7b": Preset(
        description="32 layers, 32 KV heads x 128 (no GQA): 512 KiB of KV a token in bf16; random weights",
        architecture="LlamaConfig",
        values={
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "llama-3.1-8b": Preset(
        description="32 layers, 8 KV heads x 128: 128 KiB of KV a token in bf16; random weights",
        architecture="LlamaConfig",
        values={
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": _LLAMA_31_ROPE,
        },
    ),
    "qwen3-0.6b": Preset(
        description="28 layers, 8 KV heads x 128: 112 KiB of KV a token in bf16; random weights",
        architecture="Qwen3Config",
        values={
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
    "qwen3-8b": Preset(
        description="36 layers, 8 KV heads x 128: 144 KiB of KV a token in bf16; random weights",
        architecture="Qwen3Config",
        values={
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
    "deepseek-v4-flash": Preset(
        description="43 layers: 21 CSA (an entry of 4 tokens), 20 HCA (of 128), 2 windows; for plan alone",
        architecture="DeepseekV4Config",
        plan_only=True,
        values={
            "vocab_size": 129_280,
            "hidden_size": 4096,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 43,
            "num_attention_heads": 64,
            "num_key_value_heads": 1,
            "head_dim": 512,
            "q_lora_rank": 1024,
            "o_groups": 8,
            "o_lora_rank": 1024,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 6,
            "index_n_heads": 64,
            "index_head_dim": 128,
            "index_topk": 512,
            "sliding_window": 128,
            "hc_mult": 4,
            "compress_rates": {_CSA: 4, _HCA: 128},
            "layer_types": ["sliding_attention"] * 2 + [_CSA, _HCA] * 20 + [_CSA],
        },
    ),
    "tiny": Preset(
        description="",
        architecture="LlamaConfig",
        values={
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
    ),
}


def is_preset(spec: str) -> bool:
    """Whether a model is asked for as ``preset:NAME``."""
    return spec.startswith(PREFIX)


def preset_names() -> list[str]:
    """Return the presets users are told of."""
    return [f"{PREFIX}{name}" for name, preset in PRESETS.items() if preset.description]


def find_preset(spec: str) -> Preset:
    """Return the preset ``preset:NAME`` names.

    Raises:
        UsageError: there is none of that name.
    """
    name = spec.removeprefix(PREFIX)
    if name not in PRESETS:
        near = did_you_mean(spec, preset_names())
        raise UsageError(f"There is no model {spec!r}.{near}")
    return PRESETS[name]


def refuse_preset(spec: str, what: str) -> None:
    """Refuse a preset where a model's answers or attention are the point.

    Raises:
        UsageError: saying what the model was wanted for.
    """
    if is_preset(spec):
        raise UsageError(f"Model {spec!r} has random weights and no tokenizer, so there is nothing to {what}.")


def refuse_plan_only(spec: str) -> None:
    """Refuse to build a preset that is only planned with.

    Raises:
        UsageError: it is one, or there is no preset of that name.
    """
    if is_preset(spec) and find_preset(spec).plan_only:
        raise UsageError(f"Model {spec!r} has weights that fit no single machine: kvscope plan alone takes it.")


def preset_config(spec: str) -> Any:
    """Return the transformers config of a preset.

    Raises:
        UsageError: as ``find_preset``.
    """
    import transformers

    preset = find_preset(spec)
    return getattr(transformers, preset.architecture)(
        **preset.values, max_position_embeddings=PRESET_MAX_TOKENS, bos_token_id=None, eos_token_id=None
    )


def preset_revision() -> str:
    """Return what rows say of the weights."""
    return f"random weights, seed {WEIGHTS_SEED}"


def build_preset(spec: str, *, device: Any, dtype: Any) -> Any:
    """Return the transformers model, its weights drawn directly on ``device`` in ``dtype``.

    Raises:
        UsageError: as ``find_preset``, or it is only planned with.
    """
    import torch
    from transformers import AutoModelForCausalLM

    refuse_plan_only(spec)
    config = preset_config(spec)
    torch.manual_seed(WEIGHTS_SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
