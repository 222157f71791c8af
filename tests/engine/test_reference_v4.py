"""``--model reference-v4``: what it says where its weights are not, and what runs where they are."""

from pathlib import Path
from typing import Any

import pytest
from compressed_tiny import random_model

from kvscope.errors import UsageError
from kvscope.harness.engine import names
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER, has_weights, known_models, resolve_model
from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.sweep import run
from kvscope.harness.studies.reproduce.planning import make_reproduction, plan_text

MISSING = "the weights of reference-v4 are not part of this installation"


@pytest.fixture
def absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "REFERENCE_V4_FOLDER", tmp_path / "none")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights where the trained one will be, and its own indexer as that of lsa."""
    from transformers import AutoTokenizer

    where = tmp_path_factory.mktemp("models") / "weights"
    tokenizer = AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    random_model(vocab_size=len(tokenizer), max_position_embeddings=65536, **ends).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture
def present(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(names, "REFERENCE_V4_FOLDER", made)
    return made


@pytest.mark.usefixtures("absent")
def test_without_weights_one_sentence_says_what_to_do() -> None:
    assert not has_weights("reference-v4")
    with pytest.raises(UsageError) as caught:
        make_plan(make_config({"model": "reference-v4", "methods": ["dense"], "device": "cpu"}))
    text = str(caught.value)
    assert MISSING in text[0].lower() + text[1:]
    assert "kvscope backbone train --architecture deepseek_v4" in text
    assert "\n" not in text


@pytest.mark.usefixtures("absent")
def test_the_list_says_that_it_cannot_be_had_yet() -> None:
    assert known_models()["reference-v4"].endswith("its weights are not part of this installation")


def test_with_weights_it_is_called_by_its_name(present: Path) -> None:
    assert resolve_model("reference-v4") == (str(present), "reference-v4")
    assert "not part of this installation" not in known_models()["reference-v4"]
    assert load_model("reference-v4", device="cpu").name == "reference-v4"


def test_its_rows_bear_its_name(present: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked: dict[str, Any] = {
        "model": "reference-v4", "methods": ["dense", "recency"], "tasks": ["niah_single_1"], "lengths_tokens": [512],
        "samples": 1, "max_new_tokens": 3, "footprint": False, "device": "cpu",
    }  # fmt: skip
    shown = run(make_config(asked), out=tmp_path / "run", progress=False)
    assert shown.info.model == "reference-v4"
    assert list(shown.samples["status"]) == ["ok", "ok"]


def test_a_reproduction_of_it_is_planned_with_the_baselines_that_run_there(present: Path, tmp_path: Path) -> None:
    asked = CollectConfig(
        model="reference-v4", tasks=("niah_single_1",), lengths_tokens=(512,), samples=1, seed=1000, device="cpu"
    )
    native = collect(asked, tmp_path / "data", progress=Progress()) / "native"
    planned = make_reproduction(
        "lsa", size="quick", model="reference-v4", lsa=f"lsa:indexer={native},tau=4", divisor=None,
        overrides={"device": "cpu"},
    )  # fmt: skip
    assert planned.equal == ("recency", "random")
    text = plan_text(planned, width=None)
    assert "ruler-64k" in text
    assert "no form on this model's cache: snapkv." in text


@pytest.mark.skipif(not has_weights("reference-v4"), reason=MISSING)
def test_the_trained_model_answers_at_1k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked: dict[str, Any] = {
        "model": "reference-v4", "methods": ["dense", "lsa", "recency"], "tasks": ["niah_single_1", "vt"],
        "lengths_tokens": [1024], "samples": 4, "footprint": False, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    shown = run(make_config(asked), out=tmp_path / "run", progress=False)
    assert (shown.samples["status"] == "ok").all()
    means = shown.samples.groupby("method")["score"].mean()
    assert means["dense"] >= 0.8
    assert means["lsa"] >= means["dense"] - 0.2
    assert means["recency"] < means["dense"]
