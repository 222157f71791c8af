"""The committed H100 runs give the CSV files they gave before the rooms were built (commit c942a2f).

`reference_csvs.json` holds, of every CSV that `kvscope report results/reference/h100` wrote then, its SHA-256 and its
columns. Files with bootstrap intervals were recorded anew when these were widened for few clusters. Columns added since
are left out before the hashes are compared; one that is gone or renamed fails. CSVs have nine digits, so that the
processor's rounding does not show.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from kvscope.reports import make_report
from kvscope.reports.build import all_figures
from kvscope.reports.cells import accuracy_cells
from kvscope.reports.export import write_csv
from kvscope.reports.figure_parts import ReportFigure
from kvscope.reports.tables import all_tables
from kvscope.results.frames import load_run

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference" / "h100"
BEFORE: dict[str, dict[str, dict[str, Any]]] = json.loads(Path(__file__).with_name("reference_csvs.json").read_text())
#: Together they have every table and figure of a report. `dense`, `lsa-long` and `methods` show no other kind and take
#: longest.
CHECKED = ["lsa", "lsa-apart", "lsa-vt", "footprint-llama-3.1-8b-512k", "footprint-llama-3.1-8b-synthetic",
           "longest-qwen3-8b-24gib", "throughput-llama-3.1-8b"]  # fmt: skip
#: Files that reports have written since.
SINCE = {"tables/main.csv", "figures/accuracy_minus_dense.csv"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_before(cell: str, name: str, data: pd.DataFrame, folder: Path) -> str:
    """The hash of a table with the columns it had."""
    write_csv(data[BEFORE[cell][name]["columns"]], folder / "as_before.csv")
    return sha256(folder / "as_before.csv")


@pytest.mark.parametrize("cell", CHECKED)
def test_a_committed_run_gives_the_csv_files_it_gave(cell: str, tmp_path: Path) -> None:
    """Made as the report makes them, without drawing PNG and SVG."""
    run = load_run(REFERENCE / cell)
    cells = accuracy_cells(run)
    data = {f"tables/{table.name}.csv": table.data for table in all_tables(run, cells)}
    figures = [figure for figure in all_figures(run, cells) if isinstance(figure, ReportFigure)]
    data |= {f"figures/{figure.name}.csv": figure.data for figure in figures}
    plt.close("all")
    found = {name: as_before(cell, name, frame, tmp_path) for name, frame in data.items() if name not in SINCE}
    assert found == {name: before["sha256"] for name, before in BEFORE[cell].items()}
    assert {*data} - {*found} <= SINCE


def test_the_report_of_a_folder_writes_these_files(tmp_path: Path) -> None:
    cell = "throughput-llama-3.1-8b"
    shutil.copytree(REFERENCE / cell, tmp_path / cell)
    paths = [path for path in make_report(tmp_path / cell) if path.suffix == ".csv"]
    report = tmp_path / cell / "report"
    found = {path.relative_to(report).as_posix(): path.read_text().splitlines()[0].split(",") for path in paths}
    assert set(found) - SINCE == set(BEFORE[cell])
    assert all(set(before["columns"]) <= set(found[name]) for name, before in BEFORE[cell].items())


def test_every_committed_cell_was_recorded_and_every_file_kind_is_checked() -> None:
    assert set(BEFORE) == {path.parent.name for path in REFERENCE.glob("*/run.json")}
    assert {name for cell in CHECKED for name in BEFORE[cell]} == {name for files in BEFORE.values() for name in files}
