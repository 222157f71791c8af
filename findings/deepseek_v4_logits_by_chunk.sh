#!/usr/bin/env bash
# DeepSeek-V4's logits depend on how a prompt is cut into chunks, where the indexer has few heads.
#
# Versions: transformers 5.23.0, torch 2.13.0, Python 3.11, CPU, fp32.
# A prompt of 403 tokens goes through a tiny random DeepSeek-V4 whole, and in chunks of 100 with the model's own cache.
# Seen: with 4 indexer heads 195 positions differ, by up to 17 % of the largest logit; with 64 heads by 1e-6.
# Why: a score is a sum of ReLUs over the heads. With few heads many entries score exactly 0, the k best are then
# chosen among ties, and torch.topk breaks ties by the width of its input, which chunks change.
# Who is hit: equality tests of chunked prefill on small configurations, and anybody who shrinks index_n_heads.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.23.0" "numpy<3"
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
import torch
from transformers import AutoModelForCausalLM, DeepseekV4Config

torch.set_num_threads(1)


def tiny(heads):
    torch.manual_seed(0)
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"] * 2
    config = DeepseekV4Config(
        vocab_size=512, hidden_size=64, moe_intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, q_lora_rank=32, n_routed_experts=4, num_experts_per_tok=2, o_groups=2,
        o_lora_rank=16, index_n_heads=heads, index_head_dim=16, index_topk=24, sliding_window=32, hc_mult=2,
        partial_rotary_factor=0.5, max_position_embeddings=4096, layer_types=kinds, mlp_layer_types=["moe"] * 6,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 32},
        bos_token_id=1, eos_token_id=None, pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # larger weights, so that logits depend on the context
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
            if name.endswith(("sinks", "position_bias")):
                parameter.normal_()
    return model


ids = torch.randint(2, 500, (1, 403), generator=torch.Generator().manual_seed(1))
gaps = {}
for heads in (4, 64):
    model, cache, parts = tiny(heads), None, []
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits[0]
        for start in range(0, 403, 100):
            out = model(ids[:, start : start + 100], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits[0])
    gap = (torch.cat(parts) - whole).abs().amax(-1) / whole.abs().max()
    gaps[heads] = float(gap.max())
    print(f"{heads} indexer heads: largest gap {gaps[heads]:.2g} of the largest logit, {int((gap > 1e-3).sum())} of 403 positions")
assert gaps[4] > 1e-2 and gaps[64] < 1e-4, "the behaviour has changed"
PYTHON
