"""Guards of long_qa that need no model: the text answers, a part of it does not, wording differs, nothing leaks."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable
from functools import cache

import pytest
from transformers import PreTrainedTokenizerFast

from kvscope.harness.reference_model.documents_long_qa_templates import TRAIN_WORDING
from kvscope.harness.reference_model.wording_composed import composed_wording
from kvscope.tasks.base import Sample
from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.guards import (
    chance,
    closed_book_text,
    contradictions,
    haystack,
    oracle_text,
    question_text,
    recency_reader,
    violations,
)
from kvscope.tasks.long_qa.lexicon import MONTHS, category_of, lexicon
from kvscope.tasks.long_qa.questions import PLANNERS, POOLED
from kvscope.tasks.long_qa.reader import Reader
from kvscope.tasks.long_qa.templates import EVAL_WORDING
from kvscope.tasks.long_qa.wording import Wording
from kvscope.tasks.long_qa.world import Fact, World
from kvscope.tasks.registry import create_task

TASK_OF = {"no_context": "long_qa_no_context", "mrcr": "long_qa_mrcr"}
# Words of grammar, and of the questions' instructions.
_COMMON = {
    "the",
    "a",
    "of",
    "is",
    "in",
    "on",
    "to",
    "for",
    "with",
    "and",
    "what",
    "which",
    "who",
    "does",
    "did",
    "has",
    "have",
    "was",
    "by",
    "it",
    "as",
    "at",
    "where",
    "that",
    "from",
    "one",
    "please",
}


@cache
def built(tokenizer: PreTrainedTokenizerFast, kind: str, length: int, index: int) -> Sample:
    """One prompt; all tests of a kind look at the same ones."""
    task = create_task(TASK_OF[kind]) if kind in TASK_OF else create_task("long_qa", types=kind)
    return task.build(tokenizer, length_tokens=length, sample=index, seed=11)


def samples(tokenizer: PreTrainedTokenizerFast, kind: str, count: int, *, length: int = 4096) -> list[Sample]:
    return [built(tokenizer, kind, length, index) for index in range(count)]


@pytest.mark.parametrize("kind", list(PLANNERS))
def test_the_text_alone_answers_and_nothing_leaks(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """Every line parses, the facts agree, the answer stands in the evidence alone, evidence alone suffices."""
    for sample in samples(tokenizer, kind, 12):
        assert violations(sample, tokenizer) == []


def test_a_long_haystack_neither_contradicts_itself_nor_leaks(tokenizer: PreTrainedTokenizerFast) -> None:
    """Filler repeats itself at this length, after changes too."""
    (sample,) = samples(tokenizer, "hops_3", 1, length=40_000)
    assert violations(sample, tokenizer) == []
    kinds = {line.fact.kind for line in haystack(sample) if line.fact is not None}
    assert kinds == {"attribute", "changed", "dated", "relation", "appointment", "visit", "trip", "advice"}


def test_the_check_sees_what_it_should(tokenizer: PreTrainedTokenizerFast) -> None:
    (sample,) = samples(tokenizer, "single_fact", 1, length=1024)
    answer, question = sample.targets[0], question_text(sample)
    first = sample.text.split("\n")[2]

    def with_line(line: str) -> list[str]:
        text = sample.text.replace(first, f"{first}\n{line}")
        ids = tuple(tokenizer(text)["input_ids"])
        shift = len(ids) - len(sample.ids)
        spans = tuple((start + shift, end + shift) for start, end in sample.evidence_spans)
        return violations(dataclasses.replace(sample, text=text, ids=ids, evidence_spans=spans), tokenizer)

    assert with_line(first) == []
    assert any("unknown line" in problem for problem in with_line("Nobody wrote this sentence."))
    assert any("outside the evidence" in problem for problem in with_line(f"They laughed a lot at the {answer} roof."))
    fact = next(line.fact for line in haystack(sample) if line.fact is not None and line.fact.value == answer)
    wrong = next(v for v in lexicon("eval")[category_of()[answer.lower()]] if v != answer)
    clause = EVAL_WORDING.clauses[fact.slot][0].format(p=fact.person, v=wrong)
    assert any("after" in problem for problem in with_line(f"I noted that {clause}."))
    other = dataclasses.replace(sample, targets=(wrong,))
    assert any("the haystack says" in problem for problem in violations(other, tokenizer))
    assert question.count(answer) == 0


def test_contradictions_are_facts_that_deny_an_earlier_one() -> None:
    home = Fact("attribute", "Ida", "home", "Oslo")
    assert contradictions([home, home, Fact("attribute", "Ida", "job", "poet")]) == []
    assert contradictions([home, dataclasses.replace(home, value="Lima")]) != []
    moved = Fact("changed", "Ida", "home", "Lima")
    assert contradictions([home, moved, dataclasses.replace(home, value="Lima")]) == []
    assert contradictions([home, moved, home]) != []


@pytest.mark.parametrize("kind", [kind for kind in POOLED if kind != "abstention"])
def test_a_recency_window_does_not_answer(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """A perfect reader of the last 1/16 of the prompt is far below a perfect reader of all of it."""
    task = create_task("long_qa")
    right = 0.0
    made = samples(tokenizer, kind, 20)
    for sample in made:
        reader = recency_reader(sample, tokenizer, keep_tokens=len(sample.ids) // 16)
        right += task.score(sample, ", ".join(reader.answer(question_text(sample))))
    assert right / len(made) <= 0.25


@pytest.mark.parametrize("kind", [kind for kind in POOLED if kind != "abstention"])
def test_a_random_tenth_of_the_lines_does_not_answer(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    task, draws = create_task("long_qa"), Draws("random tenth", kind)
    right = 0.0
    made = samples(tokenizer, kind, 20)
    for sample in made:
        kept = [line.fact for line in haystack(sample) if line.fact is not None and draws.unit() < 0.1]
        right += task.score(sample, ", ".join(Reader(kept).answer(question_text(sample))))
    assert right / len(made) <= 0.35


@pytest.mark.parametrize("kind", POOLED)
def test_a_constant_guess_earns_no_more_than_chance(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """The best constant answer over 60 samples, or the one that can be read off the question, is near chance."""
    task = create_task("long_qa")
    made = samples(tokenizer, kind, 60, length=640)
    earned: dict[str, float] = defaultdict(float)
    for sample in made:
        guesses = {sample.targets[-1] for sample in made} | {"first choice"}
        for guess in guesses:
            said = guess
            if guess == "first choice":
                named = [w for w in re.findall("[a-z]+", question_text(sample)) if category_of().get(w) == "event"]
                said = named[0] if named else guess
            earned[guess] += task.score(sample, said)
    best = max(earned.values()) / len(made)
    # The best of many constant answers is above the mean answer by luck: three more of 60.
    assert best <= chance(kind) + 0.1
    if kind in ("multiple_choice", "abstention"):
        assert best == chance(kind)


def test_every_type_has_a_chance_level() -> None:
    assert all(0 <= chance(kind) <= 1 for kind in PLANNERS)
    pooled = sum(map(chance, POOLED)) / len(POOLED)
    assert 0.15 < pooled < 0.25, "mostly what abstaining, choices and orders give"


def test_closed_book_and_oracle_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    (sample,) = samples(tokenizer, "hops_2", 1)
    closed, oracle = closed_book_text(sample), oracle_text(sample, tokenizer)
    assert closed.count("\n") == 1
    assert closed.endswith(question_text(sample))
    assert oracle.count("\n") == 3
    assert sample.targets[-1] not in closed
    assert all(target in oracle for target in sample.targets)


def _content(text: str) -> list[str]:
    plain = re.sub(r"\{\w+\}", "|", text).lower()
    return re.findall(r"[a-z]+|\|", plain)


# The composed one is made when its test runs: every process collects the tests.
@pytest.mark.parametrize(
    "wording_of", [lambda: EVAL_WORDING, lambda: TRAIN_WORDING, composed_wording], ids=["eval", "train", "composed"]
)
def test_questions_share_no_content_word_with_their_evidence(wording_of: Callable[[], Wording]) -> None:
    wording = wording_of()
    pairs = [(wording.clauses[slot], wording.ask[slot]) for slot in wording.clauses]
    pairs += [(wording.advice[topic], wording.suggested[topic]) for topic in wording.advice]
    pairs += [(wording.relations[name], (name,)) for name in wording.relations]
    pairs += [(wording.visits, wording.count), (wording.trips, wording.listing)]
    pairs += [(wording.appointments, wording.order), (wording.appointments, wording.between)]
    for stated, asked in pairs:
        said = {word for text in stated for word in _content(text)} - _COMMON - {"|", "assistant"}
        for question in asked:
            assert not said & set(_content(question)), (said & set(_content(question)), question)


@pytest.mark.parametrize("kind", POOLED)
def test_question_and_evidence_share_no_three_words_in_a_row(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """Two in a row at most, and then a name, place or date is one of them."""

    def grams(text: str, size: int) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

    months = {month.lower() for month in MONTHS}
    for sample in samples(tokenizer, kind, 8):
        question = question_text(sample)
        for start, end in sample.evidence_spans:
            evidence = tokenizer.decode(sample.ids[start:end])
            assert not grams(question, 3) & grams(evidence, 3)
            for gram in grams(question, 2) & grams(evidence, 2):
                assert any(word in category_of() or word in months for word in gram), gram


def test_wording_names_and_answers_are_disjoint_from_training(tokenizer: PreTrainedTokenizerFast) -> None:
    assert not set(EVAL_WORDING.strings()) & set(TRAIN_WORDING.strings())
    train = {word.lower() for words in lexicon("train").values() for word in words}
    for kind in POOLED:
        for sample in samples(tokenizer, kind, 3):
            assert not set(re.findall("[a-z]+", sample.text.lower())) & train


def test_template_words_are_no_answers() -> None:
    """Else an instruction or a clause could give an answer away or be taken for one."""
    for wording in (EVAL_WORDING, TRAIN_WORDING, composed_wording()):
        words = {word for text in wording.strings() for word in _content(text)}
        assert not words & set(category_of())


def test_evaluation_uses_no_word_that_training_never_shows() -> None:
    shown = {word for text in composed_wording().strings() for word in _content(text)}
    used = {word for text in EVAL_WORDING.strings() for word in _content(text)}
    assert not used - shown


def test_filler_is_silent_on_what_questions_claimed() -> None:
    draws = Draws("silence")
    world = World(lexicon("eval")["person"][:8], lexicon("eval"), unique=True)
    person = world.claim(draws, "home", "trip", "relation boss")
    town = world.value(draws, "town")
    said = [fact for fact in (world.filler(draws) for _ in range(6000)) if fact is not None]
    assert not [f for f in said if f.person == person and f.key[1] in ("home", "trip", "relation boss")]
    assert not [f for f in said if f.value == town]
    assert {f.key[1] for f in said if f.person == person} >= {"job", "relation coach", "advice tree"}
