"""long_qa: exact lengths, balanced types, letters and depths, the same bytes everywhere, scores, clear errors."""

from collections import Counter

import pytest
from exact_prompt import assert_exact
from transformers import PreTrainedTokenizerFast

from kvscope.errors import UsageError
from kvscope.tasks.base import Sample
from kvscope.tasks.long_qa.guards import question_text
from kvscope.tasks.long_qa.lexicon import ALL, CATEGORIES, category_of, chatter, day_of_date, lexicon
from kvscope.tasks.long_qa.questions import PLANNERS, POOLED
from kvscope.tasks.long_qa.score import score_answer
from kvscope.tasks.long_qa.task import DEPTH_PARTS, RECENCY_TOKENS, SINK_TOKENS, recency_tokens
from kvscope.tasks.registry import create_task

NAMES = ("long_qa", "long_qa_no_context", "long_qa_mrcr")


def build(tokenizer: PreTrainedTokenizerFast, name: str, length: int, sample: int = 0, seed: int = 0) -> Sample:
    task, _, types = name.partition(":")
    made = create_task(task, types=types) if types else create_task(task)
    return made.build(tokenizer, length_tokens=length, sample=sample, seed=seed)


@pytest.mark.parametrize("length", [3000, 3001, 4096])
@pytest.mark.parametrize("name", [*NAMES, *(f"long_qa:{kind}" for kind in POOLED)])
def test_length_is_exact_and_text_is_the_same_prompt(
    tokenizer: PreTrainedTokenizerFast, name: str, length: int
) -> None:
    for i in range(2):
        sample = build(tokenizer, name, length, i)
        assert_exact(tokenizer, sample, length)
        assert tokenizer.decode(sample.ids[sample.question_start :]) == question_text(sample)
        assert question_text(sample).startswith("Question: ")
        assert question_text(sample).endswith(" Answer:")


def test_every_block_of_samples_has_each_type_once(tokenizer: PreTrainedTokenizerFast) -> None:
    for block in range(3):
        types = [build(tokenizer, "long_qa", 1024, 9 * block + i).question_type for i in range(9)]
        assert sorted(types) == sorted(POOLED)
    assert create_task("long_qa").question_types == POOLED
    assert set(PLANNERS) - set(POOLED) == {"no_context", "mrcr"}


@pytest.mark.parametrize("kind", [kind for kind in POOLED if kind != "abstention"])
def test_ten_samples_of_a_type_cover_the_ten_depth_parts(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """The deciding evidence is stratified; of several pieces the others are drawn."""
    length = 8192
    task = create_task("long_qa", types=kind)
    parts = []
    for i in range(DEPTH_PARTS):
        sample = task.build(tokenizer, length_tokens=length, sample=i, seed=5)
        assert sample.depth is not None
        assert 0 <= sample.depth <= 1
        haystack = range(SINK_TOKENS, len(sample.ids) - recency_tokens(len(sample.ids)))
        # A chain is decided by its last link; dates, visits and journeys by the first one asked for.
        said = sample.targets[-1 if kind.startswith("hops") else 0]
        deciding = [
            start for start, end in sample.evidence_spans if f"{said}" in tokenizer.decode(sample.ids[start:end])
        ]
        assert deciding, "the deciding part of the answer stands in the evidence"
        parts.append(DEPTH_PARTS * (deciding[0] - haystack.start) / len(haystack))
    # The sessions' lines shift a depth by less than half a part.
    assert sorted(round(part - 0.5) for part in parts) == pytest.approx(range(DEPTH_PARTS), abs=1)
    assert len({int(part) for part in parts}) >= DEPTH_PARTS - 1


@pytest.mark.parametrize("length", [1024, 4096, 9000])  # the last has a window of more than RECENCY_TOKENS
@pytest.mark.parametrize("name", ["long_qa", "long_qa_mrcr"])
def test_evidence_is_outside_sink_and_recency_window(
    tokenizer: PreTrainedTokenizerFast, name: str, length: int
) -> None:
    length = max(length, create_task(name).min_length_tokens(tokenizer))
    for i in range(2 * len(POOLED)):
        sample = build(tokenizer, name, length, i, seed=2)
        for start, end in sample.evidence_spans:
            assert start >= SINK_TOKENS
            assert end <= len(sample.ids) - max(RECENCY_TOKENS, len(sample.ids) // 64)
            assert end > start


def test_letters_are_balanced(tokenizer: PreTrainedTokenizerFast) -> None:
    made = [build(tokenizer, "long_qa:multiple_choice", 640, i) for i in range(40)]
    assert Counter(sample.targets[-1] for sample in made) == dict.fromkeys("ABCD", 10)
    for sample in made:
        haystack, question = sample.text[: -len(question_text(sample))], question_text(sample)
        choices = question.split("(A) ")[1].split(". Say")[0]
        for choice in choices.replace("(B)", "").replace("(C)", "").replace("(D)", "").split():
            assert f"{choice}" in haystack, "every choice must stand in the text"


def test_orders_and_counts_are_balanced(tokenizer: PreTrainedTokenizerFast) -> None:
    first = Counter[bool]()
    counts = Counter[str]()
    for i in range(36):
        sample = build(tokenizer, "long_qa:temporal", 640, i)
        if "earlier" in question_text(sample):
            first[day_of_date(sample.targets[0]) < day_of_date(sample.targets[1])] += 1
        sample = build(tokenizer, "long_qa:multi_session", 640, i)
        if sample.targets[-1].endswith("times"):
            counts[sample.targets[-1]] += 1
            assert len(set(sample.targets)) == len(sample.evidence_spans) + 1
    assert first == {True: 6, False: 6}
    assert counts == {"2 times": 6, "3 times": 6, "4 times": 6}


def test_the_stale_value_stands_before_the_new_one(tokenizer: PreTrainedTokenizerFast) -> None:
    for i in range(10):
        sample = build(tokenizer, "long_qa:knowledge_update", 1024, i)
        start = sample.evidence_spans[0][0]
        evidence = tokenizer.decode(sample.ids[start : sample.evidence_spans[0][1]])
        assert "change" in evidence.lower()
        assert sample.targets[0] in evidence
        assert sample.targets[0] not in tokenizer.decode(sample.ids[:start])


def test_replies_are_longer_than_a_refresh_and_fit_their_room(tokenizer: PreTrainedTokenizerFast) -> None:
    seen = set()
    for i in range(12):
        sample = build(tokenizer, "long_qa_mrcr", 4096, i)
        answer = len(tokenizer(" " + sample.targets[0], add_special_tokens=False)["input_ids"])
        assert 64 < answer < sample.max_new_tokens
        topic = question_text(sample).rsplit(" ", 2)[1].strip(".")
        seen.add(sample.text.count(f"User: Please write some lines about the {topic}.\n"))
    assert seen == {2, 4, 8}


def test_same_seed_gives_the_same_bytes_on_every_machine(gpt2_like: PreTrainedTokenizerFast) -> None:
    """Pinned hashes: a change of word list, wording, simulator or Python must not pass unnoticed.

    The tokenizer is a fixed one, not the reference model's, which may be trained anew.
    """
    names = [*NAMES, *(f"long_qa:{kind}" for kind in POOLED)]
    made = {name: build(gpt2_like, name, 8192, sample=3, seed=7).prompt_sha256[:16] for name in names}
    assert made == PINNED
    assert build(gpt2_like, "long_qa", 8192, sample=3, seed=8).prompt_sha256[:16] != made["long_qa"]
    assert build(gpt2_like, "long_qa", 8192, sample=4, seed=7).prompt_sha256[:16] != made["long_qa"]


PINNED = {
    "long_qa": "c388062787de9efa",
    "long_qa_no_context": "f9c1df51ccfcd4fb",
    "long_qa_mrcr": "7c25d75072f2b255",
    "long_qa:single_fact": "8c8ffa6b909b3794",
    "long_qa:assistant_fact": "eec39c2c31ef1ce9",
    "long_qa:knowledge_update": "eb4c4e4056565f1b",
    "long_qa:temporal": "852f013db21b88f8",
    "long_qa:multi_session": "9d170744e387a47a",
    "long_qa:hops_2": "4a158b839738632b",
    "long_qa:hops_3": "e08a78c0005fd563",
    "long_qa:abstention": "d9fb202c942f60d4",
    "long_qa:multiple_choice": "675a3de79c23984b",
}


def test_splits_share_no_word_and_are_large_enough() -> None:
    for category in CATEGORIES:
        train, held_out = lexicon("train")[category], lexicon("eval")[category]
        assert not set(train) & set(held_out)
        assert set(train) | set(held_out) == set(ALL[category])
        assert len(train) >= 16
        assert len(held_out) >= 16
    everything = [word.lower() for words in ALL.values() for word in words]
    assert len(everything) == len(set(everything)), "a word must belong to one category"
    for split in ("train", "eval"):
        adjectives, nouns = chatter(split)  # type: ignore[arg-type]
        assert not {*adjectives, *nouns} & set(category_of())


@pytest.mark.parametrize(
    ("kind", "targets", "output", "score"),
    [
        ("single_fact", ("Oslo",), " Oslo.", 1),
        ("single_fact", ("Oslo",), " She lives in OSLO, not in Lima.", 1),
        ("single_fact", ("Oslo",), " Lima, then Oslo", 0),
        ("single_fact", ("Oslo",), "", 0),
        ("single_fact", ("Oslo",), " not mentioned", 0),
        ("hops_3", ("Adele", "Hugo", "cocoa"), " Adele, Hugo, cocoa", 1),
        ("hops_3", ("Adele", "Hugo", "cocoa"), " cocoa", 1),
        ("hops_3", ("Adele", "Hugo", "cocoa"), " Hugo, Adele, rum", 0),
        ("temporal", ("3 June", "9 July", "wedding"), " 3 June, 9 July, wedding", 1),
        ("temporal", ("3 June", "9 July", "wedding"), " 3 June, 9 July, the picnic before the wedding", 0),
        ("temporal", ("3 June", "9 June", "6 days"), " 3 June, 9 June, 6 days", 1),
        ("temporal", ("3 June", "9 June", "6 days"), " 6", 1),
        ("temporal", ("3 June", "9 June", "6 days"), " 3 June, 6 June, 3 days", 0),
        ("temporal", ("3 June", "9 June", "6 days"), " 3 June, 9 June, 16 days", 0),
        ("temporal", ("3 June", "9 July", "3 June", "wedding"), " 3 June, 9 July, 3 June, wedding", 1),
        ("multi_session", ("3 June", "9 July", "2 times"), " 3 June, 9 July, 2 times", 1),
        ("multi_session", ("3 June", "9 July", "2 times"), " 2", 1),
        ("multi_session", ("3 June", "9 July", "2 times"), " 3 June, 9 July, 9 July, 3 times", 0),
        ("multi_session", ("3 June", "9 July", "2 times"), " 3 times, no, 2", 0),
        ("multi_session", ("Oslo", "Lima"), " Lima and Oslo", 1),
        ("multi_session", ("Oslo", "Lima"), " Lima", 0),
        ("multi_session", ("Oslo", "Lima"), " Lima, Oslo, Bern, Dublin", 0),
        ("abstention", ("not mentioned",), " Not mentioned.", 1),
        ("abstention", ("not mentioned",), " Oslo", 0),
        ("multiple_choice", ("rum", "B"), " rum, B", 1),
        ("multiple_choice", ("rum", "B"), " B", 1),
        ("multiple_choice", ("rum", "B"), " (B)", 1),
        ("multiple_choice", ("rum", "B"), " rum, b", 0),
        ("multiple_choice", ("rum", "B"), " A or B", 0),
        ("mrcr", ("a b c d",), " a b c d", 1),
        ("mrcr", ("a b c d",), " a b x d", 0.75),
        ("mrcr", ("a b c d",), "", 0),
    ],
)
def test_scores(kind: str, targets: tuple[str, ...], output: str, score: float) -> None:
    assert score_answer(kind, targets, output) == score


@pytest.mark.parametrize("kind", list(PLANNERS))
def test_the_expected_answer_scores_one(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    name = {"no_context": "long_qa_no_context", "mrcr": "long_qa_mrcr"}.get(kind, f"long_qa:{kind}")
    for i in range(6):
        sample = build(tokenizer, name, 4096, i)
        assert create_task(name.split(":")[0]).score(sample, " " + ", ".join(sample.targets)) == 1
        room = len(tokenizer(" " + ", ".join(sample.targets), add_special_tokens=False)["input_ids"])
        assert room < sample.max_new_tokens


@pytest.mark.parametrize("name", NAMES)
def test_smallest_length_works_and_a_smaller_one_says_so(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    task = create_task(name)
    least = task.min_length_tokens(tokenizer)
    for i in range(36):
        assert len(task.build(tokenizer, length_tokens=least, sample=i, seed=0).ids) == least - task.max_new_tokens
    with pytest.raises(UsageError, match=rf"{name} at length .*too small.*larger --length"):
        task.build(tokenizer, length_tokens=task.max_new_tokens + 50, sample=0, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_other_tokenizers_get_exact_prompts_too(gpt2_like: PreTrainedTokenizerFast, name: str) -> None:
    task = create_task(name)
    length = max(4096, task.min_length_tokens(gpt2_like))
    sample = task.build(gpt2_like, length_tokens=length, sample=1, seed=0)
    assert len(sample.ids) + task.max_new_tokens == length


def test_type_option_says_what_is_wrong() -> None:
    assert create_task("long_qa", types="hops_2+hops_3").question_types == ("hops_2", "hops_3")
    with pytest.raises(UsageError, match=r"no question type 'hops_4'.*hops_"):
        create_task("long_qa", types="hops_4")
    with pytest.raises(UsageError, match="twice"):
        create_task("long_qa", types="hops_2+hops_2")
    with pytest.raises(UsageError, match="no question type 'mrcr'"):
        create_task("long_qa", types="mrcr")
    with pytest.raises(UsageError, match="has no options, so 'types' cannot be set"):
        create_task("long_qa_mrcr", types="mrcr")
