"""The largest batch that fits, and its row."""

import re
from typing import Any

import pytest
import torch
from in_process import MIB, run_here

from kvscope import cli
from kvscope.harness.passes import timing
from kvscope.harness.passes.sweep import failures, run
from kvscope.methods.dense.method import Dense
from kvscope.methods.resident import ResidentSequence

LSA = "lsa:tau=2,budget_tokens=512,recency_tokens=128,selection=synthetic"
VALUES = {
    "model": "preset:tiny",
    "methods": ["dense", LSA],
    "throughput": True,
    "lengths_tokens": ["2k"],
    "device": "cpu",
    "footprint_decode_tokens": 6,
    "max_batch": 8,
}


def test_rows_say_how_large_how_fast_and_why_not_more(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget holds dense to fewer sequences than lsa."""
    jobs = run_here(monkeypatch)
    monkeypatch.setattr(timing, "load_1min", lambda: 2.5)
    monkeypatch.setattr(timing, "usable_cores", lambda: 3)
    values = {**VALUES, "gpu_budget_bytes": "2MiB"}
    result = run(values, out=tmp_path / "run", progress=False)
    assert failures(result) == []
    rows = result.throughput.set_index("method_label")
    dense, lsa = rows.loc["dense"], rows.loc[LSA]
    assert dense["largest_batch"] == (2 * MIB - 140_160) // (32 * 64 * 256) == 3
    assert (dense["batch_bound"], lsa["batch_bound"]) == ("device_budget", "max_batch")
    assert lsa["largest_batch"] == 8
    assert (dense["mirror"], lsa["mirror"]) == ("none", "shared")
    assert (dense["selection"], lsa["selection"]) == ("free", "synthetic")
    for row in (dense, lsa):
        assert row["tokens_per_s"] == pytest.approx(row["largest_batch"] / row["step_s"])
        assert row["tokens_per_s_at_1"] > 0
        assert 0 < row["step_p10_s"] <= row["step_p90_s"]
        assert (row["cpu_cores"], row["load_1min"]) == (3, 2.5)
        assert (row["steps"], row["prefill"], row["batching"]) == (5, "synthetic", "batched_step")
        assert row["step_backend"] == "eager: the device is cpu"
    assert dense["resident_kv_bytes"] == 3 * 32 * 64 * 256
    assert lsa["host_kv_bytes"] == 32 * 64 * 256
    assert lsa["bytes_recalled"] > 0
    assert [(job.kind, job.max_batch) for job in jobs] == [("throughput", 8)] * 2
    run(values, out=tmp_path / "run", progress=False)
    assert len(jobs) == 2


class _StepNeedsRoom(ResidentSequence):
    """A decode step that finds no room once five sequences are open."""

    alive = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _StepNeedsRoom.alive += 1

    def attend(self, *arguments: Any, **options: Any) -> torch.Tensor:
        if _StepNeedsRoom.alive >= 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return super().attend(*arguments, **options)

    def close(self) -> None:
        _StepNeedsRoom.alive -= 1
        super().close()


def test_a_step_that_does_not_fit_takes_one_sequence_less(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)

    def open_(self: Dense, prompt: Any, device: Any, *, reserve_tokens: int = 0, **options: Any) -> Any:
        ranges = self.resident_ranges(prompt)
        return _StepNeedsRoom(prompt, torch.device(device), ranges=ranges, reserve_tokens=reserve_tokens)

    monkeypatch.setattr(Dense, "open", open_)
    result = run({**VALUES, "methods": ["dense"]}, out=tmp_path / "run", progress=False)
    row = result.throughput.iloc[0]
    assert (row["largest_batch"], row["batch_bound"]) == (4, "device")
    assert _StepNeedsRoom.alive == 0


def test_a_length_where_not_one_fits_is_an_oom_row_and_the_run_goes_on(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(monkeypatch)
    values = {**VALUES, "gpu_budget_bytes": "600KiB", "lengths_tokens": ["1k", "2k"]}
    result = run(values, out=tmp_path / "run", progress=False)
    rows = result.throughput.set_index(["method_label", "length_tokens"])
    assert list(rows["status"]) == ["ok", "ok", "oom", "ok"]
    assert rows.loc[("dense", 2048), "oom_of"] == "device_budget"
    assert failures(result)[0].startswith("throughput: dense: 1 oom: decode: DeviceBudgetExceeded")
    assert cli.run_cli(["report", str(tmp_path / "run")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"n/m \([a-z]\)", printed)
    assert f"Eager steps of dense, {LSA}: the device is cpu." in printed
    assert "do not compare methods" not in printed  # all of one kind
