"""The committed H100 runs give the CSV files they gave before the rooms were built (commit c942a2f).

`reference_csvs.json` holds the SHA-256 of every CSV that `kvscope report results/reference/h100` wrote then. CSVs have
nine digits, so the processor's rounding does not show.
"""

import hashlib
import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from kvscope.reports import make_report
from kvscope.reports.build import all_figures
from kvscope.reports.cells import accuracy_cells
from kvscope.reports.export import write_csv
from kvscope.reports.figure_parts import ReportFigure
from kvscope.reports.tables import all_tables
from kvscope.results.frames import load_run

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference" / "h100"
BEFORE: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("reference_csvs.json").read_text())
#: Together they have every table and figure of a report. `dense`, `lsa-long` and `methods` show no other kind and take
#: longest.
CHECKED = ["lsa", "lsa-apart", "lsa-vt", "footprint-llama-3.1-8b-512k", "footprint-llama-3.1-8b-synthetic",
           "longest-qwen3-8b-24gib", "throughput-llama-3.1-8b"]  # fmt: skip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def csvs(cell: str, folder: Path) -> dict[str, str]:
    """The CSV files of a report, made as the report makes them, without drawing PNG and SVG."""
    run = load_run(REFERENCE / cell)
    cells = accuracy_cells(run)
    found = {}
    for table in all_tables(run, cells):
        write_csv(table.data, folder / "table.csv")
        found[f"tables/{table.name}.csv"] = sha256(folder / "table.csv")
    for figure in all_figures(run, cells):
        if isinstance(figure, ReportFigure):
            write_csv(figure.data, folder / "figure.csv")
            found[f"figures/{figure.name}.csv"] = sha256(folder / "figure.csv")
    plt.close("all")
    return found


@pytest.mark.parametrize("cell", CHECKED)
def test_a_committed_run_gives_the_csv_files_it_gave(cell: str, tmp_path: Path) -> None:
    assert csvs(cell, tmp_path) == BEFORE[cell]


def test_the_report_of_a_folder_writes_these_files(tmp_path: Path) -> None:
    cell = "throughput-llama-3.1-8b"
    shutil.copytree(REFERENCE / cell, tmp_path / cell)
    paths = [path for path in make_report(tmp_path / cell) if path.suffix == ".csv"]
    report = tmp_path / cell / "report"
    assert {path.relative_to(report).as_posix(): sha256(path) for path in paths} == BEFORE[cell]


def test_every_committed_cell_was_recorded_and_every_file_kind_is_checked() -> None:
    assert set(BEFORE) == {path.parent.name for path in REFERENCE.glob("*/run.json")}
    assert {name for cell in CHECKED for name in BEFORE[cell]} == {name for files in BEFORE.values() for name in files}
