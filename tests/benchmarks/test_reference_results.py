"""The committed reference results: run in pieces, packed small, reported from the pack."""

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import fresh
import pytest
import yaml
from in_process import run_here
from synthetic_rows import demo_rows

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.results.frames import load_run
from kvscope.results.packed import Rows, read_packed, write_packed
from kvscope.results.store import RunStore, run_folders
from kvscope.tasks.long_qa.questions import POOLED

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reference_results.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_results", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPT.parent))  # as when it is run: the other two files of it lie beside it
    spec.loader.exec_module(module)
    return module


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    samples, footprints, info = demo_rows()
    write_packed(tmp_path, info, Rows(samples=samples, footprints=footprints))
    found = read_packed(tmp_path)
    assert found.samples == samples
    assert found.footprints == footprints
    store = RunStore.open(tmp_path)
    assert store.samples() == samples
    assert store.info == info
    frame = load_run(tmp_path).samples
    assert len(frame) == len(samples)


def test_what_prompts_share_is_stored_once(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    samples, _, info = demo_rows()
    write_packed(tmp_path, info, Rows(samples=samples))
    prompts = {(row.task, row.length_tokens, row.sample) for row in samples}
    assert pq.read_table(tmp_path / "prompts.parquet").num_rows == len(prompts) < len(samples)
    names = pq.read_schema(tmp_path / "samples.parquet").names
    assert "targets" not in names
    assert "prompt_sha256" not in names
    meta = pq.ParquetFile(tmp_path / "samples.parquet").metadata.row_group(0).column(0)
    assert meta.compression == "ZSTD"
    jsonl_bytes = sum(len(row.model_dump_json()) + 1 for row in samples)
    packed_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))
    assert packed_bytes < jsonl_bytes / 8


def test_a_packed_run_is_only_read(tmp_path: Path) -> None:
    samples, _, info = demo_rows()
    write_packed(tmp_path, info, Rows(samples=samples))
    with pytest.raises(UsageError, match="packed run, which is only read"):
        RunStore.create(tmp_path, info)


def test_damage_is_told(tmp_path: Path) -> None:
    samples, _, info = demo_rows()
    write_packed(tmp_path, info, Rows(samples=samples))
    (tmp_path / "samples.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match=r"samples\.parquet cannot be read"):
        RunStore.open(tmp_path)
    write_packed(tmp_path, info, Rows(samples=samples))
    other = tmp_path / "other"
    write_packed(other, info, Rows(samples=samples[-1:]))
    (tmp_path / "prompts.parquet").write_bytes((other / "prompts.parquet").read_bytes())
    with pytest.raises(UsageError, match="lacks prompt"):
        RunStore.open(tmp_path)


def test_a_cell_deals_out_its_parts(script: ModuleType) -> None:
    run = {"model": "reference", "methods": ["dense"], "tasks": ["vt"], "footprint": False, "samples": 3}
    parts = [{"lengths_tokens": ["1k"], "seeds": 2}, {"lengths_tokens": ["2k"], "samples": 1}]
    cell = script.Cell("a", 1, 1, run, parts)
    assert cell.prompts() == [6, 1]
    pieces = {name: (config.lengths_tokens, config.samples, config.seed) for name, config in cell.pieces()}
    assert pieces == {
        "part-0-seed-0": ((1024,), 3, 0),
        "part-0-seed-1": ((1024,), 3, 1),
        "part-1-seed-0": ((2048,), 1, 0),
    }


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        run_folders(tmp_path)


def test_the_committed_cell_list_holds_up(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Every configuration is valid, and accuracy has the samples a cell that were promised."""
    assert script.main(["plan"]) == 0
    assert "GPU-minutes planned in all" in capsys.readouterr().out
    lists = (script.CELLS_FILE, script.CELLS_FILE.with_name("reference_cells_cpu.yaml"))
    for cell in [cell for path in lists for cell in script.read_cells(path)]:
        for part, n in zip(cell.parts, cell.prompts(), strict=True):
            config = cell.config(part, 0)
            # Indexers and the model were trained on seeds from 1000 on.
            assert config.unscored or max(cell.seeds_of(part)) < 1000, cell.name
            if config.unscored:
                assert config.footprint_timeout_s < 240
                continue
            least = 200 if max(config.lengths_tokens) <= 131_072 else 50
            assert n >= least or f"{n} prompts a cell" in part.get("fewer", ""), (cell.name, part)
            if "long_qa" in config.task_labels and "carried" not in part:
                balanced = config.samples % len(POOLED) == 0
                assert balanced or "types are not balanced" in part.get("fewer", ""), (cell.name, part)


@pytest.mark.slow
def test_pieces_run_pack_and_report(
    script: ModuleType,
    tiny_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first piece runs in a process of its own, the others here: they differ in nothing but time."""
    run_here(monkeypatch)
    commands: list[list[str]] = []

    def run_piece(command: list[str], **options: Any) -> Any:
        commands.append(command)
        if len(commands) == 1:
            return fresh.instead_of_run(command, **options)
        return subprocess.CompletedProcess(command, cli.run_cli(command[3:]), "", "")

    monkeypatch.setattr(script.subprocess, "run", run_piece)
    cells = {
        "cells": [
            {
                "name": "accuracy",
                "planned_gpu_minutes": 1,
                "seeds": 2,
                "run": {
                    "model": tiny_model,
                    "methods": ["dense", "recency:recency_tokens=128"],
                    "tasks": ["niah_single_1"],
                    "lengths_tokens": [512],
                    "samples": 2,
                    "max_new_tokens": 2,
                    "footprint": False,
                    "device": "cpu",
                },
            },
            {
                "name": "longest",
                "planned_gpu_minutes": 1,
                "seeds": 1,
                "run": {
                    "model": "preset:tiny",
                    "methods": ["dense"],
                    "find_max": True,
                    "find_max_limit_tokens": "1k",
                    "footprint_decode_tokens": 4,
                    "device": "cpu",
                },
            },
        ]
    }
    path, work, out = tmp_path / "cells.yaml", tmp_path / "work", tmp_path / "h100"
    path.write_text(yaml.safe_dump(cells))
    common = ["--cells", str(path), "--work", str(work)]

    assert script.main(["run", *common, "--limit-s", "1"]) == 1
    assert "stopped before accuracy seed-0" in capsys.readouterr().out
    assert script.main(["pack", *common, "--out", str(out)]) == 1
    assert "still to be measured: accuracy, longest" in capsys.readouterr().out
    assert script.main(["run", *common, "--jobs", "1"]) == 0
    used = [json.loads(line) for line in (work / "accuracy" / "used.jsonl").read_text().splitlines()]
    assert [note["piece"] for note in used] == ["seed-0", "seed-1"]
    assert script.main(["run", *common]) == 0
    assert len((work / "accuracy" / "used.jsonl").read_text().splitlines()) == 2

    assert script.main(["pack", *common, "--out", str(out)]) == 0
    summary: list[dict[str, Any]] = json.loads((out / "cells.json").read_text())
    assert [(cell["name"], cell["pieces"], cell["rows"]) for cell in summary] == [("accuracy", 2, 8), ("longest", 1, 2)]
    assert [cell["planned_gpu_minutes"] for cell in summary] == [1, 1]
    assert summary[0]["used_gpu_minutes"] == pytest.approx(sum(note["seconds"] for note in used) / 60, abs=0.01)
    samples = load_run(out / "accuracy").samples
    assert sorted(set(samples["sample"])) == [0, 1, 2, 3]
    assert sorted(set(samples["seed"])) == [0, 1]
    assert samples["prompt_sha256"].nunique() == 4

    capsys.readouterr()
    assert cli.run_cli(["report", str(out)]) == 0
    text = capsys.readouterr().out
    assert "accuracy\n========" in text
    assert "n = 4 prompts a cell" in text
    assert "Longest context by method" in text
    assert (out / "accuracy" / "report" / "report.html").is_file()
    assert (out / "longest" / "report" / "report.html").is_file()


def test_accuracy_shares_the_gpu_and_memory_never_does(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = {"model": "reference", "methods": ["dense"], "lengths_tokens": ["1k"], "footprint": False}
    memory = {"model": "preset:tiny", "methods": ["dense"], "lengths_tokens": ["1k"]}
    cells = [script.Cell("a", 1, 3, accuracy), script.Cell("m", 1, 2, memory)]
    lock, together, most, shared = threading.Lock(), [], {"a": 0, "m": 0}, threading.Event()

    def run_piece(folder: Path, config: Any, *, limit_s: Any, jobs: float, gpu: Any, clients: Any) -> None:
        name = folder.parent.name
        with lock:
            together.append(name)
            most[name] = max(most[name], len(together))
            if len(together) == 2:
                shared.set()
        assert jobs == (2 if name == "a" else 1)
        shared.wait()  # the first piece of accuracy stays until a second one has joined it
        with lock:
            together.remove(name)

    monkeypatch.setattr(script, "run_piece", run_piece)
    monkeypatch.setattr(script, "is_done", lambda folder, config: False)
    assert script.run_cells(cells, tmp_path, limit_s=None, jobs=2) is False
    assert most == {"a": 2, "m": 1}


def test_pieces_are_dealt_out_over_gpus(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = {"model": "reference", "methods": ["dense"], "lengths_tokens": ["1k"], "footprint": False}
    seen: list[tuple[float, int | None]] = []
    four_at_once = threading.Barrier(4)

    def run_piece(folder: Path, config: Any, *, limit_s: Any, jobs: float, gpu: int | None, clients: Any) -> None:
        seen.append((jobs, gpu))
        four_at_once.wait()

    monkeypatch.setattr(script, "run_piece", run_piece)
    monkeypatch.setattr(script, "is_done", lambda folder, config: False)
    script.run_cells([script.Cell("a", 1, 8, accuracy)], tmp_path, limit_s=None, jobs=4, gpus=2)
    assert {jobs for jobs, _ in seen} == {2}
    assert {gpu for _, gpu in seen} == {0, 1}


def test_shared_pieces_alone_are_clients_of_the_service(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has ended before memory or time is measured; a piece of accuracy notes that it was one."""
    accuracy = {"model": "reference", "methods": ["dense"], "lengths_tokens": ["1k"], "footprint": False}
    memory = {"model": "preset:tiny", "methods": ["dense"], "lengths_tokens": ["1k"]}
    cells = [script.Cell("m", 1, 1, memory), script.Cell("a", 1, 2, accuracy)]
    happened: list[str] = []

    @contextmanager
    def service() -> Iterator[dict[str, str]]:
        happened.append("begins")
        yield {"CUDA_MPS_PIPE_DIRECTORY": "/there"}
        happened.append("ends")

    def run(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        happened.append(env.get("CUDA_MPS_PIPE_DIRECTORY", "alone"))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script, "multi_process_service", service)
    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script, "is_done", lambda folder, config: False)
    script.run_cells(cells, tmp_path, limit_s=None, jobs=2, mps=True)
    assert happened == ["begins", "/there", "/there", "ends", "alone"]
    notes = [json.loads(line) for line in (tmp_path / "a" / "used.jsonl").read_text().splitlines()]
    assert [note["mps"] for note in notes] == [True, True]
    assert "mps" not in json.loads((tmp_path / "m" / "used.jsonl").read_text())
    happened.clear()
    script.run_cells(cells[1:], tmp_path, limit_s=None, jobs=2)
    assert happened == ["alone", "alone"]


def test_what_a_piece_took_counts_for_its_part_of_the_gpu(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    clock = iter([100.0, 220.0])

    def finished(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        seen["threads"] = env["OMP_NUM_THREADS"]
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(script.subprocess, "run", finished)
    monkeypatch.setattr(script.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(script.time, "monotonic", lambda: next(clock))
    cell = script.Cell("a", 1, 1, {"model": "preset:tiny"})
    script.run_piece(tmp_path / "a" / "seed-0", cell.pieces()[0][1], limit_s=None, jobs=4)
    assert seen == {"threads": "4"}
    assert script.used_minutes(tmp_path, cell) == 0.5

    def broken(command: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 3, "", "kvscope: torch sees no CUDA GPU")

    clock = iter([0.0, 1.0])
    monkeypatch.setattr(script.subprocess, "run", broken)
    with pytest.raises(UsageError, match="a/seed-0 ended with 3: kvscope: torch sees no CUDA GPU"):
        script.run_piece(tmp_path / "a" / "seed-0", cell.pieces()[0][1], limit_s=None)


def test_bad_lists_and_names_are_told(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cells.yaml"
    path.write_text("cells: [{name: x}]")
    assert script.main(["plan", "--cells", str(path)]) == 2
    assert script.main(["plan", "--cells", str(tmp_path / "none.yaml")]) == 2
    assert script.main(["plan", "--cell", "accuracy-9k"]) == 2
    assert "There is no cell 'accuracy-9k'" in capsys.readouterr().err
    assert script.main(["run"]) == 2
    assert "--work DIR" in capsys.readouterr().err
