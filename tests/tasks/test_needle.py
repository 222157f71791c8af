"""Needle tasks: exact lengths, evidence where it is said to be, the same bytes everywhere, clear errors."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from exact_prompt import assert_exact
from transformers import PreTrainedTokenizerFast

from kvscope.errors import UsageError
from kvscope.tasks.base import Sample
from kvscope.tasks.draws import DEPTH_PARTS
from kvscope.tasks.needle import SPECS
from kvscope.tasks.registry import create_task, task_names
from kvscope.tasks.words import split_of, words

OFFLINE = [name for name, spec in SPECS.items() if spec.haystack != "essay"]
ESSAY = [name for name, spec in SPECS.items() if spec.haystack == "essay"]


def build(tokenizer: PreTrainedTokenizerFast, name: str, length: int, sample: int = 0, seed: int = 0) -> Sample:
    return create_task(name).build(tokenizer, length_tokens=length, sample=sample, seed=seed)


@pytest.mark.parametrize("length", [640, 1000, 1024, 1025, 1026, 1027, 4096, 8191])
@pytest.mark.parametrize("name", OFFLINE)
def test_length_is_exact_and_text_is_the_same_prompt(
    tokenizer: PreTrainedTokenizerFast, name: str, length: int
) -> None:
    sample = build(tokenizer, name, length)
    assert_exact(tokenizer, sample, length)


@pytest.mark.parametrize("name", OFFLINE)
def test_evidence_spans_hold_the_answers_and_lie_before_the_question(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    for i in range(5):
        sample = build(tokenizer, name, 2048, sample=i)
        spoken = [tokenizer.decode(sample.ids[start:end]) for start, end in sample.evidence_spans]
        assert len(spoken) == len(sample.targets)
        for target in sample.targets:
            assert sum(target in part for part in spoken) == 1
            assert sample.text.count(target) == 1, "the answer must stand in the evidence alone"
        assert all(end <= sample.question_start for _, end in sample.evidence_spans)
        question = tokenizer.decode(sample.ids[sample.question_start :])
        assert question.startswith("What ")
        assert not any(target in question for target in sample.targets)
        first = sample.evidence_spans[0][0]
        assert 0 <= sample.depth <= 1
        if len(sample.targets) == 1:
            assert abs(first / sample.question_start - sample.depth) < 0.05


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2"])
def test_ten_samples_cover_the_ten_depth_parts(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    depths = [build(tokenizer, name, 4096, sample=i).depth for i in range(10, 20)]
    # The needle's own line shifts a depth by less than one part.
    assert sorted(round(depth * DEPTH_PARTS - 0.5) for depth in depths) == pytest.approx(range(DEPTH_PARTS), abs=1)
    assert len({int(depth * DEPTH_PARTS) for depth in depths}) >= DEPTH_PARTS - 1


def test_same_seed_gives_the_same_bytes_on_every_machine(gpt2_like: PreTrainedTokenizerFast) -> None:
    """Pinned hashes: a change of word list, generator or Python must not pass unnoticed.

    The tokenizer is a fixed one, not the reference model's, which may be trained anew.
    """
    made = {name: build(gpt2_like, name, 8192, sample=3, seed=7).prompt_sha256[:16] for name in OFFLINE}
    assert made == PINNED
    assert build(gpt2_like, "niah_single_1", 8192, sample=3, seed=8).prompt_sha256[:16] != made["niah_single_1"]
    assert build(gpt2_like, "niah_single_1", 8192, sample=4, seed=7).prompt_sha256[:16] != made["niah_single_1"]


PINNED = {
    "niah_single_1": "dc023332755012e7",
    "niah_multikey_2": "c06dce65134a2275",
    "niah_multikey_3": "34a685bcf1d1ea07",
    "niah_multivalue": "a50066be3cd96d73",
    "niah_multiquery": "e944efdd90e1530d",
}


def test_keys_come_from_the_evaluation_split_only(tokenizer: PreTrainedTokenizerFast) -> None:
    text = build(tokenizer, "niah_multikey_2", 8192).text
    keys = re.findall(r"for ([a-z]+)-([a-z]+) is:", text)
    assert len(keys) > 200
    assert len(set(keys)) == len(keys), "a key must not stand twice"
    assert {split_of(word) for key in keys for word in key} == {"eval"}
    assert not set(words("train").nouns) & set(words("eval").nouns)


def test_ruler_wording(tokenizer: PreTrainedTokenizerFast) -> None:
    one = build(tokenizer, "niah_single_1", 1024)
    assert one.text.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    many = build(tokenizer, "niah_multiquery", 1024)
    assert re.search(
        r"What are all the special magic numbers for [a-z-]+, [a-z-]+, [a-z-]+, and [a-z-]+ mentioned in the provided "
        r"text\? The special magic numbers for .* mentioned in the provided text are$",
        many.text,
    )


@pytest.mark.parametrize("name", OFFLINE)
def test_other_tokenizers_get_exact_prompts_too(gpt2_like: PreTrainedTokenizerFast, name: str) -> None:
    task = create_task(name)
    length = max(4096, task.min_length_tokens(gpt2_like))
    sample = task.build(gpt2_like, length_tokens=length, sample=1, seed=0)
    assert len(sample.ids) + task.max_new_tokens == length


def test_a_tokenizer_that_joins_lines_gets_exact_prompts_too(line_joining: PreTrainedTokenizerFast) -> None:
    assert len(build(line_joining, "niah_single_1", 4096).ids) == 4096 - 128


@pytest.mark.parametrize("name", OFFLINE)
def test_smallest_length_works_and_a_smaller_one_says_so(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    task = create_task(name)
    least = task.min_length_tokens(tokenizer)
    for i in range(20):
        assert len(task.build(tokenizer, length_tokens=least, sample=i, seed=0).ids) == least - task.max_new_tokens
    with pytest.raises(UsageError, match=f"{name} at length 160.*too small.*larger --length"):
        task.build(tokenizer, length_tokens=160, sample=0, seed=0)


def test_score_is_the_share_of_values_found(tokenizer: PreTrainedTokenizerFast) -> None:
    task = create_task("niah_multivalue")
    sample = build(tokenizer, "niah_multivalue", 1024)
    a, b, _, _ = sample.targets
    assert task.score(sample, f" {a}, {b}") == 0.5
    assert task.score(sample, ", ".join(sample.targets).upper()) == 1.0
    assert task.score(sample, "") == 0.0


@pytest.mark.parametrize("name", ESSAY)
def test_essay_tasks_name_the_file_they_need(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{name}:data=PATH"):
        create_task(name)
    with pytest.raises(UsageError, match=r"nowhere\.txt.*No such file"):
        create_task(name, data=str(tmp_path / "nowhere.txt"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UsageError, match="holds no text"):
        create_task(name, data=str(tmp_path / "empty.txt"))
    (tmp_path / "bad.json").write_text('{"words": 1}')
    with pytest.raises(UsageError, match="'text' field"):
        create_task(name, data=str(tmp_path / "bad.json"))


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_essays_fill_the_haystack(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str) -> None:
    essay = "\n".join(f"Essay line {'abcdefgh'[i]} speaks of trains and rivers." for i in range(8))
    path = tmp_path / f"essay.{suffix}"
    path.write_text(essay if suffix == "txt" else json.dumps({"text": essay}))
    sample = create_task("niah_single_2", data=str(path)).build(tokenizer, length_tokens=2048, sample=0, seed=0)
    assert sample.text.count("speaks of trains") > 50
    assert len(sample.ids) == 2048 - 128


def test_fixed_haystacks_take_no_data_file() -> None:
    with pytest.raises(UsageError, match="takes no data file"):
        create_task("niah_single_1", data="x.txt")


def test_registry_errors_suggest_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"There is no task 'niah_singel_1'\. Did you mean 'niah_single_1'\?"):
        create_task("niah_singel_1")
    with pytest.raises(UsageError, match=r"There is no task 'NIAH_single_1'\. Did you mean 'niah_single_1'\?"):
        create_task("NIAH_single_1")
    with pytest.raises(UsageError, match=r"no option 'dta'\. Did you mean 'data'\?"):
        create_task("niah_single_2", dta="x")
    assert set(OFFLINE) <= set(task_names())


def test_word_lists_are_the_pinned_ones() -> None:
    assert hashlib.sha256("\n".join(words("eval").nouns).encode()).hexdigest()[:8] == EVAL_NOUNS


EVAL_NOUNS = "58e1afb0"
