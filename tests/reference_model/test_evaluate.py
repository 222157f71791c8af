"""Batched evaluation with the stock generate: cells, closed book, workers, and agreement with kvscope's own engine."""

import json

import pytest
import torch
from small_v4 import small_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvscope
from kvscope import cli
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.reference_model import controls, evaluate


@pytest.fixture(scope="module")
def reference():
    model = AutoModelForCausalLM.from_pretrained(REFERENCE_MODEL_FOLDER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(REFERENCE_MODEL_FOLDER)


def test_rows_name_their_cell_and_agree_with_the_engine(reference, tmp_path):
    told = []
    rows = evaluate.evaluate(
        *reference, tasks=("niah_multikey_2",), lengths_tokens=[1024], samples=3, seed=5, batch_tokens=2048, workers=1,
        note=told.append,
    )  # fmt: skip
    (row,) = rows
    assert (row["task"], row["length_tokens"], row["samples"], row["seed"]) == ("niah_multikey_2", 1024, 3, 5)
    assert told == [row]
    run = kvscope.run(
        {
            "model": "reference",
            "methods": ["dense"],
            "tasks": ["niah_multikey_2"],
            "lengths_tokens": [1024],
            "samples": 3,
            "seed": 5,
            "footprint": False,
            "out": str(tmp_path / "run"),
        }
    )
    assert row["accuracy_percent"] == pytest.approx(100 * run.samples.score.mean(), abs=0.01)


def test_closed_book_pads_questions_of_unlike_length_and_finds_nothing(reference):
    (row,) = evaluate.evaluate(
        *reference, tasks=("niah_multikey_2",), lengths_tokens=[1024], samples=4, seed=5, closed_book=True
    )
    assert row["closed_book"] is True
    assert row["accuracy_percent"] == 0.0


def test_entries_are_never_made_of_padding(reference, monkeypatch):
    """DeepSeek-V4 answers closed-book questions, which differ in length, one by one, with its stock attention."""
    model = AutoModelForCausalLM.from_config(small_config(vocab_size=8192)).eval()
    batches, generate = [], type(model).generate

    def watched(self, **given):
        batches.append((len(given["input_ids"]), bool(given["attention_mask"].all()), self.config._attn_implementation))
        return generate(self, **{**given, "max_new_tokens": 2})

    monkeypatch.setattr(type(model), "generate", watched)
    tokenizer, cell = reference[1], {"tasks": ("niah_multikey_2",), "lengths_tokens": [256], "samples": 3, "seed": 5}
    evaluate.evaluate(model, tokenizer, **cell, closed_book=True)
    assert batches == [(1, True, "eager")] * 3
    evaluate.evaluate(model, tokenizer, **cell)
    assert batches[3:] == [(3, True, "eager")]
    controls.answers(model, tokenizer, ["One.", "Two and three."], max_new_tokens=2)
    assert batches[4:] == [(1, True, "eager")] * 2


def test_the_command_writes_its_rows(tmp_path, capsys):
    out = tmp_path / "rows.json"
    command = ["backbone", "evaluate", str(REFERENCE_MODEL_FOLDER), "-t", "niah_single_1", "-l", "1k", "-n", "1"]
    assert cli.run_cli([*command, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())
    assert (row["task"], row["length_tokens"], row["samples"]) == ("niah_single_1", 1024, 1)
    assert json.loads(capsys.readouterr().out) == row
    assert cli.run_cli([*command[:2], str(tmp_path), *command[3:], "--out", str(out)]) == 2
    assert "is no model folder" in capsys.readouterr().err


def test_no_cell_is_begun_past_the_time(reference):
    assert evaluate.evaluate(*reference, lengths_tokens=[1024], samples=1, seed=0, max_seconds=0.0) == []
