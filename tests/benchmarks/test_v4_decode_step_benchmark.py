"""The benchmark of DeepSeek-V4's decode step runs end to end in its tiny size; its sizes and comparisons."""

import json
import sys
from dataclasses import replace

import pytest
from benchmark_scripts import load_script

from kvscope.errors import UsageError


@pytest.fixture
def script(monkeypatch):
    return load_script(monkeypatch, "v4_decode_step")


def told(script, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["v4_decode_step.py", *options])
    return script.scale_of(script.asked())


def test_every_part_runs_in_the_tiny_size(script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "v4.json"
    monkeypatch.setattr(sys, "argv", ["v4_decode_step.py", "--tiny", "--out", str(out)])
    assert script.main() == 0, capsys.readouterr()
    found = json.loads(out.read_text())
    assert found["command"] == "python benchmarks/v4_decode_step.py --tiny"
    assert "commit" in found["environment"]  # none where the tree is no checkout
    assert "stock deepseek_v4 classes" in found["environment"]["attention_backend"]
    rows = found["rows"]
    assert {row["part"] for row in rows} == {"check", "topk", "tpot", "refresh"}
    assert {row["status"] for row in rows} == {"ok"}
    checks = {row["case"]: row for row in rows if row["part"] == "check"}
    assert checks["top-k against fp64"]["wrong"] == 0
    fixed = checks["captured against eager, fp32"]
    assert 0 < fixed["largest_difference"] < 1e-5  # a step of its own, not the eager one
    assert fixed["backend"] == "fixed addresses, not captured"
    assert checks["captured against uncaptured"]["unequal_logits"] == 0
    tpot = [row for row in rows if row["part"] == "tpot"]
    assert len(tpot) == 2 * 3 * 2
    for row in tpot:
        assert row["tpot_s"] > 0
        assert row["layers"] == 4
        assert row["times_floor"] == pytest.approx(row["tpot_s"] / row["floor_s"])
        assert row["backend"] == ("eager" if row["step"] == "eager" else "eager: the device is cpu")
    by = {(row["length_tokens"], row["case"]): row for row in tpot if row["step"] == "eager"}
    for length in (512, 1024):
        assert by[length, "lsa 50.0%"]["device_bytes"] < by[length, "dense"]["device_bytes"]
    refresh = next(row for row in rows if row["part"] == "refresh")
    assert refresh["recalled_bytes"] > 0
    assert refresh["hit_rate"] == pytest.approx(0.75, abs=0.02)
    assert {each["what"] for each in found["comparisons"]} == {"dense over lsa 50.0%", "dense over recency"}


def test_the_full_size_is_v4_flash_with_the_experts_of_one_token(script, monkeypatch):
    scale = told(script, monkeypatch)
    assert scale.lengths_tokens[-1] == 4_000 * 1024
    assert scale.values["n_routed_experts"] == 6
    fewer = told(script, monkeypatch, "--layers", "11", "--lengths", "128k,1m")
    assert fewer.lengths_tokens == (131_072, 1_048_576)
    assert fewer.values["layer_types"].count("compressed_sparse_attention") == 5
    assert len(fewer.values["mlp_layer_types"]) == fewer.values["num_hidden_layers"] == 11


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "2"], "--layers takes 3 to 43"),
        (["--layers", "5", "--tiny"], "not with --tiny"),
        (["--lengths", "100"], "--lengths takes 576 tokens and more, got 100"),
        (["--lengths", "5x"], "'5x' is not a length"),
    ],
)
def test_bad_sizes_are_refused(script, monkeypatch, options, words):
    with pytest.raises(UsageError, match=words):
        told(script, monkeypatch, *options)


def test_comparisons_are_of_steps_that_were_captured(script):
    def row(case, step, tpot_s, backend="cuda graph"):
        return {
            "part": "tpot", "status": "ok", "length_tokens": 1024, "case": case, "step": step, "tpot_s": tpot_s,
            "mean_step_s": tpot_s, "device_bytes": 100, "backend": backend,
        }  # fmt: skip

    rows = [row("dense", "graph", 0.02), row("dense", "eager", 0.06, "eager"), row("lsa", "graph", 0.01)]
    found = {each["what"]: each["tpot"] for each in script.compare([*rows, {"part": "topk", "status": "ok"}])}
    assert found == {"eager over captured, dense": pytest.approx(3.0), "dense over lsa": pytest.approx(2.0)}


def test_a_top_k_of_more_than_the_entries_is_checked_too(script):
    cases, checks = sys.modules["v4_decode_cases"], sys.modules["v4_decode_checks"]
    scale = replace(cases.TINY, lengths_tokens=(64,))  # 16 entries, of which 13 count; the top-k takes 16
    rows = list(checks.check_rows(scale, cases.build(scale)))
    assert [row["status"] for row in rows] == ["ok", "ok", "ok"]
