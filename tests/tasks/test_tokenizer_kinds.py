"""Every task builds prompts of an exact length on every kind of tokenizer; the evidence is where it is said to be."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import KINDS, words_only
from transformers import AutoTokenizer

from kvscope.errors import UsageError
from kvscope.tasks import measured
from kvscope.tasks.base import Sample
from kvscope.tasks.registry import create_task

TASKS = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "long_qa",
    "long_qa_no_context",
    "long_qa_mrcr",
)
REAL = {name: os.environ.get(f"KVSCOPE_TEST_TOKENIZER_{name}") for name in ("SMOLLM2", "GEMMA")}


@cache
def tokenizer_of(kind: str) -> Any:
    return KINDS[kind]()


def check(tokenizer: Any, sample: Sample, *, length_tokens: int, kind: str) -> None:
    assert len(sample.ids) + sample.max_new_tokens == length_tokens == sample.length_tokens
    assert tuple(tokenizer(sample.text)["input_ids"]) == sample.ids
    assert 0 < sample.question_start < len(sample.ids)
    assert list(sample.evidence_spans) == sorted(sample.evidence_spans)
    assert all(0 <= start < end <= sample.question_start for start, end in sample.evidence_spans)
    if sample.depth is not None:
        assert 0 <= sample.depth < 1
    if sample.task.startswith(("niah", "vt", "cwe", "fwe")):  # answers that stand in the text as they are
        spoken = [tokenizer.decode(sample.ids[start:end]) for start, end in sample.evidence_spans]
        for target in sample.targets:
            wanted = target.lower() if kind == "lowercase" else target
            assert any(wanted in part for part in spoken), f"{target} is not in {spoken[:10]}"


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_exact_on_every_kind_of_tokenizer(kind: str, name: str) -> None:
    tokenizer, task = tokenizer_of(kind), create_task(name)
    least = task.min_length_tokens(tokenizer)
    samples = []
    for index, length_tokens in enumerate((least, least + 1, 2 * least + 3)):
        samples.append(task.build(tokenizer, length_tokens=length_tokens, sample=index, seed=0))
        check(tokenizer, samples[-1], length_tokens=length_tokens, kind=kind)
    assert samples[0] == task.build(tokenizer, length_tokens=least, sample=0, seed=0)


@pytest.mark.parametrize("kind", ["gpt2", "no-split", "llama-2"])
@pytest.mark.parametrize("name", ["vt", "niah_single_1", "cwe"])
def test_a_tokenizer_without_offsets_finds_the_same_places(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizers in Python and of SentencePiece itself give no offsets: places come from encoding what is before."""
    tokenizer, task = tokenizer_of(kind), create_task(name)
    length_tokens = task.min_length_tokens(tokenizer) + 70
    monkeypatch.setattr(measured, "getattr", lambda *_: False, raising=False)
    sample = task.build(tokenizer, length_tokens=length_tokens, sample=1, seed=0)
    check(tokenizer, sample, length_tokens=length_tokens, kind=kind)


@pytest.mark.parametrize("name", TASKS)
def test_a_tokenizer_that_loses_words_is_refused(name: str) -> None:
    tokenizer, task = words_only(), create_task(name)
    with pytest.raises(UsageError, match="does not give back the words of the prompt"):
        task.build(tokenizer, length_tokens=4096, sample=0, seed=0)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("model", REAL)
def test_prompts_are_exact_on_real_tokenizers(model: str, name: str) -> None:
    folder = REAL[model]
    if folder is None or not Path(folder).is_dir():
        pytest.skip(f"KVSCOPE_TEST_TOKENIZER_{model} names no folder with this model's tokenizer")
    tokenizer, task = AutoTokenizer.from_pretrained(folder), create_task(name)
    least = task.min_length_tokens(tokenizer)
    for index, length_tokens in enumerate((least, least + 1, least + 2, least + 3, 2048, 4096, 8192)):
        if length_tokens >= least:
            sample = task.build(tokenizer, length_tokens=length_tokens, sample=index, seed=0)
            check(tokenizer, sample, length_tokens=length_tokens, kind=model)
