"""Closed book and evidence alone: what the model is shown, how it is judged, and that padding changes no answer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvscope import cli
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.reference_model import controls
from kvscope.tasks.long_qa.guards import chance
from kvscope.tasks.registry import create_task


@pytest.fixture(scope="module")
def reference():
    model = AutoModelForCausalLM.from_pretrained(REFERENCE_MODEL_FOLDER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(REFERENCE_MODEL_FOLDER)


@pytest.fixture(scope="module")
def made(reference):
    task = create_task("long_qa")
    return task, [task.build(reference[1], length_tokens=1024, sample=i, seed=0) for i in range(90)]


def test_padding_changes_no_answer(reference):
    texts = [
        "One of the special magic numbers for alpha-dog is: 7654321.\nWhat is the special magic number for alpha-dog "
        "mentioned in the provided text? The special magic number for alpha-dog mentioned in the provided text is",
        "Q:",
        "The grass is green. " * 20 + "The sky",
    ]
    together = controls.answers(*reference, texts, max_new_tokens=8, batch=3)
    alone = [controls.answers(*reference, [text], max_new_tokens=8)[0] for text in texts]
    assert together == alone
    assert "7654321" in together[0]


def test_the_model_finds_a_needle_that_stands_alone_and_none_where_none_is(reference):
    told = []
    rows = controls.run_controls(
        *reference, tasks=("niah_multikey_2",), lengths_tokens=[1024], samples=3, seed=5, note=told.append
    )
    assert [(row["control"], row["accuracy_percent"], row["passed"]) for row in rows] == [
        ("closed_book", 0.0, True),
        ("oracle", 100.0, True),
    ]
    assert told == rows


def test_a_perfect_model_passes_the_oracle_and_fails_closed_book(made):
    task, samples = made
    right = [" " + ", ".join(sample.targets) + "\n more" for sample in samples]
    oracle = controls.score_control("oracle", task, samples, right, left_out=frozenset())
    assert (oracle["accuracy_percent"], oracle["passed"], oracle["n"]) == (100.0, True, 90)
    assert {kind["n"] for kind in oracle["by_type"].values()} == {10}
    closed = controls.score_control("closed_book", task, samples, right, left_out=frozenset())
    assert not closed["passed"]
    assert not closed["by_type"]["hops_3"]["passed"]
    assert closed["by_type"]["abstention"]["passed"], "who has seen nothing is right to say so"


def test_a_model_that_always_abstains_passes_closed_book_and_fails_the_oracle(made):
    task, samples = made
    silent = [" not mentioned"] * len(samples)
    closed = controls.score_control("closed_book", task, samples, silent, left_out=frozenset())
    assert closed["passed"]
    pooled = sum(chance(kind) for kind in closed["by_type"]) / 9
    assert closed["chance_percent"] == pytest.approx(100 * pooled, abs=0.01)
    assert not controls.score_control("oracle", task, samples, silent, left_out=frozenset())["passed"]


def test_types_left_out_count_in_no_pooled_figure(made):
    task, samples = made
    outputs = [
        " wrong" if sample.question_type == "multi_session" else " " + ", ".join(sample.targets) for sample in samples
    ]
    assert not controls.score_control("oracle", task, samples, outputs, left_out=frozenset())["passed"]
    row = controls.score_control("oracle", task, samples, outputs, left_out=frozenset({"multi_session"}))
    assert (row["passed"], row["n"], row["left_out"]) == (True, 80, ["multi_session"])
    assert row["by_type"]["multi_session"]["accuracy_percent"] == 0.0


def test_text_after_the_stop_does_not_count(made):
    task, samples = made
    kept = [replace(sample, stop=("\n",)) for sample in samples if sample.question_type == "single_fact"]
    row = controls.score_control(
        "oracle", task, kept, [f" dunno\n{sample.targets[0]}" for sample in kept], left_out=frozenset()
    )
    assert row["accuracy_percent"] == 0.0


def test_the_command_writes_rows_and_fails_where_a_control_does(tmp_path: Path, capsys):
    out = tmp_path / "controls.json"
    code = cli.run_cli(
        ["backbone", "controls", str(REFERENCE_MODEL_FOLDER), "--out", str(out), "-t", "niah_single_1", "-l", "1k",
         "-n", "2", "--workers", "1"]
    )  # fmt: skip
    rows = json.loads(out.read_text())
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert [row["control"] for row in rows] == ["closed_book", "oracle"]
    assert code == (0 if all(row["passed"] for row in rows) else 1)
