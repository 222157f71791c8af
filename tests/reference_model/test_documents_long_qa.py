"""long_qa training documents: reproducible, within their room, answerable from their lines, nothing of evaluation."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
from transformers import PreTrainedTokenizerFast

from kvscope.harness.reference_model.documents import Document
from kvscope.harness.reference_model.documents_long_qa import (
    SHARES_1,
    SHARES_2,
    TRAIN_PLANNERS,
    LongQADocuments,
    blended_word,
    made_up_word,
)
from kvscope.harness.reference_model.documents_long_qa_templates import CORPUS_AS_OF, TRAIN_WORDING, static_text
from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.lexicon import chatter, day_of_date, lexicon
from kvscope.tasks.long_qa.questions import PLANNERS
from kvscope.tasks.long_qa.wording import NOT_MENTIONED

Count = Callable[[str], int]


@pytest.fixture(scope="module")
def count() -> Count:
    from transformers import AutoTokenizer

    from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER

    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    return cache(lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def make(count: Count, seed: int, room: int, questions: int, version: Literal[1, 2] = 2) -> Document:
    made = LongQADocuments(version=version)
    return made(Draws("doc", seed), room_tokens=room, n_questions=questions, count=count)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("room", "questions"), [(200, 4), (512, 16), (2048, 32), (8192, 64)])
def test_lines_fill_their_room(count: Count, room: int, questions: int, version: Literal[1, 2]) -> None:
    fill = []
    for seed in range(8):
        document = make(count, seed, room, questions, version)
        tokens = sum(map(count, document.lines))
        assert tokens <= room
        fill.append(tokens / room)
        assert 1 <= len(document.questions) <= questions
        assert all(line.endswith("\n") and line != "\n" for line in document.lines)
        for question in document.questions:
            assert question.prompt.startswith("Question: ")
            assert question.prompt.endswith(" Answer:")
            assert question.answer.startswith(" ")
            assert not question.answer.endswith(" ")
            assert "\n" not in question.prompt + question.answer
    assert sum(fill) / len(fill) > 0.85


def test_the_same_draws_give_the_same_document(count: Count) -> None:
    assert make(count, 3, 1024, 16) == make(count, 3, 1024, 16)
    assert make(count, 3, 1024, 16) != make(count, 4, 1024, 16)


@pytest.mark.parametrize("version", [1, 2])
def test_answers_stand_in_the_lines(count: Count, version: Literal[1, 2]) -> None:
    """Every part of an answer that is not counted, compared or lettered is a word of the document."""
    seen: Counter[str] = Counter()
    for seed in range(12):
        document = make(count, seed, 4096, 48, version)
        text = " ".join(document.lines)
        for question in document.questions:
            for part in question.answer.strip(" .").split(", "):
                if part == NOT_MENTIONED:
                    seen["abstention"] += 1
                elif re.fullmatch(r"\d+ times|\d+ days|[A-D]", part):
                    seen[part.split()[-1] if part[0].isdigit() else "letter"] += 1
                else:
                    assert re.search(rf"\b{re.escape(part)}\b", text + question.prompt, re.IGNORECASE), question
                    seen["word"] += 1
    assert min(seen[kind] for kind in ("abstention", "times", "days", "letter", "word")) > 5


def test_the_first_version_is_kept_byte_for_byte(count: Count) -> None:
    """Phases p1 to p3 of the shipped model were trained on it."""
    hashed = hashlib.sha256()
    for seed in range(4):
        document = make(count, seed, 2048, 32, version=1)
        hashed.update("".join(document.lines).encode())
        hashed.update("".join(q.prompt + q.answer for q in document.questions).encode())
    assert hashed.hexdigest()[:16] == FIRST_VERSION


FIRST_VERSION = "8f07601296a73200"


def test_the_second_version_asks_for_steps(count: Count) -> None:
    seen: Counter[str] = Counter()
    for seed in range(12):
        for question in make(count, seed, 4096, 48).questions:
            parts = question.answer.strip().split(", ")
            if parts[-1].endswith("times"):
                assert int(parts[-1].split()[0]) == len(set(parts)) - 1
                seen["count"] += 1
            elif len(parts) == 4 and all(day_of(part) is not None for part in parts[:3]):
                one, two, earlier = (day_of(part) for part in parts[:3])
                assert one is not None
                assert two is not None
                assert earlier == min(one, two)
                seen["order given" if parts[0] in question.prompt else "order"] += 1
            elif parts[-1].endswith("days"):
                one, two = day_of(parts[0]), day_of(parts[1])
                assert one is not None
                assert two is not None
                assert int(parts[-1].split()[0]) == abs(one - two)
                seen["days given" if parts[0] in question.prompt else "days"] += 1
    assert min(seen[kind] for kind in ("count", "order", "order given", "days", "days given")) > 3


def day_of(text: str) -> int | None:
    try:
        return day_of_date(text)
    except KeyError:
        return None


def test_every_type_is_trained(count: Count) -> None:
    assert set(SHARES_1) | {"mrcr"} == set(PLANNERS)
    assert set(SHARES_2) | {"mrcr"} == set(TRAIN_PLANNERS)
    replies = [q for seed in range(40) for q in make(count, seed, 2400, 4).questions if count(q.answer) > 64]
    assert replies
    assert all("reply" in question.prompt for question in replies)


@pytest.mark.parametrize("version", [1, 2])
def test_nothing_of_evaluation_is_in_the_documents(count: Count, version: Literal[1, 2]) -> None:
    held_out = {word.lower() for words in lexicon("eval").values() for word in words}
    shown = set()
    for seed in range(12):
        document = make(count, seed, 4096, 48, version)
        text = "".join(document.lines) + " ".join(q.prompt + q.answer for q in document.questions)
        shown |= set(re.findall("[a-z]+", text.lower()))
    assert not shown & held_out


def test_static_text_covers_the_wording_and_no_evaluation_word() -> None:
    text = static_text()
    assert "{" not in text
    # Templates that changed after the tokenizer was trained stand in its corpus as they were.
    for template in replace(TRAIN_WORDING, as_of=CORPUS_AS_OF).strings():
        assert max(re.split(r"\{\w+\}", template), key=len).strip() in text
    held_out = {word for words in lexicon("eval").values() for word in words}
    assert not set(re.findall("[A-Za-z]+", text)) & held_out


def test_made_up_words_vary() -> None:
    draws = Draws("made up")
    words = {made_up_word(draws) for _ in range(1000)}
    assert len(words) > 700
    assert all(re.fullmatch("[a-z]{2,21}", word) for word in words)
    blends = {blended_word(draws, chatter("train")[1]) for _ in range(1000)}
    assert len(blends) > 900
