#!/usr/bin/env bash
# ModernBertDecoderForCausalLM.get_decoder() returns its output projection, where every other model returns its backbone.
#
# Versions: transformers 5.24.0 (5.23.0 does the same), torch 2.13.0, Python 3.11.
# get_decoder() is how generic code reaches the layers without the language-model head: hidden states for a reward model,
# a loss in chunks over a large vocabulary, hooks on layers, caches.
# Seen: on ModernBertDecoder it is a torch.nn.Linear from hidden size to vocabulary, since the attribute `decoder` is the
# name of its head. On a Llama it is the LlamaModel. base_model is the backbone in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.24.0" "numpy<3"
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
from transformers import AutoModelForCausalLM, LlamaConfig, ModernBertDecoderConfig

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
seen = {}
for config in (LlamaConfig(**sizes, **ids), ModernBertDecoderConfig(**sizes, **ids, cls_token_id=1, sep_token_id=2)):
    model = AutoModelForCausalLM.from_config(config)
    decoder = model.get_decoder()
    seen[type(model).__name__] = (type(decoder).__name__, type(model.base_model).__name__)
    print(f"{type(model).__name__}: get_decoder() is a {type(decoder).__name__}, base_model a {seen[type(model).__name__][1]}")
assert seen == {
    "LlamaForCausalLM": ("LlamaModel", "LlamaModel"),
    "ModernBertDecoderForCausalLM": ("Linear", "ModernBertDecoderModel"),
}, "it has changed"
PYTHON
