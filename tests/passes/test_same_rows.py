"""Two runs of one configuration give the same rows but for times, whatever surrounds the process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def rows_of(model: str, out: Path, **surroundings: str) -> dict[str, list[dict[str, Any]]]:
    environment = {**worker_environment(), **surroundings}
    arguments = json.dumps({**CONFIG, "model": model, "out": str(out)})
    done = subprocess.run(
        [sys.executable, str(PROGRAM), arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return {
        kind: [
            {key: value for key, value in row.items() if key not in TIME_COLUMNS | SURROUNDINGS_COLUMNS} for row in rows
        ]
        for kind, rows in found.items()
    }


def test_rows_are_the_same_but_for_times(tiny_model: str, tmp_path: Path) -> None:
    """Hash seed, locale, time zone and folder differ."""
    first = rows_of(tiny_model, tmp_path / "a", PYTHONHASHSEED="1", LC_ALL="C", TZ="UTC")
    second = rows_of(tiny_model, tmp_path / "b" / "c", PYTHONHASHSEED="77", LC_ALL="C.UTF-8", TZ="Asia/Kathmandu")
    assert len(first["samples"]) == 2 * 3
    assert len(first["footprint"]) == 3
    assert {row["status"] for rows in first.values() for row in rows} == {"ok"}
    assert first == second


def test_every_time_of_a_row_is_listed() -> None:
    columns = {name for kind in (SampleRow, FootprintRow, ThroughputRow) for name in kind.model_fields}
    assert {name for name in columns if name.endswith("_s") or name.startswith("tokens_per_s")} == TIME_COLUMNS
    assert columns >= SURROUNDINGS_COLUMNS
