"""Training of the small DeepSeek-V4: what it learns, its phases, its indexer, and going on where a run broke off."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_v4 import LAYER_TYPES, loud_model, recall_batches, small_config
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.reference_model import train
from kvscope.harness.reference_model import trainer as trainers
from kvscope.harness.reference_model.architecture import Afmoe
from kvscope.harness.reference_model.curriculum import Phase, Shape
from kvscope.harness.reference_model.phases import phases_left
from kvscope.harness.reference_model.pieces import Pieces
from kvscope.harness.reference_model.row_maker import RowMaker
from kvscope.harness.reference_model.trainer import STATE_FILE, Trainer
from kvscope.harness.reference_model.v4.architecture import DeepseekV4
from kvscope.harness.reference_model.v4.index_loss import taken_queries
from kvscope.harness.reference_model.v4.phases import V4_PHASES

RECALL = {"tokens": 64, "rows": 8, "questions": 4, "words": 40}


def three_layers(**changes: Any) -> Any:
    return small_config(num_hidden_layers=3, layer_types=LAYER_TYPES[:3], mlp_layer_types=["moe"] * 3, **changes)


def fresh_model() -> Any:
    return DeepseekV4().build(three_layers(), seed=0)


def trainer_of(model: Any, out: Path, *, optimizer: str = "adamw") -> Trainer:
    backbone = DeepseekV4(topk=4)
    backbone.optimizer = optimizer
    return Trainer(model, device=torch.device("cpu"), out=out, compile_layers=False, backbone=backbone)


def phase_of(steps: int, **changes: Any) -> Phase:
    shape = Shape(tokens=RECALL["tokens"], rows=RECALL["rows"], questions=RECALL["questions"])
    return Phase(**{"name": "recall", "shapes": (shape,), "steps": steps, "lr": (3e-3, 3e-3), "warmup_steps": 5,
                    **changes})  # fmt: skip


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-2), ("muon", 5e-3)])
def test_some_steps_of_recall_lower_the_loss(tmp_path: Path, optimizer: str, lr: float) -> None:
    trainer = trainer_of(fresh_model(), tmp_path, optimizer=optimizer)
    source = recall_batches(**RECALL, seed=1)
    first, _ = trainer.gradients(next(source))
    trainer.model.zero_grad(set_to_none=True)
    trainer.run_phase(phase_of(12, lr=(lr, lr)), source, deadline=None)
    muon = sum(parameter.numel() for group in trainer.muon.groups for parameter in group)
    assert (muon > 50_000) is (optimizer == "muon")
    last, _ = trainer.gradients(next(source))
    # From a guess among 512 tokens towards one among the 40 that are values.
    assert first > 6
    assert last < first - 1


def test_the_guard_compares_with_the_stock_classes_dense_and_sparse(tmp_path: Path) -> None:
    trainer = trainer_of(loud_model(), tmp_path)
    batch = next(recall_batches(**RECALL, seed=1))
    for objective in ("answers", "indexer", "sparse"):
        trainer.begin(phase_of(1, objective=objective))
        assert trainer.check_against_stock(batch) < 1e-4
    trainer.model.config.sliding_window = 16  # the stock copy's, not the layers'
    with pytest.raises(RuntimeError, match="differs from the stock model's"):
        trainer.check_against_stock(batch)


def test_the_indexer_learns_where_attention_goes_and_nothing_else_moves(tmp_path: Path) -> None:
    trainer = trainer_of(loud_model(), tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    source = recall_batches(**RECALL, seed=2)
    trainer.run_phase(phase_of(30, objective="indexer", lr=(1e-2, 1e-2)), source, deadline=None)
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".indexer." in name for name in moved)
    lines = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    recall = [line["mass_recall"]["64"] for line in lines]
    loss = [line["loss"]["64"] for line in lines]
    assert loss[-1] < loss[0]
    assert recall[-1] > recall[0] + 0.05


def test_sparse_training_moves_model_and_indexer_with_top_k_on(tmp_path: Path) -> None:
    trainer = trainer_of(loud_model(), tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.run_phase(phase_of(2, objective="sparse"), recall_batches(**RECALL, seed=3), deadline=None)
    still = {name for name, value in trainer.model.state_dict().items() if torch.equal(value, before[name])}
    assert {name for name in still if "e_score_correction_bias" not in name} == set()
    assert trainer.model.config.index_topk == 4
    trainer.begin(phase_of(1))
    assert trainer.model.config.index_topk == 1024


def test_queries_taken_are_the_scored_ones_and_others() -> None:
    batch = next(recall_batches(**RECALL, seed=1))
    batch = replace(batch, at_N=batch.at_N[3:], targets_N=batch.targets_N[3:])  # rows of uneven numbers
    taken = taken_queries(batch)
    width = taken.at_BC.shape[1]
    assert torch.equal(taken.of_N // width, batch.at_N // RECALL["tokens"])
    assert torch.equal(taken.at_BC.flatten()[taken.of_N], batch.at_N % RECALL["tokens"])
    assert taken.at_BC.unique().numel() > RECALL["tokens"] // 2


def test_a_phase_ends_as_soon_as_it_is_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "ENOUGH_STEPS", 10)
    trainer = trainer_of(fresh_model(), tmp_path)
    batch = next(recall_batches(**{**RECALL, "rows": 2}, seed=1))
    done = trainer.run_phase(phase_of(200, enough=0.02, lr=(1e-2, 1e-2)), iter([batch] * 200), deadline=None)
    assert done % trainers.AGREE_STEPS == 0
    assert 10 < done < 100, "one batch again and again is soon known"
    assert trainer.history[-1]["ended_by"] == "accuracy"
    assert trainer.run_phase(phase_of(16, enough=None), iter([batch] * 16), deadline=None) == 16
    assert trainer.history[-1]["ended_by"] == "steps"


def test_other_architectures_refuse_what_they_have_no_part_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="afmoe has no part for"):
        Afmoe().begin(torch.nn.Identity(), phase_of(1, objective="indexer"))
    with pytest.raises(UsageError, match="deepseek_v4 has no part for"):
        DeepseekV4().begin(torch.nn.Identity(), phase_of(1, objective="nothing"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(REFERENCE_MODEL_FOLDER)


@pytest.fixture(scope="module", autouse=True)
def one_row_maker(tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Make the bank of fillers once for every run of this file."""
    maker: list[Any] = []

    def made(tokenizer: PreTrainedTokenizerFast) -> Any:
        maker[:] = maker or [RowMaker(Pieces(tokenizer))]
        return maker[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Pieces", made)
        patch.setattr(train, "RowMaker", lambda maker, documents: maker)
        yield


@pytest.fixture(scope="module")
def broken_off(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of real rows that its deadline has stopped in its first phase."""
    folder = tmp_path_factory.mktemp("v4")
    tokenizer.save_pretrained(folder)
    trainer = train.train(
        out=folder, phases=short_phases(), seed=3, config=three_layers(vocab_size=8192), backbone=DeepseekV4(),
        max_seconds=0.0,
    )  # fmt: skip
    assert trainer.step == 1
    return folder


def short_phases() -> tuple[Phase, ...]:
    shape = Shape(tokens=64, rows=2, questions=2)
    first = Phase(name="first", shapes=(shape,), steps=4, lr=(4e-3, 1e-3), copy_share=1.0)
    return first, replace(first, name="second", steps=2)


def test_a_run_goes_on_where_it_broke_off(broken_off: Path, tmp_path: Path) -> None:
    state = json.loads((broken_off / STATE_FILE).read_text(encoding="utf-8"))
    assert [part["ended_by"] for part in state["phases"]] == ["deadline"]
    left = phases_left(short_phases(), state["phases"])
    assert [(phase.name, phase.steps) for phase in left] == [("first", 4), ("second", 2)]
    trainer = train.train(
        out=tmp_path, phases=left, resume=broken_off, seed=3, config=three_layers(vocab_size=8192),
        backbone=DeepseekV4(),
    )  # fmt: skip
    assert trainer.step == 6, "one step of the first phase was done"
    with pytest.raises(UsageError, match="ended every phase"):
        phases_left(short_phases(), trainer.history)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (saved.config.model_type, saved.config._attn_implementation) == ("deepseek_v4", "eager")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value.to(saved.state_dict()[name].dtype)), name


def test_the_phases_are_in_order_and_end_with_the_indexer() -> None:
    longest = [max(shape.tokens for shape in phase.shapes) for phase in V4_PHASES]
    dense = [phase for phase in V4_PHASES if phase.objective == "answers"]
    assert longest[: len(dense)] == sorted(longest[: len(dense)])
    assert [phase.objective for phase in V4_PHASES[len(dense) :]] == ["indexer", "sparse"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--architecture", "deepseek_v3"], "there is no 'deepseek_v3'"),
        (["--architecture", "deepseek_v4", "--optimizer", "sgd"], "muon or adamw"),
        (["--phases", "left"], "--resume DIR"),
        (["--architecture", "deepseek_v4", "--phases", "p0-128"], "there is no phase 'p0-128'"),
        (["--phases", "left", "--resume", "nowhere"], "training_state.json"),
    ],
)
def test_wrong_options_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.run_cli(["backbone", "train", "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
