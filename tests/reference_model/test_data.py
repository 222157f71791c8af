"""Training data: reproducible, canonical, disjoint from evaluation; a tiny model learns from it."""

import hashlib
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import no_file_over
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kvscope.errors import EnvironmentProblem
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.reference_model import templates
from kvscope.harness.reference_model.architecture import WINDOW_TOKENS, reference_config
from kvscope.harness.reference_model.curriculum import Phase, Shape
from kvscope.harness.reference_model.data import Batch, PhaseData, batches
from kvscope.harness.reference_model.documents import Document
from kvscope.harness.reference_model.phases import PHASES
from kvscope.harness.reference_model.pieces import Pieces
from kvscope.harness.reference_model.row_maker import RowMaker
from kvscope.harness.reference_model.tokenizer import VOCAB_TOKENS, save_tokenizer, write_tokenizer
from kvscope.harness.reference_model.train import document_makers, train
from kvscope.tasks.draws import Draws
from kvscope.tasks.needle import SPECS
from kvscope.tasks.registry import create_task
from kvscope.tasks.words import words

SHAPE = Shape(tokens=512, rows=2, questions=6)
PHASE = Phase(name="test", shapes=(SHAPE,), steps=3, lr=(1e-3, 1e-3))
DOCUMENTS = Phase(
    name="documents", shapes=(Shape(tokens=2048, rows=8, questions=12),), steps=3, lr=(1e-3, 1e-3),
    documents=(("long_qa", 0.25), ("vt", 0.25), ("cwe", 0.25), ("fwe", 0.25)),
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The shipped tokenizer; a test below trains it anew and compares."""
    return PreTrainedTokenizerFast.from_pretrained(REFERENCE_MODEL_FOLDER)


@pytest.fixture(scope="module")
def maker(tokenizer: PreTrainedTokenizerFast) -> RowMaker:
    return RowMaker(Pieces(tokenizer), document_makers())


@pytest.mark.slow
def test_tokenizer_training_gives_the_shipped_files(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    for name in TOKENIZER_FILES:
        assert (tmp_path / name).read_bytes() == (REFERENCE_MODEL_FOLDER / name).read_bytes()


@pytest.mark.parametrize("most_bytes", [100, 100_000])
def test_a_tokenizer_that_does_not_fit_is_a_sentence_and_leaves_no_half(
    tokenizer: PreTrainedTokenizerFast, most_bytes: int, tmp_path: Path
) -> None:
    with no_file_over(most_bytes), pytest.raises(EnvironmentProblem, match="could not be written"):
        write_tokenizer(tokenizer, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_values_are_few_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    def size(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert all(size(f"{n:03d}") == 1 for n in range(1000))
    assert size("1234567") == 3
    draws = Draws("uuid")
    assert {size(" " + draws.uuid()) for _ in range(200)} == {21}


def test_rows_are_canonical_text(tokenizer: PreTrainedTokenizerFast, maker: RowMaker) -> None:
    """Pieces joined on the fast path are the tokens the tokenizer gives for the text (random-piece keys apart)."""
    pieces = maker.pieces
    for i in range(300):
        draws = Draws("canonical", i)
        key_kind, value_kind = maker.needle_rows.kinds(draws)
        if key_kind == "pieces":
            continue
        key, value = maker.needle_rows.key(key_kind, draws, []), maker.needle_rows.value(value_kind, draws)
        form = draws.pick(templates.NEEDLES)
        ids = pieces.render(form, draws, kind=draws.pick(templates.TYPES), fill={"key": key, "value": value})
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids
        line = pieces.filler_line(draws)
        assert tokenizer(tokenizer.decode(line), add_special_tokens=False)["input_ids"] == line


def test_answers_stand_in_the_haystack(tokenizer: PreTrainedTokenizerFast, maker: RowMaker) -> None:
    checked = 0
    for i in range(40):
        row = maker.needle_rows.make(PHASE, SHAPE, Draws("answers", i))
        if row is None:
            continue  # a row of recall instead
        scored = [row.ids[at + 1] for at in row.answer_at]
        answers = tokenizer.decode(scored, skip_special_tokens=False).split("<|eos|>")[:-1]
        body = tokenizer.decode(row.ids[: row.answer_at[0]])
        for answer in answers:
            for part in answer.split(","):
                assert part.rpartition(":")[2].strip() in body
                checked += 1
    assert checked > 60


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_every_phase_makes_full_rows_with_answers(maker: RowMaker, phase: Phase) -> None:
    for shape in phase.shapes:
        row = maker.make(phase, shape, Draws("rows", phase.name, shape.tokens))
        assert len(row.ids) == shape.tokens
        assert row.answer_at
        assert 0 <= min(row.answer_at) <= max(row.answer_at) < shape.tokens - 1


def digest(batch: Batch) -> str:
    """Of a batch's tokens and of the places that carry loss."""
    return hashlib.sha256(batch.ids_BT.numpy().tobytes() + batch.at_N.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("phase", "pinned"), [(PHASE, "0a367c9d27449f3f"), (DOCUMENTS, "f04f307b1210fca9")], ids=["needles", "documents"]
)
def test_batches_regenerate_byte_for_byte(maker: RowMaker, phase: Phase, pinned: str) -> None:
    batch = PhaseData(maker, phase, seed=5)[2]
    assert digest(batch) == pinned
    later = list(batches(PhaseData(maker, phase, seed=5), workers=0))
    assert torch.equal(later[2].ids_BT, batch.ids_BT)
    assert torch.equal(later[2].at_N, batch.at_N)
    assert torch.equal(later[2].targets_N, batch.targets_N)
    assert not torch.equal(PhaseData(maker, phase, seed=6)[2].ids_BT, batch.ids_BT)


@pytest.mark.parametrize("family", [name for name, _ in DOCUMENTS.documents])
def test_document_rows_score_the_answers_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, maker: RowMaker, family: str
) -> None:
    """What is scored is, question by question, the document's own answers and the end of the sentence."""
    made: list[Document] = []

    def keep(*args: Any, **kwargs: Any) -> Document:
        made.append(document_makers()[family](*args, **kwargs))
        return made[-1]

    recording = RowMaker(maker.pieces, {family: keep})
    shape = Shape(tokens=1024, rows=1, questions=6)
    for seed in range(4):
        row = recording.make(replace(DOCUMENTS, documents=((family, 1.0),)), shape, Draws("rows", family, seed))
        assert len(row.ids) == 1024
        scored = tokenizer.decode([row.ids[at + 1] for at in row.answer_at])
        answers = scored.split("<|eos|>")[:-1]
        assert answers == [question.answer for question in made[-1].questions][: len(answers)]
        text = tokenizer.decode(row.ids)
        assert "".join(made[-1].lines) in text
        for question in made[-1].questions[: len(answers)]:
            assert question.prompt + question.answer + "<|eos|>" in text


def test_wording_and_names_are_disjoint_from_evaluation(tokenizer: PreTrainedTokenizerFast, maker: RowMaker) -> None:
    questions = (part for pair in (*templates.QUESTIONS_ONE, *templates.QUESTIONS_MANY) for part in pair)
    wording = "\n".join((*templates.NEEDLES, *templates.HEADS, *templates.FILLERS, *questions))
    for phrase in ("special magic", "mentioned in the provided text", "Make sure to memorize", "I will quiz you"):
        assert phrase not in wording
    for name, spec in SPECS.items():
        if spec.haystack == "essay":
            continue
        sample = create_task(name).build(tokenizer, length_tokens=1024, sample=0, seed=0)
        evidence = [tokenizer.decode(sample.ids[a:b]) for a, b in sample.evidence_spans]
        assert not any(line in wording for line in evidence)
    assert set(maker.pieces.nouns) == set(words("train").nouns)
    assert not set(maker.pieces.nouns) & set(words("eval").nouns)


@pytest.mark.slow
def test_a_tiny_variant_learns_and_resumes(tmp_path: Path) -> None:
    """Some seconds on a CPU: the loss falls by a nat, the checkpoint loads with the stock classes and goes on."""
    shape = Shape(tokens=2 * WINDOW_TOKENS, rows=4, questions=4)  # longer than the local layers see
    phase = Phase(name="tiny", shapes=(shape,), steps=28, lr=(1.5e-2, 1.5e-2))
    config = reference_config(layers=4, hidden=128)
    (tmp_path / "a").mkdir()
    for name in TOKENIZER_FILES:  # one found in the folder is not trained again
        shutil.copy(REFERENCE_MODEL_FOLDER / name, tmp_path / "a" / name)
    first = train(out=tmp_path / "a", phases=(phase,), seed=1, config=config)
    untrained = math.log(VOCAB_TOKENS)
    end = first.history[-1]["loss"][shape.tokens]
    assert end < untrained - 1, f"loss stayed at {end}"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(model).__name__ == "AfmoeForCausalLM"
    assert model.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("x")["input_ids"][0] == 1
    second = train(
        out=tmp_path / "b", phases=(replace(phase, steps=2),), resume=tmp_path / "a", seed=1,
        config=reference_config(layers=4, hidden=128),
    )  # fmt: skip
    assert [entry["steps_done"] for entry in second.history] == [28, 2]
    assert second.history[-1]["loss"][shape.tokens] < untrained - 1, "the resumed run starts from the checkpoint"
