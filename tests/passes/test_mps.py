"""Processes that share a GPU run side by side where the driver can, and a line says so."""

import os
from pathlib import Path

import pytest

from kvscope.harness.passes import mps

TWO = ["cuda:0", "cuda:0", "cuda:1"]


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Return where notes go; no service runs, and none is installed."""
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(mps, "_OWNERS_PIPE", tmp_path / "absent")
    monkeypatch.setattr(mps, "_DRIVER_PROGRAMS", (str(tmp_path),))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return []


def install(folder: Path, script: str) -> None:
    program = folder / mps.CONTROL
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize("devices", [["cpu", "cpu"], ["cuda:0", "cuda:1"], ["cuda:0"]])
def test_nothing_is_started_where_no_gpu_is_shared(notes: list[str], tmp_path: Path, devices: list[str]) -> None:
    install(tmp_path, "exit 3")
    with mps.side_by_side(devices, note=notes.append) as environment:
        assert environment == {}
    assert notes == []


def test_the_service_is_started_for_them_and_ended(notes: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    install(tmp_path, f'echo "$1 $CUDA_MPS_PIPE_DIRECTORY" >> {log}; [ -n "$1" ] || cat >> {log}')
    with mps.side_by_side(TWO, note=notes.append) as environment:
        assert log.read_text() == f"-d {environment['CUDA_MPS_PIPE_DIRECTORY']}\n"
        assert all(Path(folder).is_dir() for folder in environment.values())
    assert log.read_text().endswith("quit\n")
    assert notes == ["Processes share cuda:0 through CUDA's Multi-Process Service, started for them."]
    assert not Path(environment["CUDA_MPS_PIPE_DIRECTORY"]).exists()


def test_a_service_of_the_owner_is_used(notes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "exit 3")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    with mps.side_by_side(TWO, note=notes.append) as environment:
        assert environment == {}  # theirs is inherited
    assert "runs already" in notes[0]


@pytest.mark.parametrize(
    ("script", "why"), [(None, "neither on the PATH"), ("echo no such card >&2; exit 1", "no such card")]
)
def test_without_it_they_take_turns_and_a_line_says_so(
    notes: list[str], tmp_path: Path, script: str | None, why: str
) -> None:
    if script is not None:
        install(tmp_path, script)
    with mps.side_by_side(TWO, note=notes.append) as environment:
        assert environment == {}
    assert len(notes) == 1
    assert "take turns" in notes[0]
    assert why in notes[0]
    assert os.environ["PATH"] == "/usr/bin:/bin"
