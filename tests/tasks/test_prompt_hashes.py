"""Prompts are the same text on every machine: their hashes are kept here, by task."""

import json
from pathlib import Path

import pytest

from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.tasks.public.fetched import SOURCES
from kvscope.tasks.registry import TASKS, create_task

PATH = Path(__file__).parent / "prompt_hashes.json"
NEEDS_DATA = {"niah_single_2", "niah_single_3", "niah_multikey_1", "jsonl", *SOURCES}


def hashes(name: str) -> list[str]:
    """Return the hashes of two prompts of two lengths, of seeds 0 and 7."""
    from transformers import AutoTokenizer

    tokenizer, task = AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER)), create_task(name)
    return [
        task.build(tokenizer, length_tokens=length_tokens, sample=sample, seed=seed).prompt_sha256
        for length_tokens, sample, seed in ((2048, 0, 0), (2048, 5, 0), (4096, 1, 7))
    ]


@pytest.mark.parametrize("name", sorted(set(TASKS) - NEEDS_DATA))
def test_prompts_have_the_hashes_they_had(name: str) -> None:
    assert hashes(name) == json.loads(PATH.read_text())[name]


@pytest.mark.parametrize("name", ["long_qa", "vt", "niah_single_1"])
def test_a_prompt_is_the_same_whatever_was_built_before(name: str) -> None:
    """Nothing of it depends on how many samples, tasks or lengths a run has, or on their order."""
    first = hashes(name)
    for other in ("cwe", "niah_multivalue"):
        hashes(other)
    assert hashes(name) == first
