#!/usr/bin/env bash
# The DeepSeek-V4 of transformers builds one shared expert, whatever n_shared_experts says.
#
# Versions: transformers 5.24.0, torch 2.13.0, Python 3.11.
# The configuration keeps n_shared_experts, and DeepSeek-V3's classes size the shared MLP by it. V4's do not read it.
# Seen: with 0, 1 and 3 the model has the same parameters, and 0 still has a shared expert. V3 with 1 and 3 differs.
# Who is hit: counts of parameters, bytes and FLOPs that go by the configuration, and scaled-down copies of the architecture.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.24.0" "numpy<3"
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV4Config

sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "moe_intermediate_size": 16}
experts = {"n_routed_experts": 4, "num_experts_per_tok": 2}
v3 = {"num_key_value_heads": 2, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "intermediate_size": 32}


def shared_weights(config):
    model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "shared_expert" in name)


seen = {
    "V4": [shared_weights(DeepseekV4Config(**sizes, **experts, head_dim=32, n_shared_experts=n)) for n in (0, 1, 3)],
    "V3": [shared_weights(DeepseekV3Config(**sizes, **experts, **v3, n_shared_experts=n)) for n in (1, 3)],
}
for name, counts in seen.items():
    print(f"{name}: weights of shared experts {counts}")
assert len(set(seen["V4"])) == 1 and seen["V4"][0] > 0, "it has changed"
assert seen["V3"][1] == 3 * seen["V3"][0], "it has changed"
PYTHON
