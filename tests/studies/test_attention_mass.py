"""Attention on the evidence: equal to transformers' own attention weights, on every kind of layer kvscope manages."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model
from tiny_models import loaded_model, prompt_ids, stock_model
from transformers import AutoModelForCausalLM

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import load_model
from kvscope.harness.studies.attention_mass import COLUMNS, evidence_attention
from kvscope.tasks.base import Sample
from kvscope.tasks.registry import create_task

SPANS = ((3, 9), (40, 47), (80, 81))
QUESTION = 5


def sample_of(ids: list[int], spans: tuple[tuple[int, int], ...]) -> Sample:
    return Sample(
        task="made", question_type="made", length_tokens=len(ids) + 4, sample=0, seed=0, ids=tuple(ids), text="",
        question_start=len(ids) - QUESTION, evidence_spans=spans, depth=0.5, prompt_sha256="", targets=(),
        max_new_tokens=4,
    )  # fmt: skip


@torch.inference_mode()
def eager_mass(model: Any, ids: list[int], positions: list[int], layer: int) -> torch.Tensor:
    """Weights of every query on `positions`, [query heads, queries], from transformers' eager attention."""
    out = model(torch.tensor([ids]), output_attentions=True)
    weights: torch.Tensor = out.attentions[layer][0]
    return weights[:, :, positions].sum(-1)


# RoPE; layers without positions; sliding layers beside full ones; soft caps; learned sinks.
@pytest.mark.parametrize("name", ["llama", "smollm3", "gemma3", "gemma2", "gpt_oss", "afmoe"])
def test_mass_is_what_eager_attention_gives(name: str) -> None:
    loaded, ids = loaded_model(name), prompt_ids(100)
    rows = evidence_attention(loaded, sample_of(ids, SPANS))
    assert len(rows) == len(loaded.shape.layers) * loaded.shape.n_q_heads
    positions = [i for start, end in SPANS for i in range(start, end)]
    for layer in loaded.shape.layers:
        mine = [row for row in rows if row["layer"] == layer]
        found = torch.tensor([row["evidence_mass"] for row in mine])
        want = eager_mass(stock_model(name), ids, positions, layer)
        torch.testing.assert_close(found, want[:, -1], atol=2e-5, rtol=1e-3)
        assert found.max() > 1e-3, "a test at nil would show nothing"
        peak, step = want[:, -QUESTION:].max(-1)
        torch.testing.assert_close(torch.tensor([r["evidence_peak"] for r in mine]), peak, atol=2e-5, rtol=1e-3)
        assert [r["evidence_peak_step"] for r in mine] == step.tolist()
    assert {row["evidence_tokens"] for row in rows} == {14}
    assert {row[name] for row in rows for name in ("answer_mass", "answer_peak", "answer_peak_step")} == {None}
    assert tuple(rows[0]) == COLUMNS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), device="cpu")


def test_the_query_is_the_one_before_the_first_token_of_the_answer(loaded: LoadedModel, folder: Path) -> None:
    sample = create_task("niah_single_1").build(loaded.tokenizer, length_tokens=640, sample=0, seed=0)
    (start, end), (target,) = sample.evidence_spans[0], sample.targets
    rows = evidence_attention(loaded, sample)
    answer = loaded.tokenizer(" " + target, add_special_tokens=False)["input_ids"]
    lead = answer[: len(answer) - len(loaded.tokenizer(target, add_special_tokens=False)["input_ids"])]
    assert {row["decode_step"] for row in rows} == {len(lead)}
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    spelled = [i for i in range(start, end) if loaded.tokenizer.decode([sample.ids[i]]) in target]
    assert "".join(loaded.tokenizer.decode([sample.ids[i]]) for i in spelled) == target
    for layer in loaded.shape.layers:
        mine = [row for row in rows if row["layer"] == layer]
        for column, at in (("evidence_mass", list(range(start, end))), ("answer_mass", spelled)):
            want = eager_mass(stock, [*sample.ids, *lead], at, layer)
            torch.testing.assert_close(torch.tensor([row[column] for row in mine]), want[:, -1], atol=1e-6, rtol=1e-4)
            peak = want[:, sample.question_start :].max(-1).values
            column = column.replace("mass", "peak")
            torch.testing.assert_close(torch.tensor([row[column] for row in mine]), peak, atol=1e-6, rtol=1e-4)
    assert {row["answer_tokens"] for row in rows} == {len(spelled)}


@pytest.mark.parametrize(
    ("tensor", "words"),
    [("model.norm.weight", "logits are not finite"), ("model.layers.1.self_attn.k_proj.weight", "K of layer 1 is not")],
)
def test_what_is_not_finite_is_no_row(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor: str, words: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    weight = dict(model.named_parameters())[tensor]
    with torch.no_grad():
        weight[0] = torch.nan
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    model.save_pretrained(damaged)
    for study in (["attention-mass"], ["block-ranks", "-m", "quest:budget_tokens=64"]):
        out = tmp_path / f"{study[0]}.csv"
        command = ["study", *study, "--model", str(damaged), "-t", "niah_single_1", "-l", "1k", "-n", "1"]
        capsys.readouterr()
        assert cli.run_cli([*command, "--device", "cpu", "--out", str(out)]) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "Nothing can be said of sample 0 of niah_single_1 at 1,024 tokens: " in told
        assert words in told
        assert not out.exists(), "nothing is in the way of the same command"


def test_a_sample_without_evidence_is_refused(loaded: LoadedModel) -> None:
    sample = create_task("niah_single_1").build(loaded.tokenizer, length_tokens=640, sample=0, seed=0)
    with pytest.raises(UsageError, match="no evidence"):
        evidence_attention(loaded, replace(sample, evidence_spans=()))


def test_the_command_writes_a_row_a_head(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mass.csv"
    command = ["study", "attention-mass", "--model", str(folder), "-t", "niah_single_1", "-t", "vt", "-l", "1k"]
    command += ["-l", "2k", "-n", "2", "--device", "cpu", "--out", str(out)]
    assert cli.run_cli(command) == 0
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 2 * 2 * 2 * 2  # tasks, lengths, samples, layers, heads
    assert all(0 < float(row["evidence_mass"]) < 1 for row in rows)
    assert all(0 < float(row["answer_mass"]) <= float(row["evidence_mass"]) for row in rows)
    assert cli.run_cli(command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--length", "8k", "takes 4096 tokens"),
        ("--length", "4q", "is not a length"),
        ("--task", "niah_singel_1", "Did you mean 'niah_single_1'"),
        ("--task", "jsonl:{file}", "Sample 0 of jsonl:q has no evidence in its prompt"),
        ("--samples", "2", "Task 'jsonl:q' has 1 prompts, and 2 samples are asked for"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, message: str
) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "red", "answers": "blue"}')
    given = {"--model": str(folder), "--length": "1k", "--samples": "1", "--out": str(tmp_path / "x.csv")}
    given |= {"--task": f"jsonl:{file}" if flag == "--samples" else "vt", flag: value.format(file=file)}
    assert cli.run_cli(["study", "attention-mass", *(part for pair in given.items() for part in pair)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()
