#!/usr/bin/env bash
# lm-eval's RULER asks other prompts, from the same seeds, in a process that had imported nltk before.
#
# Versions: lm_eval 0.4.13, nltk 3.10.4, wonderwords 3.0.1, transformers 5.24.0, torch 2.13.0, Python 3.11.
# simple_evaluate seeds Python's random generator (random_seed=0), and then loads the tasks. RULER's modules import nltk,
# and an import of nltk draws one number from that generator. RULER draws its prompts from it behind that.
# Seen: the first prompt of ruler_cwe has other common words where anything had imported nltk before the seeds (a
# notebook, another task, rouge_score); so has ruler_fwe. ruler_vt has the same. Two processes that import alike agree. So
# two runs have the same prompts only if their samples' hashes say so, not because seeds and versions are equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.24.0" "lm_eval==0.4.13" \
  "accelerate==1.15.0" "numpy<3" "nltk==3.10.4" "wonderwords==3.0.1" scipy
cat > "$folder/ask.py" <<'PYTHON'
import logging
import os
import random
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LOCAL_RANK"] = "1"  # rank 0 would download data of nltk that this task does not use
logging.disable(logging.WARNING)
if sys.argv[1] == "before":
    import nltk  # noqa: F401
import lm_eval.evaluator  # noqa: F401
import numpy as np
from lm_eval.tasks import TaskManager, get_task_dict

random.seed(0)  # as simple_evaluate does before it loads tasks
np.random.seed(1234)
about = {"pretrained": sys.argv[2], "tokenizer": sys.argv[2], "max_seq_lengths": [1024]}
task = get_task_dict(["ruler_cwe"], TaskManager(metadata=about))["ruler_cwe"]
print("WORDS", *next(iter(task.test_docs()))["outputs"])
PYTHON
"$folder/venv/bin/python" - "$folder" 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
import subprocess
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

folder = sys.argv[1]
core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(f"{folder}/tokenizer")


def first_prompt(nltk):
    command = [sys.executable, f"{folder}/ask.py", nltk, f"{folder}/tokenizer"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return next(line.split()[1:] for line in said.splitlines() if line.startswith("WORDS"))


seen = {"behind the seeds": first_prompt("behind"), "again": first_prompt("behind"), "before them": first_prompt("before")}
for what, common in seen.items():
    print(f"nltk imported {what}: {common}")
assert seen["behind the seeds"] == seen["again"] != seen["before them"], "it has changed"
PYTHON
