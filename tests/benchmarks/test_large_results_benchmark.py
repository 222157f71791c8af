"""The folder that the benchmark of large results makes is a run like any other."""

from pathlib import Path

import pytest

from kvscope.reports.coverage import coverage
from kvscope.results.frames import load_run

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_invented_folder_is_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import large_results

    assert large_results.make_folder(tmp_path, rows=400) == 400
    run = load_run(tmp_path)
    assert len(run.samples) == 400
    assert coverage(run).sentences() == []
    assert set(run.samples["score"]) > {0.0, 1.0}
    assert run.samples["context_id"].nunique() == len(large_results.LENGTHS_TOKENS)
