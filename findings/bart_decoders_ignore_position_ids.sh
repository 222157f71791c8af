#!/usr/bin/env bash
# Decoders of the BART family take position_ids and ignore them without a word.
#
# Versions: transformers 5.23.0, torch 2.13.0, Python 3.11, CPU.
# The same ten tokens go through BartForCausalLM and LlamaForCausalLM, once plain and once at other positions, reversed.
# Seen: Llama's logits change by more than 1, BART's by exactly 0. The forward has **kwargs, so the argument is
# accepted; positions come from the length that the cache tells, also before anything is stored in it.
# Who is hit: whoever prefills in pieces or replays tokens with explicit positions and a cache object of their own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.23.0" "numpy<3"
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
import torch
from transformers import BartConfig, BartForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
torch.set_num_threads(1)
bart = BartForCausalLM(
    BartConfig(
        vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64,
        max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False,
    )
).eval()
llama = LlamaForCausalLM(
    LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
).eval()
ids, elsewhere = torch.arange(3, 13)[None], torch.arange(29, 19, -1)[None]
found = {}
for name, model in (("BART", bart), ("Llama", llama)):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(8.0)
        plain = model(ids, use_cache=False).logits
        moved = model(ids, position_ids=elsewhere, use_cache=False).logits
    found[name] = float((plain - moved).abs().max())
    print(f"{name}: logits move by {found[name]:.3g} at positions 29..20 instead of 0..9")
assert found["BART"] == 0.0 and found["Llama"] > 0.1, "the behaviour has changed"
PYTHON
