"""A failed row is not done: the same command measures its cell again, once a call, and loses nothing."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stand_ins
from in_process import run_here
from notes import Notes
from tiny import MakeConfig

from kvscope import cli
from kvscope.harness.engine import prefill as prefill_module
from kvscope.harness.passes import process
from kvscope.harness.passes.sweep import failures, run
from kvscope.methods import registry
from kvscope.methods.dense.method import Dense
from kvscope.results.frames import load_run
from kvscope.results.packed import read_packed, write_packed
from kvscope.results.store import RunStore

PRESET = {"model": "preset:tiny", "methods": ["dense"], "device": "cpu", "footprint_decode_tokens": 4}


@pytest.fixture
def small(small: MakeConfig) -> MakeConfig:
    """Without the self-check: dense has to fail in the sweep, not before it."""
    return partial(small, self_check=False)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let ``dense`` raise while the list holds something: an error's type."""
    faults: list[str] = []
    real = Dense.open

    def opened(self: Dense, *arguments: Any, **options: Any) -> Any:
        if faults and type(self) is Dense:
            raise MemoryError("no room") if faults[0] == "oom" else RuntimeError("torn")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Dense, "open", opened)
    return faults


def lines(folder: Path, name: str = "samples.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("fault", ["failed", "oom"])
def test_a_failed_row_is_measured_again_and_the_later_row_counts(
    small: MakeConfig, broken: list[str], fault: str
) -> None:
    broken.append(fault)
    first = run(small(), progress=False)
    assert list(first.samples["status"]) == [fault, "ok"] * 2
    before = (first.folder / "samples.jsonl").read_bytes()
    broken.clear()
    notes = Notes()
    result = run(small(), progress=notes)
    assert "2 failed rows are measured again; --no-retry keeps them." in notes.said
    assert failures(result) == []
    assert list(result.samples["status"]) == ["ok"] * 4
    assert list(result.samples["sample"]) == [0, 0, 1, 1], "a cell keeps its place"
    assert (result.folder / "samples.jsonl").read_bytes().startswith(before), "the folder keeps its history"
    assert len(lines(result.folder)) == 6
    assert "All 4 rows are there already: nothing left to measure." in _said_again(small)


def _said_again(small: MakeConfig) -> list[str]:
    notes = Notes()
    run(small(), progress=notes)
    return notes.said


def test_what_fails_again_is_tried_once_a_call_and_counted(
    small: MakeConfig, broken: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    broken.append("failed")
    config = small(samples=1)
    arguments = ["run", "--no-report", "-q", *_flags(config)]
    for call in (1, 2, 3):
        assert cli.run_cli(arguments) == cli.EXIT_CELLS_FAILED
        assert "accuracy: dense: 1 failed: decode: RuntimeError: torn" in capsys.readouterr().err
        assert len(lines(Path(str(config.out)))) == 1 + call
    assert cli.run_cli([*arguments, "--no-retry"]) == cli.EXIT_CELLS_FAILED
    assert len(lines(Path(str(config.out)))) == 4
    broken.clear()
    assert cli.run_cli(arguments) == cli.EXIT_DONE


def _flags(config: Any) -> list[str]:
    methods = [part for label in config.method_labels for part in ("-m", label)]
    lengths = ["-l", str(config.lengths_tokens[0]), "-n", str(config.samples), "--out", str(config.out)]
    rest = ["--max-new-tokens", "4", "--no-footprint", "--no-self-check", "--device", "cpu", "-t", "niah_single_1"]
    return ["--model", config.model, *methods, *lengths, *rest]


def test_only_what_is_asked_for_is_measured_again(small: MakeConfig, broken: list[str]) -> None:
    broken.append("failed")
    run(small(), progress=False)
    broken.clear()
    result = run(small(samples=1), progress=False)
    assert list(result.samples["status"]) == ["ok", "ok", "failed", "ok"]
    assert failures(result) == ["accuracy: dense: 1 failed: decode: RuntimeError: torn"]


def test_an_interrupted_retry_loses_nothing(
    small: MakeConfig, broken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken.append("failed")
    folder = run(small(), progress=False).folder
    before = (folder / "samples.jsonl").read_bytes()

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prefill_module, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(small(), progress=False)
    assert (folder / "samples.jsonl").read_bytes() == before
    assert list(load_run(folder).samples["status"]) == ["failed", "ok"] * 2
    broken.clear()
    assert failures(run(small(), progress=False)) == []


def test_a_row_edited_to_failed_is_measured_again(small: MakeConfig) -> None:
    folder = run(small(samples=1), progress=False).folder
    rows = lines(folder)
    empty = {"output": None, "score": None, "status": "failed", "reason": "edited"}
    text = [json.dumps({**rows[0], **empty}), json.dumps(rows[1])]
    (folder / "samples.jsonl").write_text("\n".join(text) + "\n")
    result = run(small(samples=1), progress=False)
    assert list(result.samples["status"]) == ["ok", "ok"]
    assert result.samples["output"].iloc[0] == rows[0]["output"]


def test_unsupported_rows_are_planned_anew(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in stand_ins.METHODS.items():
        monkeypatch.setitem(registry.METHODS, name, place)
    config = small(methods=["picky"], samples=1, footprint=True)
    run_here(monkeypatch)
    first = run(config, progress=False)
    assert list(first.samples["status"]) == list(first.footprint["status"]) == ["unsupported"]
    run(config, progress=False)
    assert len(lines(first.folder)) == 1, "as long as the plan says so, nothing is written again"
    monkeypatch.setattr(stand_ins.Picky, "unsupported", lambda self, shape, device: [])
    result = run(config, progress=False)
    assert list(result.samples["status"]) == list(result.footprint["status"]) == ["ok"]
    assert {cell.forecast for cell in result.info.plan} != {"unsupported"}


def test_a_killed_worker_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        real = process.worker_environment()
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
        paths = f"{tmp_path / 'bad'}:{real['PYTHONPATH']}"
        patch.setattr(process, "worker_environment", lambda: {**real, "PYTHONPATH": paths})
        first = run({**PRESET, "lengths_tokens": ["1k"]}, out=tmp_path / "run", progress=False)
    assert "killed by SIGKILL" in first.footprint["reason"].iloc[0]
    run_here(monkeypatch)
    result = run({**PRESET, "lengths_tokens": ["1k"]}, out=tmp_path / "run", progress=False)
    assert list(result.footprint["status"]) == ["ok"]
    assert len(lines(result.folder, "footprint.jsonl")) == 2


def test_a_model_that_was_away_is_back(small: MakeConfig, tiny_model: str, tmp_path: Path, monkeypatch: Any) -> None:
    jobs = run_here(monkeypatch)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    away = tmp_path / "away"
    monkeypatch.setattr(
        "kvscope.harness.passes.footprint.FootprintPass.summary",
        lambda self, row: model.rename(away) and "" if not away.exists() and model.exists() and len(jobs) == 1 else "",
    )
    config = small(model=str(model), samples=1, footprint=True, tasks=["niah_single_1"], footprint_decode_tokens=4)
    first = run(config, progress=False)
    assert list(first.footprint["status"]) == ["ok", "failed"]
    away.rename(model)
    assert list(run(config, progress=False).footprint["status"]) == ["ok", "ok"]


def test_throughput_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: list[str]) -> None:
    run_here(monkeypatch)
    values = {**PRESET, "throughput": True, "lengths_tokens": ["2k"], "max_batch": 2}
    broken.append("failed")
    assert list(run(values, out=tmp_path / "run", progress=False).throughput["status"]) == ["failed"]
    broken.clear()
    assert list(run(values, out=tmp_path / "run", progress=False).throughput["status"]) == ["ok"]


def test_a_search_that_failed_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: list[str]
) -> None:
    run_here(monkeypatch)
    values = {**PRESET, "find_max": True, "find_max_limit_tokens": "1k"}
    broken.append("failed")
    first = run(values, out=tmp_path / "run", progress=False)
    assert list(first.max_context["bound"]) == ["failed"]
    assert failures(first)
    kept = run({**values, "retry": False}, out=tmp_path / "run", progress=False)
    assert list(kept.max_context["bound"]) == ["failed"]
    broken.clear()
    result = run(values, out=tmp_path / "run", progress=False)
    assert list(result.max_context["bound"]) == ["limit"]
    assert failures(result) == []


def test_a_packed_run_keeps_the_later_rows(small: MakeConfig, broken: list[str], tmp_path: Path) -> None:
    broken.append("failed")
    run(small(samples=1), progress=False)
    broken.clear()
    folder = run(small(samples=1), progress=False).folder
    with RunStore.open(folder) as store:
        write_packed(tmp_path / "packed", store.info, store.rows())
        twice = store.rows()
    assert [row.status for row in read_packed(tmp_path / "packed").samples] == ["ok", "ok"]
    failed = twice.samples[0].model_copy(update={"status": "failed", "reason": "torn", "output": None, "score": None})
    twice.samples.insert(0, failed)
    write_packed(tmp_path / "history", store.info, twice)
    assert list(load_run(tmp_path / "history").samples["status"]) == ["ok", "ok"]
