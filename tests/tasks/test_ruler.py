"""vt, cwe and fwe: exact lengths, answers that only the text gives, RULER's definition and none of its defects."""

import re
from collections import Counter
from itertools import pairwise

import pytest
from exact_prompt import assert_exact
from transformers import PreTrainedTokenizerFast

from kvscope.errors import UsageError
from kvscope.tasks.base import Sample
from kvscope.tasks.draws import DEPTH_PARTS
from kvscope.tasks.needle import NOISE
from kvscope.tasks.registry import create_task
from kvscope.tasks.ruler_chains import spread
from kvscope.tasks.ruler_words import CommonWordsTask
from kvscope.tasks.words import split_of

RULER = ["vt", "cwe", "fwe"]


def build(tokenizer: PreTrainedTokenizerFast, name: str, length: int, sample: int = 0, seed: int = 0) -> Sample:
    return create_task(name).build(tokenizer, length_tokens=length, sample=sample, seed=seed)


def body(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> str:
    text = tokenizer.decode(sample.ids[: sample.question_start], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("length", [1000, 1024, 1025, 1026, 1027, 4096, 8191, 32768])
@pytest.mark.parametrize("name", RULER)
def test_length_is_exact_and_text_is_the_same_prompt(
    tokenizer: PreTrainedTokenizerFast, name: str, length: int
) -> None:
    sample = build(tokenizer, name, length)
    assert_exact(tokenizer, sample, length)


@pytest.mark.parametrize("name", RULER)
def test_evidence_lies_before_the_question_and_depth_is_its_mean_place(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    for i in range(5):
        sample = build(tokenizer, name, 2048, sample=i)
        spans = sample.evidence_spans
        assert list(spans) == sorted(spans)
        assert all(start < end for start, end in spans)
        assert all(end <= after for (_, end), (after, _) in pairwise(spans))
        assert spans[-1][1] <= sample.question_start
        question = tokenizer.decode(sample.ids[sample.question_start :])
        assert question.startswith("Question: ")
        assert not any(target in question for target in sample.targets)
        mean = sum(start for start, _ in spans) / len(spans)
        assert sample.depth == pytest.approx(mean / sample.question_start, abs=0.06)


def test_vt_asks_one_chain_of_four_hops_among_others(tokenizer: PreTrainedTokenizerFast) -> None:
    for i in range(10):
        sample = build(tokenizer, "vt", 4096, sample=i)
        text = body(tokenizer, sample)
        given = dict(re.findall(r"^VAR ([A-Z]{5}) = (\d{5})$", text, re.M))
        copied = re.findall(r"^VAR ([A-Z]{5}) = VAR ([A-Z]{5})$", text, re.M)
        assert (len(given), len(copied)) == (4, 16)
        held = dict(given)
        for new, old in copied:  # in the order of the text: a name is never copied before it is given something
            held[new] = held[old]
        asked = re.search(r"assigned the value (\d{5}) in the text above", sample.text)
        assert asked
        assert {name for name, value in held.items() if value == asked[1]} == set(sample.targets)
        assert Counter(held.values()) == dict.fromkeys(given.values(), 5), "three of four variables are no answers"
        spoken = [tokenizer.decode(sample.ids[a:b]) for a, b in sample.evidence_spans]
        for line, target in zip(spoken, sample.targets, strict=True):
            assert line.startswith(f"VAR {target} = ")
        rest = [line for line in text.split("\n")[2:] if line and not line.startswith("VAR ")]
        assert set(rest[:-1]) <= {NOISE}
        assert re.fullmatch("[A-Za-z ]+", rest[-1]) or rest[-1] == NOISE


def test_vt_depths_cover_the_ten_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    depths = [build(tokenizer, "vt", 8192, sample=i).depth for i in range(20, 30)]
    assert len({int(depth * DEPTH_PARTS) for depth in depths}) >= DEPTH_PARTS - 1


@pytest.mark.parametrize("mean", [0.01, 0.3, 0.5, 0.77, 0.99])
def test_spread_keeps_the_mean_inside_the_haystack(mean: float) -> None:
    moved = spread([0.9, 0.1, 0.4, 0.95, 0.6], mean)
    assert moved == sorted(moved)
    assert 0 <= moved[0] < moved[-1] <= 1
    assert sum(moved) / 5 == pytest.approx(mean)


@pytest.mark.parametrize(("length", "often", "seldom"), [(1024, 6, 1), (4095, 6, 1), (4096, 30, 3), (65536, 30, 3)])
def test_cwe_counts(tokenizer: PreTrainedTokenizerFast, length: int, often: int, seldom: int) -> None:
    sample = build(tokenizer, "cwe", length, sample=2)
    entries = re.findall(r"(\d+)\. ([a-z-]+)", body(tokenizer, sample))
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    assert {word for word, count in counts.items() if count == often} == set(sample.targets)
    assert len(sample.targets) == 10
    others = Counter(count for word, count in counts.items() if word not in sample.targets)
    assert others.pop(seldom) >= 9
    assert sum(others.values()) <= 1, "at most one word is cut short of its repeats"
    spoken = [tokenizer.decode(sample.ids[a:b]).strip() for a, b in sample.evidence_spans]
    assert Counter(spoken) == dict.fromkeys(sample.targets, often)
    for target in sample.targets:
        assert not any(target in word for word in counts if word != target), "a substring would score by luck"
    assert {split_of(part) for word in counts for part in word.split("-")} == {"eval"}


def test_cwe_takes_pairs_only_where_single_words_run_out(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "-" not in body(tokenizer, build(tokenizer, "cwe", 8192))
    assert any("-" in build(tokenizer, "cwe", 65536, sample=i).targets[0] for i in range(5)), "answers are drawn alike"


@pytest.mark.parametrize("length", [1024, 4096, 32768])
def test_fwe_counts_follow_the_zeta_law(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    sample = build(tokenizer, "fwe", length, sample=2)
    lines = body(tokenizer, sample).split("\n")[1:-1]
    coded = " ".join(lines).split()
    ranked = [(word, count) for word, count in Counter(coded).most_common() if word not in ("...", "a")]
    assert tuple(word for word, _ in ranked[:3]) == sample.targets
    counts = [count for _, count in ranked[:4]]
    assert counts == sorted(set(counts), reverse=True), "no ties at the answer's edge"
    dots = Counter(" ".join(lines[:-1]).split())["..."]
    assert counts[0] * 4 == pytest.approx(dots, rel=0.15)
    assert counts[0] / counts[2] == pytest.approx(4, rel=0.15)
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
    spoken = Counter(tokenizer.decode(sample.ids[a:b]).strip() for a, b in sample.evidence_spans)
    assert spoken == dict(ranked[:3])


@pytest.mark.parametrize("name", ["cwe", "fwe"])
def test_every_sample_is_shuffled_anew(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """RULER shuffles by one fixed seed, so the answers stand in the same slots in every sample."""
    slots = [build(tokenizer, name, 2048, sample=i).evidence_spans[:20] for i in range(4)]
    assert len(set(slots)) == 4


def test_same_seed_gives_the_same_bytes_on_every_machine(gpt2_like: PreTrainedTokenizerFast) -> None:
    """Pinned hashes: a change of word list, generator or Python must not pass unnoticed.

    On a tokenizer that never changes: how many words a length holds depends on it.
    """
    made = {name: build(gpt2_like, name, 12_000, sample=3, seed=7).prompt_sha256[:16] for name in RULER}
    assert made == PINNED
    for name in RULER:
        assert build(gpt2_like, name, 12_000, sample=3, seed=8).prompt_sha256[:16] != made[name]
        assert build(gpt2_like, name, 12_000, sample=4, seed=7).prompt_sha256[:16] != made[name]


PINNED = {"vt": "f8d52c7b62a2b9bb", "cwe": "429b6ef770478ec9", "fwe": "de1a0815b043f6f7"}


def test_ruler_wording(tokenizer: PreTrainedTokenizerFast) -> None:
    vt, cwe, fwe = (build(tokenizer, name, 1024).text for name in RULER)
    assert vt.startswith("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n")
    assert re.search(r"5 variables are assigned the value \d{5}, they are:$", vt)
    assert cwe.startswith("Below is a numbered list of words. In these words, some appear more often than others.")
    assert cwe.endswith("Answer: The top 10 words that appear most often in the list are:")
    assert fwe.startswith("Read the following coded text and track the frequency of each coded word.")
    assert fwe.endswith("the three most frequently appeared words are:")


@pytest.mark.parametrize("name", RULER)
def test_other_tokenizers_get_exact_prompts_too(gpt2_like: PreTrainedTokenizerFast, name: str) -> None:
    task = create_task(name)
    length = max(8192, task.min_length_tokens(gpt2_like))
    for i in range(3):
        sample = task.build(gpt2_like, length_tokens=length + i, sample=i, seed=0)
        assert len(sample.ids) + task.max_new_tokens == length + i


@pytest.mark.parametrize("name", ["cwe", "fwe"])
def test_a_tokenizer_that_joins_lines_or_words_gets_exact_prompts_too(
    line_joining: PreTrainedTokenizerFast, name: str
) -> None:
    sample = build(line_joining, name, 8192)
    assert len(sample.ids) + sample.max_new_tokens == 8192


@pytest.mark.parametrize("name", RULER)
def test_smallest_length_works_and_a_smaller_one_says_so(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    task = create_task(name)
    least = task.min_length_tokens(tokenizer)
    assert least <= 1024
    for i in range(50):
        assert len(task.build(tokenizer, length_tokens=least, sample=i, seed=0).ids) == least - task.max_new_tokens
    with pytest.raises(UsageError, match=f"{name} at length 300.*too small.*larger --length"):
        task.build(tokenizer, length_tokens=300, sample=0, seed=0)


def test_long_lists_fit_from_the_length_they_begin_at(
    tokenizer: PreTrainedTokenizerFast, gpt2_like: PreTrainedTokenizerFast
) -> None:
    for one in (tokenizer, gpt2_like):
        task = CommonWordsTask("cwe")
        length = max(4096, task.min_length_tokens(one))
        for i in range(10):
            task.build(one, length_tokens=length, sample=i, seed=1)


@pytest.mark.parametrize("name", RULER)
def test_score_is_the_share_of_targets_found(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    task, sample = create_task(name), build(tokenizer, name, 1024)
    n = len(sample.targets)
    assert task.score(sample, " " + ", ".join(sample.targets).upper()) == 1.0
    assert task.score(sample, f"1. {sample.targets[0]}\n2. nothing") == pytest.approx(1 / n)
    assert task.score(sample, "") == 0.0


@pytest.mark.parametrize("name", RULER)
def test_answers_have_room(tokenizer: PreTrainedTokenizerFast, gpt2_like: PreTrainedTokenizerFast, name: str) -> None:
    """The expected answer fits its room, on a tokenizer that spells names letter by letter, too."""
    sample = build(tokenizer, name, 1024)
    spoken = " " + ", ".join(sample.targets)
    if name == "vt":
        spoken = "".join(f" VAR {target}," for target in sample.targets)
        assert len(gpt2_like(spoken)["input_ids"]) <= sample.max_new_tokens
    assert len(tokenizer(spoken, add_special_tokens=False)["input_ids"]) < sample.max_new_tokens


@pytest.mark.parametrize("name", RULER)
def test_they_take_no_options(name: str) -> None:
    with pytest.raises(UsageError, match="has no options, so 'data' cannot be set"):
        create_task(name, data="x.txt")
