"""Training data: reproducible, canonical, disjoint from evaluation; a tiny model learns from it."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kvscope.harness.reference_model import templates
from kvscope.harness.reference_model.curriculum import Phase, RowMaker, Shape
from kvscope.harness.reference_model.data import PhaseData, batches
from kvscope.harness.reference_model.pieces import Pieces
from kvscope.harness.reference_model.tokenizer import EOS_ID, save_tokenizer, train_tokenizer
from kvscope.harness.reference_model.train import PHASES, train
from kvscope.tasks.draws import Draws
from kvscope.tasks.needle import SPECS
from kvscope.tasks.registry import create_task
from kvscope.tasks.words import words

SHAPE = Shape(tokens=512, rows=2, questions=6)
PHASE = Phase(name="test", shapes=(SHAPE,), steps=3, lr=(1e-3, 1e-3))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture(scope="module")
def maker(tokenizer: PreTrainedTokenizerFast) -> RowMaker:
    return RowMaker(Pieces(tokenizer))


def test_tokenizer_training_is_reproducible(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        save_tokenizer(tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name / "tokenizer.json").read_bytes()).hexdigest())
    shipped = Path(templates.__file__).parent / "weights" / "tokenizer.json"
    digests.add(hashlib.sha256(shipped.read_bytes()).hexdigest())
    assert len(digests) == 1, "the shipped tokenizer is the one its code trains"


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
        key_kind, value_kind = maker._kinds(draws)
        if key_kind == "pieces":
            continue
        key, value = maker._key(key_kind, draws, []), maker._value(value_kind, draws)
        form = draws.pick(templates.NEEDLES)
        ids = pieces.render(form, draws, kind=draws.pick(templates.TYPES), fill={"key": key, "value": value})
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids
        line = pieces.filler_line(draws)
        assert tokenizer(tokenizer.decode(line), add_special_tokens=False)["input_ids"] == line


def test_answers_stand_in_the_haystack(tokenizer: PreTrainedTokenizerFast, maker: RowMaker) -> None:
    checked = 0
    for i in range(40):
        row = maker._needles(PHASE, SHAPE, Draws("answers", i))
        if EOS_ID not in row.ids:
            continue  # fell back to recall
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


def test_batches_regenerate_byte_for_byte(maker: RowMaker) -> None:
    data = PhaseData(maker, PHASE, seed=5)
    batch = data[2]
    assert hashlib.sha256(batch.ids_BT.numpy().tobytes()).hexdigest()[:16] == "38b02a014685d746"
    later = list(batches(PhaseData(maker, PHASE, seed=5, start_step=1), workers=0))
    assert torch.equal(later[1].ids_BT, batch.ids_BT)
    assert torch.equal(later[1].targets_N, batch.targets_N)
    assert not torch.equal(PhaseData(maker, PHASE, seed=6)[2].ids_BT, batch.ids_BT)


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
    shape = Shape(tokens=256, rows=8, questions=4)
    phase = Phase(name="tiny", shapes=(shape,), steps=48, lr=(3e-3, 3e-3))
    first = train(out=tmp_path / "a", phases=(phase,), seed=1, layers=4, hidden=128)
    early = 8.72  # ln of the vocabulary: where an untrained model starts
    end = next(iter(first.history[-1]["loss"].values()))
    assert end < early - 0.7, f"loss stayed at {end}"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(model).__name__ == "SmolLM3ForCausalLM"
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("x")["input_ids"][0] == 1
    second = train(
        out=tmp_path / "b", phases=(replace(phase, steps=2),), resume=tmp_path / "a", seed=1, layers=4, hidden=128
    )
    assert [entry["steps_done"] for entry in second.history] == [48, 2]
    assert next(iter(second.history[-1]["loss"].values())) < early - 0.6, "the resumed run starts from the checkpoint"
