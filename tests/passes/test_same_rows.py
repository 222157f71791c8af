"""Two runs of one configuration give the same rows but for times, whatever surrounds the process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import one_run
import pytest
from in_process import run_here

from kvscope.harness.passes.process import worker_environment
from kvscope.results.columns import SURROUNDINGS_COLUMNS, TIME_COLUMNS
from kvscope.results.memory_rows import FootprintRow
from kvscope.results.schema import SampleRow, ThroughputRow

PROGRAM = Path(__file__).resolve().parents[1] / "tools" / "one_run.py"
CONFIG = {
    "methods": ["dense", "random", "lsa:budget_tokens=128,selection=synthetic"],
    "tasks": ["niah_multikey_2", "long_qa"],
    "lengths_tokens": [1024],
    "samples": 1,
    "max_new_tokens": 4,
    "footprint_decode_tokens": 4,
    "device": "cpu",
}


def rows_elsewhere(model: str, out: Path, **surroundings: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a process of its own."""
    arguments = json.dumps({**CONFIG, "model": model, "out": str(out)})
    done = subprocess.run(
        [sys.executable, str(PROGRAM), arguments],
        env={**worker_environment(), **surroundings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def timeless(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    dropped = TIME_COLUMNS | SURROUNDINGS_COLUMNS
    return {
        kind: [{key: value for key, value in row.items() if key not in dropped} for row in rows]
        for kind, rows in found.items()
    }


@pytest.mark.slow
def test_rows_are_the_same_but_for_times(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Hash seed, locale, time zone, folder and what the process did before differ."""
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    surroundings = {"PYTHONHASHSEED": hash_seed, "LC_ALL": "C.UTF-8", "TZ": "Asia/Kathmandu"}
    run_here(monkeypatch)
    here = one_run.rows_of({**CONFIG, "model": tiny_model, "out": str(tmp_path / "a")})
    first = timeless(json.loads(json.dumps(here)))
    second = timeless(rows_elsewhere(tiny_model, tmp_path / "b" / "c", **surroundings))
    assert len(first["samples"]) == 2 * 3
    assert len(first["footprint"]) == 3
    assert {row["status"] for rows in first.values() for row in rows} == {"ok"}
    assert first == second


def test_every_time_of_a_row_is_listed() -> None:
    columns = {name for kind in (SampleRow, FootprintRow, ThroughputRow) for name in kind.model_fields}
    assert {name for name in columns if name.endswith("_s") or name.startswith("tokens_per_s")} == TIME_COLUMNS
    assert columns >= SURROUNDINGS_COLUMNS
