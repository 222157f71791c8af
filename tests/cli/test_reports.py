"""Reports of a folder of runs: one that cannot be read does not stop the others."""

import os
from pathlib import Path

import pytest
from synthetic_rows import single_rows

from kvscope.cli import run_cli
from kvscope.results.store import RunStore


def test_a_bad_run_is_named_and_the_runs_behind_it_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, _, info = single_rows()
    bad = tmp_path / "a\x1b[31m"
    bad.mkdir()
    os.mkfifo(bad / "run.json")
    with RunStore.create(tmp_path / "good", info) as store:
        store.append_sample(samples[0])
    assert run_cli(["report", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (tmp_path / "good/report/report.html").is_file()
    assert "\x1b" not in out + err
    assert err.count("\n") == 1
    assert r"a\x1b[31m/run.json is no regular file" in err
    index = (tmp_path / "index.html").read_text()
    assert f"index    {tmp_path / 'index.html'}" in out
    assert '<a href="good/report/report.html">good</a>' in index
    assert r"a\x1b[31m/run.json is no regular file" in index


def test_a_single_bad_run_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("[" * 100_000)
    assert run_cli(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
