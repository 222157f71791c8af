"""Where a needle's block ranks: against the formulas, whether it is read, and what is refused."""

import csv
from dataclasses import replace

import pytest
import torch
from sparse_plain import blocks_of, tokens_read
from tiny import one_thread, small, tiny_model

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine.finite import NotFinite
from kvscope.harness.engine.models import load_model
from kvscope.harness.studies import block_ranks as module
from kvscope.harness.studies.attention_mass import answer_positions
from kvscope.harness.studies.block_ranks import COLUMNS, block_methods, needle_ranks, summary_text
from kvscope.tasks.registry import create_task

__all__ = ["one_thread", "small", "tiny_model"]

SPECS = [
    "quest:budget_tokens=64,dense_layers=0",
    "moba:budget_tokens=96,block_tokens=24",
    "msa:budget_tokens=64,block_tokens=16",
    "dsa:budget_tokens=20,indexer=oracle",
]


@pytest.fixture(scope="module")
def case(tiny_model):
    loaded = load_model(tiny_model, device="cpu")
    return loaded, create_task("niah_single_1").build(loaded.tokenizer, length_tokens=512, sample=0, seed=3)


def rule_scores(name, q_GD, k_TD, block_tokens):
    """Score of every block but the last for each query head, by the formulas of the methods."""
    scores = []
    for tokens in blocks_of(len(k_TD), block_tokens)[:-1]:
        k = k_TD[tokens]
        if name == "quest":
            low, high = k.amin(0), k.amax(0)
            bounds = [float(torch.maximum(q * low, q * high).sum()) for q in q_GD]
            scores.append([max(bounds)] * len(q_GD))
        elif name == "moba":
            scores.append([float(q @ k.mean(0)) for q in q_GD])
        else:
            scores.append([max(float(q_GD.mean(0) @ key) for key in k)] * len(q_GD))
    return torch.tensor(scores).T


def test_scores_that_are_not_finite_are_no_rank(case):
    loaded, sample = case
    [method] = block_methods(["quest:budget_tokens=64,dense_layers=0"], [])
    score = method.score
    method.score = lambda query: replace(score(query), scores_HGN=score(query).scores_HGN * torch.nan)
    with pytest.raises(
        NotFinite, match=r"sample 0 of niah_single_1 at 512 tokens: .*scores that the method chooses by"
    ):
        needle_ranks(loaded, [method], sample)


@pytest.mark.parametrize("spec", SPECS)
def test_ranks_and_reads_are_the_formulas(case, spec, monkeypatch):
    loaded, sample = case
    seen = {}
    attend = module.Shadow.attend

    def noting(self, layer, call, mass_QA, answer, step):
        attend(self, layer, call, mass_QA, answer, step)
        pages, n_tokens = self.sequence._pool.pages[layer], self.sequence._pool.lengths[layer]
        keys = pages[:, :, 0].transpose(0, 1).flatten(1, 2)[:, :n_tokens].clone()
        seen[layer, step] = call.query[0, :, 0].clone(), keys, mass_QA.clone(), call.scale

    monkeypatch.setattr(module.Shadow, "attend", noting)
    (method,) = block_methods([spec], [])
    rows = needle_ranks(loaded, [method], sample)
    answer = answer_positions(loaded, sample)
    assert [row["layer"] for row in rows] == list(loaded.shape.layers)
    plan = method.blocks(len(sample.ids) - 1)
    for row in rows:
        assert set(row) == set(COLUMNS)
        layer = row["layer"]
        own = {step: mass.sum(1).max() for (at, step), (_, _, mass, _) in seen.items() if at == layer}
        assert row["answer_mass"] == pytest.approx(float(max(own.values())), abs=1e-4)
        q, keys, mass, scale = seen[layer, row["decode_step"]]
        assert int(mass.sum(1).argmax()) == row["head"]
        # The attention itself, anew: of that head, on that answer.
        share = torch.softmax(scale * keys[0] @ q[row["head"]], 0)[answer]
        assert float(share.sum()) == pytest.approx(row["answer_mass"], abs=1e-4)
        token = answer[int(share.argmax())]
        block = token // plan.block_tokens
        assert (row["block_tokens"], row["blocks_chosen"]) == (plan.block_tokens, plan.n_blocks - 1)
        assert row["blocks"] == plan.count(keys.shape[1]) - 1
        read = tokens_read(
            method.name, q[None], keys, block_tokens=plan.block_tokens, n_blocks=plan.n_blocks, scale=scale
        )
        assert row["read"] == (token in read[0])
        if method.name == "dsa":
            scores = sum(torch.softmax(scale * keys[0] @ each, 0) for each in q)[None, :-1]
            own_scores = scores[0]
        else:
            own_scores = rule_scores(method.name, q, keys[0], plan.block_tokens)[row["head"]]
        assert row["rank"] == int((own_scores > own_scores[block] + 1e-9).sum())


def test_dense_layers_and_short_prompts_read_everything(case):
    loaded, sample = case
    rows = needle_ranks(loaded, block_methods(["quest:dense_layers=2", "moba:budget_tokens=4096"], []), sample)
    assert len(rows) == 4
    assert all(row["read"] and row["rank"] == row["blocks"] == 0 for row in rows)


def test_an_indexer_of_its_own_is_watched_too(case):
    loaded, sample = case
    (row, _) = needle_ranks(loaded, block_methods(["dsa:selection=synthetic,budget_tokens=32"], []), sample)
    assert row["blocks"] == len(sample.ids) - 1 + row["decode_step"]
    assert 0 <= row["rank"] < row["blocks"]
    assert row["read"] == (row["rank"] < 31)


def test_the_command_writes_rows_and_prints_the_summary(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "RETRIEVING_MASS", 0.0)
    out = tmp_path / "ranks.csv"
    command = ["study", "block-ranks", "--model", tiny_model, "--method", "moba:budget_tokens=128",
               "--sweep", "moba.block_tokens=16,32",
               "--task", "niah_single_1", "--length", "512", "--samples", "2", "--device", "cpu",
               "--out", str(out)]  # fmt: skip
    assert cli.run_cli(command) == 0
    said = capsys.readouterr().out
    assert "needle read" in said
    assert "of 2" in said
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 2 * 2 * 2
    assert {row["block_tokens"] for row in rows} == {"16", "32"}
    assert {row["method"] for row in rows} == {
        "moba:budget_tokens=128,block_tokens=16",
        "moba:budget_tokens=128,block_tokens=32",
    }
    assert cli.run_cli(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_layers_that_look_nothing_up_are_left_out():
    row = dict.fromkeys(COLUMNS, 0) | {"length_tokens": 2048, "method": "moba", "read": True, "answer_mass": 0.05}
    assert "nothing is looked up" in summary_text([row])
    assert "moba" in summary_text([row, {**row, "layer": 1, "answer_mass": 0.5}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "dense"], "Method 'dense' does not choose blocks by a query"),
        (["--method", "dsa"], "No trained lightning indexer comes with kvscope for this model"),
        (
            ["--method", "moba", "--task", "long_qa_no_context"],
            "does not stand in the prompt word for word",
        ),
        (["--method", "moba", "--sweep", "quest.budget_tokens=64"], "names method 'quest'"),
    ],
)
def test_bad_input_gets_one_clear_sentence(tiny_model, tmp_path, capsys, options, message):
    task = [] if "--task" in options else ["--task", "niah_single_1"]
    rest = ["study", "block-ranks", "--model", tiny_model, *task, "--length", "1k", "--samples", "1", "--device", "cpu"]
    assert cli.run_cli([*rest, *options, "--out", str(tmp_path / "ranks.csv")]) == 2
    said = capsys.readouterr().err
    assert message in said
    with pytest.raises(UsageError):
        block_methods(["recency"], [])
