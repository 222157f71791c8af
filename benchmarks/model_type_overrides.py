"""What the recipe of ``model_type_recipes.py`` does not get right by itself, by model type."""

from __future__ import annotations

from typing import Any

VOCABULARY = 320
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 64, 4, 2, 16, 96

_MIX = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DOTS3 = {
    "head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_GEMMA4 = {"global_head_dim": 32, "hidden_size_per_layer_input": 16}
_GEMMA4_UNIFIED = {"global_head_dim": 32}
_GEMMA4_ASSISTANT = {
    "layer_types": _MIX,
    "num_kv_shared_layers": 4,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "global_head_dim": 32,
}
_GEMMA3N = {
    "layer_types": _MIX,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "hidden_size_per_layer_input": 16,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [INTERMEDIATE] * 4,
}
# Keys with a dot belong to a config inside the config.
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": _MIX,
        "rope_parameters": {
            "sliding_attention": {**_ROPE, "mrope_section": [4, 2, 2]},
            "full_attention": {**_ROPE, "mrope_section": [4, 2, 2]},
        },
    },
    "dbrx": {
        "rope_parameters": _ROPE,
        "attn_config.kv_n_heads": 2,
        "attn_config.rope_theta": 1e4,
        "attn_config.clip_qkv": 8.0,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {
        **{f"text_config.{key}": value for key, value in _DOTS3.items()},
        "vision_config.adapter_in_dim": HIDDEN,
        "vision_config.adapter_out_dim": HIDDEN,
        "audio_config.adapter_input_size": HIDDEN,
        "audio_config.adapter_out_dim": HIDDEN,
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4": {f"text_config.{key}": value for key, value in _GEMMA4.items()},
    "gemma4_text": _GEMMA4,
    "gemma4_assistant": {f"text_config.{key}": value for key, value in _GEMMA4_ASSISTANT.items()},
    "gemma4_unified": {f"text_config.{key}": value for key, value in _GEMMA4_UNIFIED.items()},
    "gemma4_unified_assistant": {
        f"text_config.{key}": value for key, value in _GEMMA4_ASSISTANT.items() if "per_layer" not in key
    },
    "gemma4_unified_text": _GEMMA4_UNIFIED,
    "gemma3n": {f"text_config.{key}": value for key, value in _GEMMA3N.items()},
    "gemma3n_text": _GEMMA3N,
    "blt": {
        "global_config.hidden_size": HIDDEN,
        "encoder_config.hidden_size_global": HIDDEN,
        "decoder_config.hidden_size_global": HIDDEN,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "num_experts": 4, "moe_topk": 2},
    # Query heads, K and V heads and widths that differ by layer.
    "laguna": {"layer_types": _MIX, "num_attention_heads_per_layer": [4, 8, 4, 8]},
    "mimo_v2_flash": {
        "layer_types": _MIX,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "v_head_dim": 16,
    },
    "mellum": {"layer_types": _MIX},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": HEAD_DIM, "layer_types": _MIX},
    "mistral": {"sliding_window": None},
    "qwen4_exp": {f"text_config.{key}": value for key, value in _QWEN4.items()},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "attn_layers": ["local", "lsh"] * 2,
        "num_buckets": 4,
    },
    "zamba": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "xmod": {"default_language": "en_XX"},
}
