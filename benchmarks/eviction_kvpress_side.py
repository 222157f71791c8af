"""kvpress's side of eviction_against_kvpress.py: which positions its presses keep. Runs in kvpress's own environment.

Each press prefills the prompt under kvpress's own hooks. What it kept is read by compressing once more with the tokens'
positions in the place of their values, by the scores of the first time.

    python eviction_kvpress_side.py JOB.json ANSWERS.json
"""

import json
import logging
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import kvpress  # type: ignore[import-not-found]
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


def make_press(name: str, ratio: float, window_tokens: int) -> Any:
    """Return the press that follows the rule of kvscope's method ``name``."""
    window = {"compression_ratio": ratio, "window_size": window_tokens, "kernel_size": 5}
    if name == "snapkv":
        return kvpress.SnapKVPress(**window)
    if name == "pyramidkv":
        return kvpress.PyramidKVPress(**window)
    if name == "adakv":
        return kvpress.AdaKVPress(kvpress.SnapKVPress(**window))
    presses = {
        "expected_attention": kvpress.ExpectedAttentionPress,
        "knorm": kvpress.KnormPress,
        "tova": kvpress.TOVAPress,
    }
    return presses[name](compression_ratio=ratio)


def kept_positions(model: Any, press: Any, ids: list[int]) -> list[list[list[int]]]:
    """Return, layer by layer and KV head by KV head, the positions that a press keeps of a prompt."""
    found: list[list[list[int]]] = []
    scorer = getattr(press, "press", press)
    compress, score = press.compress, scorer.score
    held: list[torch.Tensor] = []

    def scored(*arguments: Any) -> torch.Tensor:
        held.append(score(*arguments))
        return held[-1].clone()

    def compressed(module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        scorer.score = scored
        result = compress(module, hidden, keys, values, attentions, kwargs)
        n_heads, n_tokens = keys.shape[1:3]
        if getattr(module, "masked_key_indices", None) is not None:
            _, heads, tokens = module.masked_key_indices
            keep = torch.ones((n_heads, n_tokens), dtype=torch.bool)
            keep[heads, tokens] = False
            module.masked_key_indices = None
            found.append([row.nonzero()[:, 0].tolist() for row in keep])
            return result
        scores = held[-1]
        scorer.score = lambda *_: scores.clone()
        position = torch.arange(n_tokens, dtype=values.dtype)[None, None, :, None].expand_as(values)
        _, kept = compress(module, hidden, keys, position, attentions, kwargs)
        found.append(kept[0, :, :, 0].long().sort(-1).values.tolist())
        return result

    press.compress = compressed
    with torch.inference_mode(), press(model):
        model.model(input_ids=torch.tensor([ids]), past_key_values=DynamicCache())
    return found


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Load the model and give every prompt to every press."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    kept = [
        {
            name: kept_positions(model, make_press(name, 1 - job["keep"], job["window_tokens"]), prompt)
            for name in job["methods"]
        }
        for prompt in job["prompts"]
    ]
    return {
        "model_class": type(model).__name__,
        "in_supported_models": isinstance(model, kvpress.presses.base_press.SUPPORTED_MODELS),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("kvpress", "torch", "transformers")},
        "kept": kept,
    }


if __name__ == "__main__":
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    answers = answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")
