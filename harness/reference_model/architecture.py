"""The reference model's shape: AFMoE's pattern (local layers with RoPE, global ones without) as a dense 19.6 M model.

Chosen by trial (docs/log.md): RMS norm on queries and keys and a gate on attention's output learn the key match in a
quarter of the steps that plain attention needs.
"""

import math
from typing import Any

import torch
from transformers import AfmoeConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvscope.harness.reference_model import attention
from kvscope.harness.reference_model.backbone import Backbone
from kvscope.harness.reference_model.phases import PHASES
from kvscope.harness.reference_model.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_TOKENS

INIT_STD = 0.02
WINDOW_TOKENS = 128
# Two local layers give a token its neighbours before the first global layer looks for it; later ones alternate.
GLOBAL_LAYERS = (2, 5, 7, 9)


def reference_config(*, layers: int = 10, hidden: int = 384, max_tokens: int = 1 << 19) -> AfmoeConfig:
    """Return the configuration; 2,048 bytes of KV a token in bf16 (4 global layers x 2 x 2 heads x 64 x 2 bytes)."""
    is_global = [layer in GLOBAL_LAYERS or layer == layers - 1 for layer in range(layers)]
    return AfmoeConfig(
        vocab_size=VOCAB_TOKENS,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_dense_layers=layers,  # no layer has experts
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=max_tokens,
        layer_types=["full_attention" if there else "sliding_attention" for there in is_global],
        sliding_window=WINDOW_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=True,
        use_cache=True,
    )


def build_model(config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    """Return a freshly initialised fp32 model; residual projections start smaller (GPT-2, section 2.3)."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention.NAME, dtype=torch.float32
    )
    scale = INIT_STD / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, scale if name.endswith(("o_proj.weight", "down_proj.weight")) else INIT_STD)
    return model


class Afmoe(Backbone):
    """The reference model's architecture: each layer is compiled, one graph for each batch shape."""

    name = "afmoe"
    phases = PHASES
    stock_attention = "sdpa"

    def config(self) -> PreTrainedConfig:
        return reference_config()

    def build(self, config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
        return build_model(config, seed=seed)

    def compile(self, model: PreTrainedModel) -> None:
        torch._dynamo.config.cache_size_limit = 128
        for layer in model.model.layers:
            layer.compile(dynamic=False)

    def entering(self, base: Any, ids_BT: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        x_BTM: torch.Tensor = base.embed_tokens(ids_BT)
        rotary = base.rotary_emb(x_BTM, torch.arange(ids_BT.shape[1], device=ids_BT.device)[None])
        return x_BTM, {"attention_mask": None, "position_embeddings": rotary}
