#!/usr/bin/env bash
# A gap in position_ids cuts attention in two, but only without a cache and without an attention mask.
#
# Versions: transformers 5.24.0 (4.57.6 does the same), torch 2.13.0, Python 3.11, CPU.
# Twenty tokens stand at the positions 0..9 and 60..69: a prompt whose middle was dropped, or positions that skip ahead so
# that a model meets far distances in a short text. One expects the later ten to attend to the earlier ones from afar.
# Seen: with use_cache=True they do, and with use_cache=False and an attention mask of ones they do as well. With
# use_cache=False alone the logits differ by 3: they are those of the ten later tokens with nothing before them. SDPA and
# eager agree on that. Nothing is said: where positions step by anything but +1, another text counts as packed into the row,
# whether positions start anew there or not. Of tokens in reverse each one is a text of its own.
# Who is hit: losses and perplexities at positions with gaps (without a cache, to save memory): replays of what an eviction
# kept, training on skipped positions, probes of what distance costs. They measure a prompt that begins behind the gap.
# An attention mask of ones in every such call prevents it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.24.0" "numpy<3"
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
with torch.no_grad():  # larger weights, so that logits depend on the context
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(8.0)
ids, gap = torch.arange(3, 23)[None], torch.cat([torch.arange(10), torch.arange(60, 70)])[None]
reverse, ones = torch.arange(19, -1, -1)[None], torch.ones_like(ids)


def logits(tokens, positions, **how):
    with torch.no_grad():
        return model(tokens, position_ids=positions, **how).logits[0]


def apart(left, right):
    return float((left - right).abs().max())


for attention in ("sdpa", "eager"):
    model.set_attn_implementation(attention)
    cached, plain = logits(ids, gap, use_cache=True), logits(ids, gap, use_cache=False)
    masked = logits(ids, gap, use_cache=False, attention_mask=ones)
    later = logits(ids[:, 10:], gap[:, 10:], use_cache=False)
    one_by_one = torch.cat([logits(ids[:, i : i + 1], reverse[:, i : i + 1], use_cache=False) for i in range(20)])
    seen = {
        "use_cache=False, against use_cache=True": apart(plain, cached),
        "use_cache=False and a mask of ones, against use_cache=True": apart(masked, cached),
        "use_cache=False behind the gap, against those ten tokens alone": apart(plain[10:], later),
        "use_cache=False in reverse, against each token alone": apart(logits(ids, reverse, use_cache=False), one_by_one),
    }
    for what, difference in seen.items():
        print(f"{attention}: {what}: logits differ by {difference:.1g}")
    cut, *same = seen.values()
    assert cut > 1 and max(same) < 1e-4, "it has changed"
PYTHON
