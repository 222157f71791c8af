#!/usr/bin/env bash
# MiMo-V2-Flash's window layers have twice the KV heads that its configuration names.
#
# Versions: transformers 5.23.0, torch 2.13.0, Python 3.11, CPU.
# Seen: with num_key_value_heads=2 the key projection of a sliding-window layer gives 4 heads, of a full layer 2. No field
# of the configuration says so: the factor stands in the modelling code alone. Keys and values differ in width, too.
# Who is hit: whoever counts KV bytes from the configuration (window layers take twice as many as foretold).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.23.0" "numpy<3"
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
import torch
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

config = MiMoV2FlashConfig(
    vocab_size=128, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=2, head_dim=16, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
    sliding_window=16, layer_types=["full_attention", "sliding_attention"], mlp_layer_types=["dense", "dense"],
)
model = MiMoV2FlashForCausalLM(config).eval()
with torch.no_grad():
    cache = model(torch.arange(3, 15)[None], use_cache=True).past_key_values
heads = {}
for kind, layer in zip(config.layer_types, cache.layers, strict=True):
    heads[kind] = layer.keys.shape[1]
    print(f"{kind}: {heads[kind]} KV heads cached, K {layer.keys.shape[-1]} and V {layer.values.shape[-1]} wide; the configuration says {config.num_key_value_heads} heads")
assert heads == {"full_attention": 2, "sliding_attention": 4}, "the behaviour has changed"
assert not [name for name, value in config.to_dict().items() if value == 4 and "head" in name], "a field says so now"
PYTHON
