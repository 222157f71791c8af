"""Composed training wording: complete slots, no sentence of evaluation, every word of evaluation, no answer words."""

import re
from collections.abc import Iterator

import pytest

from kvscope.harness.reference_model.documents_long_qa_templates import TRAIN_WORDING
from kvscope.harness.reference_model.wording_composed import barred, composed_wording, expand
from kvscope.harness.reference_model.wording_parts import FACTS
from kvscope.harness.reference_model.wording_questions import QUESTIONS
from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.lexicon import category_of
from kvscope.tasks.long_qa.templates import EVAL_WORDING
from kvscope.tasks.long_qa.wording import Wording


def groups(wording: Wording) -> Iterator[tuple[str, tuple[str, ...]]]:
    for field, value in vars(wording).items():
        if isinstance(value, dict):
            for slot, texts in value.items():
                yield f"{field} {slot}", texts
        else:
            yield field, value


def slots(texts: tuple[str, ...]) -> set[str]:
    return {slot for text in texts for slot in re.findall(r"\{(\w+)\}", text)}


def test_many_whole_sentences_with_the_slots_of_evaluation() -> None:
    evaluation = dict(groups(EVAL_WORDING))
    for name, texts in groups(composed_wording()):
        if name.split()[0] in (*FACTS, *QUESTIONS):
            assert len(set(texts)) == len(texts) >= (19 if name == "note" else 40), name
        for text in texts:
            assert name == "request" or not re.search(r"[<>|]|  | [,.?;]|\{p\}\{|^ | $", text), text
            if name not in ("small_talk", "visits"):
                assert slots((text,)) == slots(evaluation[name]) or name in ("heads", "sessions"), text
            assert text.endswith("\n") == evaluation[name][0].endswith("\n"), text


def test_no_sentence_of_evaluation_is_in_training_or_holds_one() -> None:
    assert barred("We heard that {p} always eats up the {v} again.")
    assert not barred("We heard that {p} always eats up all the {v} again.")
    fresh = [name for name, _ in groups(composed_wording()) if name.split()[0] in (*FACTS, *QUESTIONS)]
    kept = (*TRAIN_WORDING.small_talk, *TRAIN_WORDING.heads)
    for name, texts in groups(composed_wording()):
        if name in fresh:
            assert not [text for text in texts if barred(text) and text not in kept], name


def test_no_sentence_is_the_common_wording_filled_with_an_answer() -> None:
    words = {w for _, texts in groups(composed_wording()) for t in texts for w in re.findall("[a-z]+", t.lower())}
    assert not words & set(category_of())


def test_the_same_seed_gives_the_same_sentences() -> None:
    pattern = "<pre> {p} <always|never|> eats <up|> <det> {v} <tail>"
    first = [expand(pattern, draws) for draws in [Draws("expand")] for _ in range(20)]
    assert first == [expand(pattern, draws) for draws in [Draws("expand")] for _ in range(20)]
    assert len(set(first)) > 15


@pytest.mark.parametrize("slot", ["home", "food", "clothes"])
def test_the_value_stands_in_many_places(slot: str) -> None:
    """Neither the words before a value nor those after it tell where it stands."""
    texts = composed_wording().clauses[slot]
    before = {text.split("{v}")[0].split()[-1] for text in texts if text.split("{v}")[0].strip()}
    after = {text.split("{v}")[1].split()[0] for text in texts if text.split("{v}")[1].strip()}
    assert len(before) >= 5
    assert len(after) >= 12
