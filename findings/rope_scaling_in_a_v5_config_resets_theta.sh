#!/usr/bin/env bash
# rope_scaling, added to a config.json that transformers 5 wrote, resets the RoPE base to 10000.
#
# Versions: transformers 5.24.0, torch 2.13.0, Python 3.11.
# Model cards (of Qwen, for one) say how a context gets longer: add "rope_scaling" with YaRN's factor to config.json.
# transformers 4 kept the base beside it, as "rope_theta". transformers 5 writes the base into "rope_parameters", and still
# reads "rope_scaling".
# Seen: Qwen3, Llama and Mistral with a base of 1e6, saved by 5.24 and edited so, load with YaRN and a base of 10000, and no
# warning: rope_scaling takes the place of the whole of rope_parameters, and the model class fills in its default base. The
# same edit to a file as transformers 4 wrote it keeps 1e6, and so does Gemma 3's file of version 5, whose layers have
# parameters of their own. With rope_scaling as a keyword of from_pretrained the base is None, which is an error.
# The slowest wave that the model reads is then a hundred times too short, at every length. The weights are right.
# Who is hit: whoever measures a long context by such an edit of a checkpoint that was saved again (fine-tuned, merged,
# quantised): what it loses looks like the price of YaRN. "rope_parameters" with "rope_theta" inside is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.24.0" "numpy<3"
"$folder/venv/bin/python" - "$folder" 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
import json
import logging
import sys
import warnings
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

said = []
warnings.showwarning = lambda message, *_, **__: said.append(str(message))
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
transformers.utils.logging.add_handler(handler)

yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
sizes = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32768,
}
folder = Path(sys.argv[1])


def edited(name, as_version_4_wrote_it=False):
    path = folder / f"{name}-{as_version_4_wrote_it}"
    config = getattr(transformers, f"{name}Config")(**sizes, rope_theta=1e6)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    base = (written["rope_parameters"].get("full_attention") or written["rope_parameters"])["rope_theta"]
    assert base == 1e6 and "rope_theta" not in written, "it has changed: the base stands elsewhere"
    if as_version_4_wrote_it:
        written["rope_theta"] = written.pop("rope_parameters")["rope_theta"]
    (path / "config.json").write_text(json.dumps({**written, "rope_scaling": yarn}))
    said.clear()
    model = AutoModelForCausalLM.from_pretrained(path)
    assert not [text for text in said if "rope" in text.lower()], f"it has changed: it says {said}"
    rope = model.config.rope_parameters
    rope = rope.get("full_attention", rope)
    assert rope["rope_type"] == "yarn" and rope["factor"] == 4.0, "it has changed: there is no YaRN"
    rotary = model.model.rotary_emb
    slowest = getattr(rotary, "inv_freq" if hasattr(rotary, "inv_freq") else "full_attention_inv_freq")[-1]
    return rope["rope_theta"], 1 / float(slowest)


bases = {}
for what, arguments in {
    "Qwen3, of version 5": ("Qwen3",),
    "Llama, of version 5": ("Llama",),
    "Mistral, of version 5": ("Mistral",),
    "Qwen3, as version 4 wrote it": ("Qwen3", True),
    "Gemma 3, of version 5": ("Gemma3Text",),
}.items():
    bases[what], longest = edited(*arguments)
    print(f"{what}, with rope_scaling added: YaRN, base {bases[what]:g}, slowest wave {longest:.3g} tokens a radian")
assert list(bases.values()) == [1e4, 1e4, 1e4, 1e6, 1e6], "it has changed"

written = json.loads((folder / "Qwen3-False" / "config.json").read_text())
del written["rope_scaling"]
(folder / "Qwen3-False" / "config.json").write_text(json.dumps(written))
print("rope_scaling as a keyword:", AutoConfig.from_pretrained(folder / "Qwen3-False", rope_scaling=yarn).rope_parameters)
try:
    AutoModelForCausalLM.from_pretrained(folder / "Qwen3-False", rope_scaling=yarn)
    raise SystemExit("it has changed: the keyword is taken")
except TypeError as error:
    print(f"and a model of it: TypeError: {error}")
PYTHON
