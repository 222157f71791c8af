"""What a benchmark's script cannot do is told in one sentence, with the exit code of ``kvscope`` itself."""

import sys
from pathlib import Path

import pytest
from benchmark_scripts import load_script


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("equal_bytes", ["plan", "--samples", "-1"], "samples in equal_bytes.yaml is -1"),
        ("equal_bytes", ["plan", "--length", "banana"], "is 'banana'"),
        ("equal_bytes", ["result", "--work", "none"], "does not exist"),
        ("equal_bytes", ["run", "--work", "none", "--time-limit", "nan"], "--time-limit nan: give seconds above 0"),
        ("own_cells", ["none", "none"], "does not exist"),
        ("stock_ruler", ["answer", "--prompts", "none", "--out", "none"], "none has no whole"),
        ("stock_ruler", ["table", "none.json"], "give a file that `score` wrote"),
    ],
)
def test_one_sentence(
    script: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    module = load_script(monkeypatch, script)
    assert module.ended(module.main) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
