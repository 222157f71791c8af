"""The reference model's shape: SmolLM3's pattern (three RoPE layers, then one without) at 15 M parameters."""

import math

import torch
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from kvscope.harness.reference_model.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_TOKENS

INIT_STD = 0.02


def reference_config(*, layers: int = 8, hidden: int = 384, max_tokens: int = 65_536) -> SmolLM3Config:
    """Return the configuration; 4,096 bytes of KV a token in bf16 (8 layers x 2 x 2 heads x 64 x 2 bytes)."""
    return SmolLM3Config(
        vocab_size=VOCAB_TOKENS,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        max_position_embeddings=max_tokens,
        no_rope_layers=[1, 1, 1, 0] * (layers // 4),
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=True,
        use_cache=True,
    )


def build_model(config: SmolLM3Config, *, seed: int) -> SmolLM3ForCausalLM:
    """Return a freshly initialised fp32 model; residual projections start smaller (GPT-2, section 2.3)."""
    torch.manual_seed(seed)
    model = SmolLM3ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    scale = INIT_STD / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, scale if name.endswith(("o_proj.weight", "down_proj.weight")) else INIT_STD)
    return model
