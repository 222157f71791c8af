"""Tiny random models of every architecture the engine is tested on, and prompts for them.

Weights are scaled up and attention sinks made random, so that no test passes because a contribution is near zero.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from kvscope.harness.engine.glue import cache_argument
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import wrap_model

VOCABULARY = 257
PAGE_TOKENS = 16

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 128,
}
_SLIDING_MIX = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32, "layer_types": _SLIDING_MIX},
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 1, 0]}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 32,
            "sliding_window": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": _YARN_ROPE,
        },
    ),
    # The reference model's shape: RoPE in the sliding layers only, a gate on attention's output, no experts.
    "afmoe": (
        "AfmoeConfig",
        {
            "head_dim": 32,
            "sliding_window": 24,
            "num_dense_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
        },
    ),
    # Beyond the required ten: soft-capped logits, interleaved and partial rotation.
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32}),
    "cohere2": ("Cohere2Config", {"sliding_window": 24}),
    "glm4": ("Glm4Config", {"head_dim": 32}),
    # Refused: no layer keeps more than its window.
    "mistral_sliding": ("MistralConfig", {"sliding_window": 24}),
}
ARCHITECTURES = [name for name in _CONFIGS if name != "mistral_sliding"]


def tiny_config(name: str, **changes: Any) -> Any:
    """Return the config of a tiny model."""
    cls, extra = _CONFIGS[name]
    return getattr(transformers, cls)(**{**_BASE, **extra, **changes})


def build_stock(name: str, **changes: Any) -> Any:
    """Return a tiny random transformers model with eager attention, fp32."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(name, **changes), attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("sinks"):
                parameter.normal_()
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    return model.float().eval()


@cache
def stock_model(name: str) -> Any:
    """Return the shared stock model of an architecture: read it, do not change it."""
    return build_stock(name)


@cache
def loaded_model(name: str) -> LoadedModel:
    """Return the same weights with kvscope's attention, pages of 16 tokens."""
    return wrap_model(copy.deepcopy(stock_model(name)), None, name=name, page_tokens=PAGE_TOKENS)


def cache_kwarg(model: Any, cache: Any) -> dict[str, Any]:
    """The cache for a stock call of a model, under the name that this transformers gives it."""
    return {cache_argument(model): cache}


def prompt_ids(n_tokens: int, *, seed: int = 1) -> list[int]:
    """Return random token ids."""
    ids: list[int] = torch.randint(3, VOCABULARY, (n_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def save_tiny(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """Write a tiny model with a byte-level tokenizer as a folder ``load_model`` takes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    build_stock(name, **changes).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<eos>"])
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def save_model(folder: Path, family: str, **changes: Any) -> str:
    """Save a tiny random model of a family, with the reference model's tokenizer."""
    from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    torch.manual_seed(0)
    config = tiny_config(family, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)  # or answers hardly depend on the prompt
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def runnable_methods() -> list[str]:
    """Return every registered method in a form that runs on a model of random weights, without trained parts."""
    from kvscope.methods.registry import method_names

    untrained = {"lsa": "lsa:budget_fraction=0.5,chunk_tokens=16,indexer=attention", "dsa": "dsa:selection=synthetic"}
    return [untrained.get(name, name) for name in method_names()]
