#!/usr/bin/env bash
# lm-eval's hf model decides by the first prompt of a batch whether all of them get a BOS token.
#
# Versions: lm_eval 0.4.13, transformers 5.24.0, torch 2.13.0, Python 3.11.
# A prompt whose text begins with the BOS string (most chat templates write it) must not get a second one from the
# tokenizer. HFLM looks for that string in the first prompt of a batch alone, and encodes the whole batch so.
# Seen: with a prompt that has it and one that has not, the order decides: either the second prompt loses its BOS, or the
# other gets two. Batches are sorted by length, so that batch size and sampling of the documents change answers. One prompt
# at a time, and for log-likelihoods (tok_encode), each prompt is judged by itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.24.0" "lm_eval==0.4.13" \
  "accelerate==1.15.0" "numpy<3"
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { tail -5 "$folder/stderr"; exit 1; }
import logging

logging.disable(logging.WARNING)
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

core = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 4}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
core.add_special_tokens(["<s>", "</s>"])
core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
sizes = {"vocab_size": 5, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
lm = HFLM(pretrained=LlamaForCausalLM(LlamaConfig(**sizes)), tokenizer=tokenizer, batch_size=2, backend="causal")


def batch(*texts):
    ids, mask = lm.tok_batch_encode(list(texts))
    return [" ".join(tokenizer.convert_ids_to_tokens(row[keep == 1])) for row, keep in zip(ids, mask)]


seen = {
    "plain first": batch("a b", "<s>a b"),
    "BOS in the text first": batch("<s>a b", "a b"),
    "each alone": [*batch("a b"), *batch("<s>a b")],
}
for what, tokens in seen.items():
    print(f"{what}: {tokens}")
assert seen == {
    "plain first": ["<s> a b", "<s> <s> a b"],
    "BOS in the text first": ["<s> a b", "a b"],
    "each alone": ["<s> a b", "<s> a b"],
}, "it has changed"
PYTHON
