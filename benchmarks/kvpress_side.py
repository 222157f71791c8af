"""kvpress's side of against_kvpress.py: runs in kvpress's own environment, reads one job, writes one answer file.

It uses kvpress's own pipeline and one press a method; every press prefills the prompt again, as kvpress does. Only
``preprocess`` differs: the pipeline would put a chat template or a newline around a text, and both sides have to see
the same token ids.

    python kvpress_side.py JOB.json ANSWERS.json
"""

import json
import logging
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import kvpress  # type: ignore[import-not-found]
import torch
import transformers
from transformers import DynamicCache


class IdsPipeline(kvpress.KVPressTextGenerationPipeline):  # type: ignore[misc]
    """The pipeline on token ids: ``context_ids`` are compressed, ``question_ids`` come after the compression."""

    def preprocess(self, inputs: dict[str, list[int]], **_: Any) -> dict[str, Any]:
        """Return what the pipeline's own preprocess returns."""
        return {
            "context_ids": torch.tensor([inputs["context_ids"]]),
            "questions_ids": [torch.tensor([inputs["question_ids"]])],
        }


def make_press(name: str, compression_ratio: float | None, seed: int) -> Any:
    """Return the press comparable to kvscope's method ``name``; None, kvpress's word for dense, leaves all in."""
    if compression_ratio is None:
        return None
    if name == "knorm":
        return kvpress.KnormPress(compression_ratio=compression_ratio)
    if name == "sliding_window":
        return kvpress.StreamingLLMPress(compression_ratio=compression_ratio, n_sink=4)
    if name == "recency":
        return kvpress.StreamingLLMPress(compression_ratio=compression_ratio, n_sink=0)
    return kvpress.RandomPress(compression_ratio=compression_ratio, seed=seed)


def answer_all(job: dict[str, Any]) -> dict[str, Any]:
    """Load the model, answer every prompt under every press, and say what it took."""
    started_s = time.perf_counter()
    pipe = transformers.pipeline(
        "kv-press-text-generation",
        model=job["model"],
        dtype=getattr(torch, job["dtype"]),
        device=job["device"],
        pipeline_class=IdsPipeline,
    )
    load_s = time.perf_counter() - started_s
    # The pipeline stops at these ids; kvscope stops at the same text.
    pipe.model.generation_config.eos_token_id = job["stop_ids"]
    calls = {"forward": 0}

    def count(*_: Any) -> None:
        calls["forward"] += 1

    pipe.model.register_forward_pre_hook(count)  # the prefill calls the decoder below; each call here gives a token
    rows = []
    for prompt in job["prompts"]:
        for method in job["methods"]:
            cache = DynamicCache()
            calls["forward"] = 0
            began_s = time.perf_counter()
            answer = pipe(
                {"context_ids": prompt["context_ids"], "question_ids": prompt["question_ids"]},
                press=make_press(method["name"], method["compression_ratio"], job["seed"]),
                max_new_tokens=job["max_new_tokens"],
                cache=cache,
            )["answer"]
            rows.append(
                {
                    "method": method["label"],
                    "length_tokens": prompt["length_tokens"],
                    "sample": prompt["sample"],
                    "output": answer,
                    "answer_s": time.perf_counter() - began_s,
                    "decode_tokens": calls["forward"],
                    "kept_fraction": cache.get_seq_length() / len(prompt["context_ids"]),
                }
            )
    return {
        "load_s": load_s,
        "model_class": type(pipe.model).__name__,
        "in_supported_models": isinstance(pipe.model, kvpress.presses.base_press.SUPPORTED_MODELS),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("kvpress", "torch", "transformers")},
        "rows": rows,
    }


if __name__ == "__main__":
    # kvpress repeats for every prompt that this architecture is not on its list; `in_supported_models` says it once.
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    answers = answer_all(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")
