"""The benchmark against transformers' generate in its small size: same KV, same weights, same tokens."""

import json
import sys

from benchmark_scripts import load_script


def test_both_sides_say_the_same_tokens_in_the_small_size(tmp_path, monkeypatch):
    script = load_script(monkeypatch, "against_generate")
    out = tmp_path / "against_generate.json"
    monkeypatch.setattr(sys, "argv", ["against_generate.py", "--tiny", "--steps", "4", "--out", str(out)])
    assert script.main() in (0, 1)  # which side is the faster one is no matter here
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert found["tiny"] is True
    assert row["length_tokens"] == 1024
    assert row["equal_tokens"] == "the first 20 of 20"
    assert [side["side"] for side in row["sides"]] == ["kvscope", "generate"]
    assert all(side["steps"] == 4 and side["tpot_s"] > 0 for side in row["sides"])
    assert row["ratio"] == row["generate_tpot_s"] / row["kvscope_tpot_s"]
