"""The work of reading and reporting a run grows as its rows do: counted in calls, which no busy machine changes."""

import cProfile
import pstats
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from synthetic_rows import make_rows

from kvscope.reports.cells import accuracy_cells
from kvscope.reports.coverage import coverage
from kvscope.reports.figures_residency import refreshes
from kvscope.reports.legible import legible
from kvscope.reports.tables import all_tables
from kvscope.results.frames import load_run
from kvscope.results.schema import ResidencyRecord

CELLS = 8
#: pydantic 2.10 answers isinstance by Python code of its own: two calls more for each of 6.5 a row.
OF_ISINSTANCE = 16 if version("pydantic").startswith("2.10.") else 0
RESIDENCY = ResidencyRecord(tau=4, prompt_tokens=9, resident_tokens=(4, 5), recalled_bytes=(0, 9), fallbacks=0)


def folder_of(folder: Path, *, samples: int) -> Path:
    """A run of `CELLS` times so many rows, a quarter of them with shared contexts and a residency."""
    rows, _, info = make_rows(
        ["dense", "recency"], tasks=("niah_single_1", "t"), lengths=(4096, 8192), samples=samples, footprint_lengths=()
    )
    shared = {"residency": RESIDENCY}
    rows = [
        row.model_copy(update=shared | {"context_id": f"text {row.sample // 2}"} if row.task == "t" else {})
        for row in rows
    ]
    folder.mkdir()
    (folder / "run.json").write_text(info.model_dump_json())
    (folder / "samples.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    return folder


def read(folder: Path) -> None:
    load_run(folder)


def tabulated(folder: Path) -> None:
    run = legible(load_run(folder))
    all_tables(run, accuracy_cells(run))
    refreshes(run)
    coverage(run)


def calls(work: Callable[[Path], None], folder: Path) -> int:
    profile = cProfile.Profile()
    profile.runcall(work, folder)
    return pstats.Stats(profile).total_calls


@pytest.mark.parametrize(("work", "most_a_row"), [(read, 40), (tabulated, 120)], ids=["load", "tables"])
def test_calls_grow_with_rows(work: Callable[[Path], None], most_a_row: int, tmp_path: Path) -> None:
    sizes = (100, 200, 400)
    folders = [folder_of(tmp_path / str(samples), samples=samples) for samples in sizes]
    work(folders[0])  # imports and caches
    few, more, most = (calls(work, folder) for folder in folders)
    assert (more - few) / (CELLS * 100) < most_a_row + OF_ISINSTANCE
    assert (most - more) < 2.2 * (more - few)
