"""The captured environment: JSON, complete, and free of names and places of the machine."""

import getpass
import json
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from kvscope.harness.passes.environment import capture_environment, git_state


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have told a commit."""
    monkeypatch.delenv("KVSCOPE_COMMIT", raising=False)


def test_it_is_json_and_names_the_versions() -> None:
    environment = capture_environment(device="cpu", attention_backend="sdpa")
    assert json.loads(json.dumps(environment)) == environment
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["attention_backend"] == "sdpa"
    assert environment["gpu"] is None
    assert environment["cpu_cores"] >= 1


def test_no_host_user_or_path_is_in_it() -> None:
    text = json.dumps(capture_environment(device="cpu"))
    host = socket.gethostname()
    assert len(host) < 4 or host not in text
    assert str(Path.home()) == "/" or str(Path.home()) not in text
    assert str(Path(__file__).resolve().parents[2]) not in text
    assert len(getpass.getuser()) < 5 or getpass.getuser() not in text


def test_a_checkout_tells_commit_and_dirt(tmp_path: Path) -> None:
    (tmp_path / "src" / "kvscope").mkdir(parents=True)
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "one"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "new").write_text("x")
    assert git_state(tmp_path)["dirty"] is True


def test_somebody_elses_checkout_is_not_ours(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert git_state(tmp_path) == {"commit": None, "dirty": None}


def test_no_checkout_is_unknown(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "dirty": None}


def test_a_copy_can_be_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSCOPE_COMMIT", "a" * 40)
    assert git_state(tmp_path) == {"commit": "a" * 40, "dirty": None}
    assert git_state(Path(__file__).parent)["commit"] == "a" * 40
