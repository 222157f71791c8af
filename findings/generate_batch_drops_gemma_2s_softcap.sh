#!/usr/bin/env bash
# Continuous batching of transformers, generate_batch, drops the soft cap of Gemma 2's attention where it runs eager.
#
# Versions: transformers 5.24.0, torch 2.13.0, Python 3.11, CPU.
# Gemma 2 caps its attention scores at 50 (attn_logit_softcapping). It runs eager by default, since SDPA has no cap and
# refuses a call with one. generate_batch puts a paged attention in eager's place while it runs. That knows attention sinks
# (of gpt-oss), but takes any other argument and ignores it, the cap too.
# Seen: a random Gemma 2 with its own cap, greedy, 24 prompts of 40 tokens, 12 new tokens. generate_batch answers every
# prompt as generate does for the same weights WITHOUT the cap, and so otherwise than generate with it in 14 of the 24.
# Without the cap both agree on all, and so they do for Gemma 3, which has none, run eager. No warning.
# Who is hit: evaluations and RL rollouts of Gemma 2 by continuous batching without FlashAttention (where that is
# installed, it is taken instead): their scores are those of another model than generate runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.24.0" "numpy<3"
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
import copy

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GenerationConfig

torch.set_num_threads(1)
sizes = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": None,
}
prompts = torch.randint(3, 100, (24, 40), generator=torch.Generator().manual_seed(1))
greedy = {"max_new_tokens": 12, "do_sample": False}


def built(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # larger weights, so that scores get near the cap and answers depend on the prompt
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(32.0 if "q_proj" in name or "k_proj" in name else 4.0)
    return model


def one_by_one(model):
    return [model.generate(row[None], **greedy)[0, len(row) :].tolist() for row in prompts]


def batched(model):
    answers = model.generate_batch(
        prompts.tolist(), generation_config=GenerationConfig(**greedy, eos_token_id=None), progress_bar=False
    )
    return [answers[name].generated_tokens for name in sorted(answers, key=lambda name: int(name.rpartition("_")[2]))]


def agreeing(left, right):
    return sum(one == other for one, other in zip(left, right, strict=True))


config = Gemma2Config(**sizes)
capped = built(config)
assert config.attn_logit_softcapping == 50.0 and config._attn_implementation == "eager", "it has changed"
uncapped = copy.deepcopy(capped)
for layer in uncapped.model.layers:
    layer.self_attn.attn_logit_softcapping = None
right, without, together = one_by_one(capped), one_by_one(uncapped), batched(capped)
seen = agreeing(together, right), agreeing(together, without), agreeing(batched(uncapped), without)
print(f"gemma2, of 24: generate_batch agrees with generate on {seen[0]}, and with generate without the cap on {seen[1]}")
print(f"gemma2 without the cap, of 24: both agree on {seen[2]}")
assert seen[0] < 20 and seen[1:] == (24, 24), "it has changed"
plain = built(Gemma3TextConfig(**sizes))
plain.set_attn_implementation("eager")
same = agreeing(batched(plain), one_by_one(plain))
print(f"gemma3_text, eager, of 24: both agree on {same}")
assert same == 24, "it has changed"
PYTHON
if grep -i softcap "$folder/stderr"; then echo "it has changed: it says so"; exit 1; fi
