"""The benchmark of the decode step runs end to end in its small size; what it says of targets is arithmetic."""

import json
import sys

import pytest
from benchmark_scripts import load_script


@pytest.fixture
def script(monkeypatch):
    return load_script(monkeypatch, "decode_step")


def test_every_part_runs_in_the_small_size(script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "decode_step.json"
    monkeypatch.setattr(sys, "argv", ["decode_step.py", "--smoke", "--out", str(out)])
    assert script.main() == 0, capsys.readouterr()
    found = json.loads(out.read_text())
    rows = found["rows"]
    assert {row["part"] for row in rows} == {"tpot", "refresh", "attention", "prefill_attention", "prefill"}
    assert {row["status"] for row in rows} == {"ok", "does not fit"}
    assert all(row["tpot_s"] > 0 for row in rows if row["part"] == "tpot" and row["status"] == "ok")
    refresh = [row for row in rows if row["part"] == "refresh"]
    assert [row["case"] for row in refresh] == ["sync", "stale1"] * 2
    assert all(row["recalled_bytes"] > 0 for row in refresh)
    assert found["smoke"] is True


def test_targets_are_judged_where_their_rows_are_there(script):
    def tpot(length, seconds, case="lsa 16384 tokens", step="graph"):
        return {"status": "ok", "part": "tpot", "case": case, "length_tokens": length, "step": step, "tpot_s": seconds}

    rows = [
        tpot(32 * 1024, 0.008),
        tpot(512 * 1024, 0.009),
        tpot(512 * 1024, 0.030, step="eager"),
        tpot(512 * 1024, 0.020, case="lsa 13.5 %"),
        {"status": "ok", "part": "refresh", "case": "stale1", "length_tokens": 524288, "stall_share": 0.06},
        {"status": "ok", "part": "refresh", "case": "sync", "length_tokens": 524288, "stall_share": 0.09},
        {"status": "ok", "part": "attention", "case": "dense", "one_layer_s": 800e-6},
        {"status": "ok", "part": "attention", "case": "lsa 16384 tokens", "one_layer_s": 40e-6},
        {"status": "failed", "part": "prefill_attention", "case": "", "reason": "no"},
    ]
    judged = {each["what"]: (each["value"], each["target_met"]) for each in script.judge(rows)}
    assert judged == {
        "TPOT of lsa at a budget, 512K over 32K": (pytest.approx(1.125), True),
        "stall of a refresh over its interval, stale1, 512K": (0.06, False),
        "attention time of dense over lsa, longest context": (pytest.approx(20.0), True),
    }
    assert script.judge([]) == []
