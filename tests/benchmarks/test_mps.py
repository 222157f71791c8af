"""The Multi-Process Service around pieces that share a GPU, with a control program that only notes what it is asked."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvscope.errors import UsageError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def mps() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mps", BENCHMARKS / "mps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def control(folder: Path, *, status: int = 0) -> Path:
    """A program that writes down its arguments, its input and where clients are to meet it."""
    folder.mkdir()
    path = folder / "nvidia-cuda-mps-control"
    path.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        f"with open({str(folder / 'log')!r}, 'a') as log:\n"
        "    said = sys.stdin.read().strip() if len(sys.argv) == 1 else ''\n"
        "    print(sys.argv[1:], said, os.environ['CUDA_MPS_PIPE_DIRECTORY'], file=log)\n"
        "sys.stderr.write('no such device')\n"
        f"sys.exit({status})\n"
    )
    path.chmod(0o755)
    return folder / "log"


def test_it_runs_for_its_clients_and_ends_with_them(mps: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    log = control(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    met: dict[str, str] = {}

    def piece() -> None:
        with mps.multi_process_service() as clients:
            met.update(clients)
            assert Path(clients["CUDA_MPS_PIPE_DIRECTORY"]).is_dir()
            assert Path(clients["CUDA_MPS_LOG_DIRECTORY"]).is_dir()
            assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ, "others on the card stay outside it"
            raise RuntimeError("a piece failed")

    with pytest.raises(RuntimeError, match="a piece failed"):
        piece()
    pipe = met["CUDA_MPS_PIPE_DIRECTORY"]
    assert log.read_text().splitlines() == [f"['-d']  {pipe}", f"[] quit {pipe}"]
    assert not Path(pipe).exists()


def test_a_service_that_does_not_start_is_told(mps: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    control(tmp_path / "bin", status=1)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UsageError, match=r"-d failed .* no such device: leave out --mps"), mps.multi_process_service():
        pytest.fail("it did not start")


def test_a_machine_without_it_is_told(mps: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(mps, "_DRIVER_PROGRAMS", (str(tmp_path),))
    with pytest.raises(UsageError, match=r"nvidia-cuda-mps-control is neither on the PATH nor in .*: install the"):
        mps.control_program()
