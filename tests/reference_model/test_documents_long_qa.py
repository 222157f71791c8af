"""long_qa training documents: reproducible, within their room, answerable from their lines, nothing of evaluation."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from transformers import PreTrainedTokenizerFast

from kvscope.harness.reference_model.documents import Document
from kvscope.harness.reference_model.documents_long_qa import SHARES, LongQADocuments, made_up_word
from kvscope.harness.reference_model.documents_long_qa_templates import CORPUS_AS_OF, TRAIN_WORDING, static_text
from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.lexicon import lexicon
from kvscope.tasks.long_qa.questions import PLANNERS
from kvscope.tasks.long_qa.wording import NOT_MENTIONED

Count = Callable[[str], int]


@pytest.fixture(scope="module")
def count() -> Count:
    from transformers import AutoTokenizer

    from kvscope.harness.models import REFERENCE_MODEL_FOLDER

    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    return cache(lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def make(count: Count, seed: int, room: int, questions: int) -> Document:
    return LongQADocuments()(Draws("doc", seed), room_tokens=room, n_questions=questions, count=count)


@pytest.mark.parametrize(("room", "questions"), [(200, 4), (512, 16), (2048, 32), (8192, 64)])
def test_lines_fill_their_room(count: Count, room: int, questions: int) -> None:
    fill = []
    for seed in range(8):
        document = make(count, seed, room, questions)
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


def test_answers_stand_in_the_lines(count: Count) -> None:
    """Every part of an answer that is not counted, compared or lettered is a word of the document."""
    seen: Counter[str] = Counter()
    for seed in range(12):
        document = make(count, seed, 4096, 48)
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


def test_every_type_is_trained(count: Count) -> None:
    assert set(SHARES) | {"mrcr"} == set(PLANNERS)
    replies = [q for seed in range(40) for q in make(count, seed, 2400, 4).questions if count(q.answer) > 64]
    assert replies
    assert all("reply about" in question.prompt for question in replies)


def test_nothing_of_evaluation_is_in_the_documents(count: Count) -> None:
    held_out = {word.lower() for words in lexicon("eval").values() for word in words}
    shown = set()
    for seed in range(12):
        document = make(count, seed, 4096, 48)
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
