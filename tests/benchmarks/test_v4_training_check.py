"""The check before the small DeepSeek-V4 is trained runs end to end in its small size, and finds a wrong kernel."""

import json
import sys

import pytest
import torch
from benchmark_scripts import load_script

from kvscope.harness.reference_model.v4 import attention


@pytest.fixture
def script(monkeypatch):
    return load_script(monkeypatch, "v4_training_check")


def test_every_part_runs_in_the_small_size(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.Trainer, "seconds_per_step", lambda self, batch: float(self.gradients(batch)[0] > 0))
    out = tmp_path / "check.json"
    monkeypatch.setattr(sys, "argv", ["v4_training_check.py", "--small", "--out", str(out)])
    assert script.main() == 0, capsys.readouterr()
    rows = json.loads(out.read_text())["rows"]
    assert [row["part"] for row in rows[:2]] == ["kernel", "kernel"]
    assert {row["objective"] for row in rows[2:]} == {"answers", "indexer", "sparse"}
    assert all(row["ok"] for row in rows)


def test_a_wrong_kernel_is_found(script, monkeypatch):
    monkeypatch.setattr(attention, "_flash", lambda q, e, scale: (e.expand_as(q), torch.zeros(q.shape[:3])))
    assert script.kernel_row(tokens=64, rate=4, rows=1, device=torch.device("cpu"))["ok"] is False


def test_a_profile_names_what_a_step_s_time_goes_to(script, tmp_path, monkeypatch, capsys):
    import v4_step_profile

    out = tmp_path / "profile.json"
    monkeypatch.setattr(v4_step_profile, "STEPS", 1)
    monkeypatch.setattr(sys, "argv", ["v4_training_check.py", "--small", "--profile", "64", "--out", str(out)])
    assert script.main() == 0, capsys.readouterr()
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["part"], row["tokens"], row["rows"]) == ("profile", 64, 2)
    times = [each["ms"] for each in row["top"]]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(times) <= row["kernel_ms"] + 1e-2
    assert row["top"][0]["kernel"] in capsys.readouterr().out


def test_a_length_that_no_phase_has_is_refused(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["v4_training_check.py", "--profile", "65", "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert "no phase has such rows; choose of 64, 128" in capsys.readouterr().err


def test_time_in_which_kernels_overlap_counts_once(script):
    from v4_step_profile import Span, busy_us, table

    spans = [Span("a", 0, 10), Span("b", 5, 12), Span("a", 20, 21), Span("c", 6, 7)]
    assert busy_us(spans) == 13
    assert [(each["kernel"], each["ms"], each["calls"]) for each in table(spans, steps=2)] == [
        ("a", 0.0055, 1.0), ("b", 0.0035, 0.5), ("c", 0.0005, 0.5),
    ]  # fmt: skip
