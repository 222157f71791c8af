#!/usr/bin/env bash
# transformers' QuantizedCache keeps no full-precision residual behind a prompt, and an empty one time and again.
#
# Versions: transformers 5.24.0, optimum-quanto 0.2.7, torch 2.13.0, Python 3.11.
# KIVI keeps the newest tokens in full precision at all times. With residual_length=128 one expects the same here.
# Seen: after a prompt of 256 tokens all 256 are quantised and 0 are kept, so the first decoded token reads even its
# neighbours rounded. Tokens that are decoded then gather in full precision, up to 127; the 128th call quantises all of
# them at once, and the count is 0 again.
# Who is hit: comparisons with KIVI "at the same residual", and questions at the end of a prompt at 2 bits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.24.0" \
  "optimum-quanto==0.2.7" "numpy<3"
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
import torch
from transformers import LlamaConfig
from transformers.cache_utils import QuantizedCache

torch.manual_seed(0)
config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, hidden_size=128)
cache = QuantizedCache("quanto", config, nbits=2, residual_length=128)
layer = cache.layers[0]


def full_precision() -> int:
    return layer.keys.shape[-2] if layer.keys.dim() == 4 else 0


prompt = torch.randn(1, 2, 256, 64)
cache.update(prompt, prompt, 0)
kept = {0: full_precision()}
held = layer._dequantize(layer._quantized_keys)
off = float((held[:, :, -1] - prompt[:, :, -1]).norm() / prompt[:, :, -1].norm())
print(f"after the prompt: {held.shape[-2]} tokens quantised, {kept[0]} in full precision; the last token is off by {off:.0%}")
for step in range(1, 257):
    cache.update(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), 0)
    kept[step] = full_precision()
print("in full precision after so many decoded tokens:", {step: kept[step] for step in (1, 64, 127, 128, 129, 255, 256)})
assert held.shape[-2] == 256 and kept[0] == 0 and off > 0.2, "it has changed"
assert kept[127] == 127 and kept[128] == 0 and kept[256] == 0, "it has changed"
PYTHON
