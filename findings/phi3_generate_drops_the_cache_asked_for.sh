#!/usr/bin/env bash
# Phi-3's generate drops the cache that it was asked for, quantised or static, where a prompt is longer than 4096 tokens.
#
# Versions: transformers 5.24.0 (4.57.6 does the same), torch 2.13.0, Python 3.11, CPU. Phi-3.5 and Phi-4-mini are this class.
# Its RoPE has other factors above 4096 positions, so that a cache filled below them is stale, and generate starts anew as it
# gets there. It does so by leaving the cache out of the call, and the model makes a DynamicCache. A prompt longer than that
# counts as getting there too, with the empty cache that was made for it.
# Seen: a random Phi-3, greedy. With cache_implementation="quantized" (fp8) a prompt of 4000 tokens ends in a QuantizedCache,
# and scores are off from full precision by 2.4 %; one of 4200 tokens ends in a DynamicCache, off by exactly 0. "static" and
# "offloaded" end there, too. A QuantizedCache that one passes stays empty, and is left at 4096 where 4090 tokens are continued
# by 20. (An empty DynamicCache() that has no layers yet is kept.) Phi-3 without "longrope" does the same, Llama does not. No
# warning. With prefill_chunk_size=1000 the cache is kept, and its first chunks are rotated by the short factors: in full
# precision the first scores are then off by 99 % of their norm.
# Who is hit: quantised against full-precision KV of Phi-3.5 or Phi-4-mini by length of prompt. Above 4096 it costs no score,
# and saves no byte. So are caches of one's own (counts, evictions, static memory) that are passed to generate.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.24.0" "numpy<3"
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
import logging
import warnings

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Phi3Config, QuantizedCache

torch.set_num_threads(1)
said = []
warnings.showwarning = lambda message, *_, **__: said.append(str(message))
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
transformers.utils.logging.add_handler(handler)

sizes = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}
longrope = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 8, "long_factor": [1.0 + 4 * i for i in range(8)],
}
tokens = torch.randint(3, 100, (1, 4200), generator=torch.Generator().manual_seed(1))
fp8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}


def built(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # larger weights, so that scores depend on what is attended to
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def run(model, n, new=2, **how):
    out = model.generate(
        tokens[:, :n], max_new_tokens=new, do_sample=False, disable_compile=True, return_dict_in_generate=True,
        output_logits=True, **how,
    )
    return type(out.cache).__name__, out.logits[-1][0]


def off(scores, right):
    return float((scores - right).norm() / right.norm())


phi = built(Phi3Config(**sizes, rope_parameters=longrope))
said.clear()
losses, kinds, plain = {}, {}, {}
for n in (4000, 4200):
    plain[n] = run(phi, n)[1]
    kinds[n], scores = run(phi, n, **fp8)
    losses[n] = off(scores, plain[n])
    other = [run(phi, n, cache_implementation=name)[0] for name in ["static"] + ["offloaded"] * (n > 4096)]
    print(f"{n} tokens: quantized is a {kinds[n]}, off by {losses[n]:.1%}; others are {other}")
    assert set(other) == {"StaticCache" if n < 4096 else "DynamicCache"}, "it has changed"
assert kinds == {4000: "QuantizedCache", 4200: "DynamicCache"} and losses[4000] > 0.01 and losses[4200] == 0, "it has changed"

held, bare = {}, DynamicCache()
for n, new in ((4000, 2), (4200, 2), (4090, 20)):
    mine = QuantizedCache("fp8", phi.config)
    run(phi, n, new, cache=mine)
    held[n] = int(mine.get_seq_length())
run(phi, 4200, cache=bare)
print(f"tokens in a passed cache, by prompt: {held}; in a bare DynamicCache behind 4200: {bare.get_seq_length()}")
assert held == {4000: 4001, 4200: 0, 4090: 4096} and bare.get_seq_length() == 4201, "it has changed"

kind = run(phi, 4200, prefill_chunk_size=1000, **fp8)[0]
full = off(run(phi, 4200, new=1, prefill_chunk_size=1000)[1], run(phi, 4200, new=1)[1])
print(f"4200 tokens in chunks: {kind}; in full precision the first scores are off by {full:.0%}")
assert kind == "QuantizedCache" and full > 0.1, "it has changed"
spoken = [text for text in said if "cache" in text.lower()]
assert not spoken, f"it has changed: it says {spoken}"

others = {"Phi-3 without longrope": built(Phi3Config(**sizes)), "Llama": built(LlamaConfig(**sizes))}
ends = {name: run(model, 4200, **fp8)[0] for name, model in others.items()}
print("4200 tokens, quantized:", ends)
assert list(ends.values()) == ["DynamicCache", "QuantizedCache"], "it has changed"
PYTHON
