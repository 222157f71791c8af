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
