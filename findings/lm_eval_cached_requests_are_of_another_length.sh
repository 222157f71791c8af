#!/usr/bin/env bash
# lm-eval's --cache_requests gives one length's prompts to another length, and one tokenizer's to another model.
#
# Versions: lm_eval 0.4.13, nltk 3.10.4, wonderwords 3.0.1, transformers 5.24.0, torch 2.13.0, Python 3.11.
# The cache of built requests is named by task, shots and chat template. What RULER's prompts are made from is not part of it:
# the lengths in --metadata, and the tokenizer by which a prompt is made to fit. (A chat template's tokenizer is part of it.)
# Seen: niah_single_1, 20 prompts, and a reader that repeats the needle, so that each score should be 1. Asked for 1024 tokens
# it scores 1. Asked for 4096 next, with the cache, it gets the prompts of 1024 again, 628 words each. They are reported as
# 4096 and scored against the needles of the new, longer documents: 0.1. Without the cache it is 1, from 2908 words. With
# the tokenizer of another model (of bytes), at 1024, the cache gives the same prompts, of 3045 tokens now: 0.
# No warning. The documentation asks to refresh the cache when a task's dataset configuration changes.
# Who is hit: sweeps over lengths, or models, with the cache on: a fall behind the first length that no model has.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.24.0" "lm_eval==0.4.13" \
  "accelerate==1.15.0" "numpy<3" "nltk==3.10.4" "wonderwords==3.0.1" scipy
"$folder/venv/bin/python" - "$folder" 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
import contextlib
import io
import logging
import os
import re
import sys

folder = sys.argv[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "LM_HARNESS_CACHE_PATH": f"{folder}/requests", "LOCAL_RANK": "1"}
import lm_eval.tasks.ruler.prepare_niah  # noqa: E402, F401

del os.environ["LOCAL_RANK"]  # rank 0 would download data of nltk that this task does not use
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger().addHandler(handler)


def saved(name, core, splitter):
    core.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.save_pretrained(f"{folder}/{name}")
    return name, tokenizer


words = saved("words", Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), pre_tokenizers.Whitespace())
letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
pieces = saved("bytes", Tokenizer(models.BPE(letters, [])), pre_tokenizers.ByteLevel(add_prefix_space=False))


class Reader(LM):
    def __init__(self):
        super().__init__()
        self.prompts = []

    def generate_until(self, requests):
        self.prompts = [request.args[0] for request in requests]
        return [" ".join(re.findall(r"is: (\d+)\.", prompt)) for prompt in self.prompts]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def asked(of, length, cached):
    name, tokenizer = of
    reader, about = Reader(), {"tokenizer": f"{folder}/{name}", "max_seq_lengths": [length]}
    with contextlib.redirect_stdout(io.StringIO()):
        found = simple_evaluate(
            reader, tasks=["niah_single_1"], limit=20, cache_requests=cached, metadata=about, bootstrap_iters=0,
            task_manager=TaskManager(metadata=about),
        )
    score = found["results"]["niah_single_1"][f"{length},none"]
    n_words, n_tokens = len(reader.prompts[0].split()), len(tokenizer(reader.prompts[0]).input_ids)
    print(f"{name}, {length}, {'with' if cached else 'without'} the cache: {score}, {n_words} words, {n_tokens} tokens")
    return score, n_words, n_tokens, reader.prompts


first = asked(words, 1024, True)
second, true_second = asked(words, 4096, True), asked(words, 4096, False)
other, true_other = asked(pieces, 1024, True), asked(pieces, 1024, False)
assert first[0] == true_second[0] == true_other[0] == 1, "it has changed: the reader misses needles"
assert second[3] == first[3] and second[0] < 0.3 and true_second[2] > 3 * second[2], "it has changed: lengths have caches"
assert other[3] == first[3] and other[2] > 2048 > 2 * true_other[2], "it has changed: tokenizers have caches"
spoken = [text for text in said if "cache" in text.lower()]
assert not spoken, f"it has changed: it says {spoken}"
PYTHON
