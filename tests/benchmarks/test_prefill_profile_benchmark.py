"""The profile of a prefill runs on a CPU: FLOPs by the layers' own weights, the host's work by name."""

import json
import sys

from benchmark_scripts import load_script


def test_the_reference_models_prefill_is_taken_apart(tmp_path, monkeypatch):
    script = load_script(monkeypatch, "prefill_profile")
    out = tmp_path / "prefill.json"
    options = ["--device", "cpu", "--length", "256", "--chunk", "128", "--repetitions", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["prefill_profile.py", *options, "--method", "dense", "--method", "quest"])
    assert script.main() == 0
    found = json.loads(out.read_text())
    alone, heard = found["rows"]
    assert (alone["case"], heard["case"]) == ("alone", "with collectors")
    # 19.6 M parameters, most of them in the layers, at two FLOPs a token each.
    assert 0.5 < alone["flops"] / (2 * 19.6e6 * 256) < 1.2
    assert alone["tflop_per_s"] == alone["flops"] / alone["prefill_s"] / 1e12
    assert any(line["name"] == "aten::mm" for line in alone["profile"]["host"])
    assert alone["profile"]["device"] == []
