"""The page over a folder of runs: a row for every method of every run, sorted by whatever column, no script."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kvscope.reports.build import REPORT_FOLDER
from kvscope.reports.cells import accuracy_cells
from kvscope.reports.coverage import coverage
from kvscope.reports.html import template
from kvscope.reports.place import put_index
from kvscope.reports.table_parts import Notes
from kvscope.reports.tables_memory import stays_table
from kvscope.reports.units import length_text, milliseconds, percent, points, with_interval
from kvscope.results.frames import Run, records
from kvscope.results.plain_text import shortened, visible

NOT_MEASURED = "n/m"
_MOST_NAME_CHARS = 80


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, what it is sorted by (None: last, both ways), where it leads, why a time is doubted."""

    text: str
    key: float | str | None
    href: str = ""
    doubts: str = ""


#: Header and whether its cells are numbers, which are set to the right.
COLUMNS = (
    ("run", False),
    ("method", False),
    ("model", False),
    ("device", False),
    ("length", True),
    ("accuracy (%)", True),
    ("minus dense (points)", True),
    ("of dense (%)", True),
    ("TPOT (ms)", True),
    ("NVML's verdict", False),
    ("prompts", True),
    ("state", False),
    ("started (UTC)", False),
)


def index_rows(run: Run) -> list[list[Cell]]:
    """Return the rows of one run, a method each; measured values are those of its first table, at one length.

    `run` is legible. A row has as many cells as there are `COLUMNS`.
    """
    state = coverage(run)
    said = (
        "unfinished"
        if not state.complete
        else "with failures"
        if state.not_measured or state.mismatches
        else "complete"
    )
    name = visible(run.folder.name)
    link = f"{quote(run.folder.name, errors='surrogateescape')}/{REPORT_FOLDER}/report.html"
    device = shortened(str(run.info.environment.get("gpu") or "CPU"), most=_MOST_NAME_CHARS)
    cells = {row["method_label"]: row for row in records(stays_table(run, accuracy_cells(run)).data)}
    return [
        [
            Cell(name, name, link),
            _text(method.label),
            _text(run.info.model),
            _text(device),
            *_measured(cells[method.label]),
            _text(said),
            Cell(run.info.started_utc[:16].replace("T", " "), run.info.started_utc),
        ]
        for method in run.info.methods
    ]


def write_index(folder: Path, rows: Sequence[Sequence[Cell]], faults: Sequence[str]) -> Path:
    """Write `index.html` of a folder of runs; `faults` says why runs are not in it.

    Raises:
        UsageError: a file of that name is there that is no such page.
        EnvironmentProblem: the folder cannot be written.
    """
    return put_index(folder, page(rows, faults))


def page(rows: Sequence[Sequence[Cell]], faults: Sequence[str]) -> str:
    """Return the page."""
    columns = [[row[place] for row in rows] for place in range(len(COLUMNS))]
    ranks = [(_ranks(column, down=False), _ranks(column, down=True)) for column in columns]
    notes = Notes()
    shown = [
        {
            "cells": [
                {"text": notes.doubted(cell.text, cell.doubts), "href": cell.href, "numeric": numeric}
                for cell, (_, numeric) in zip(row, COLUMNS, strict=True)
            ],
            "order": ";".join(f"--u{place}:{up[at]};--d{place}:{down[at]}" for place, (up, down) in enumerate(ranks)),
        }
        for at, row in enumerate(rows)
    ]
    return template("index.html.j2").render(
        columns=COLUMNS,
        rows=shown,
        n_runs=len({row[0].href for row in rows}),
        faults=list(map(visible, faults)),
        notes=notes.lines(),
    )


def _ranks(column: Sequence[Cell], *, down: bool) -> list[int]:
    """Return the place of each cell in the order of their keys; equal ones share one, those without are last."""
    keys = sorted({cell.key for cell in column if cell.key is not None}, reverse=down)
    place = {key: at for at, key in enumerate(keys)}
    return [len(keys) if cell.key is None else place[cell.key] for cell in column]


def _measured(row: dict[str, Any]) -> list[Cell]:
    """Return the cells from length to prompts of one row of `stays_table`."""
    times = (row["tpot_s"], row["tpot_p10_s"], row["tpot_p90_s"])
    ends = (row["difference_low"], row["difference_high"])
    verdict = None if row["verdict"] == "not_measured" else row["verdict"]
    return [
        _value(row["length_tokens"], length_text),
        _value(row["accuracy"], lambda value: with_interval(value, row["ci_low"], row["ci_high"])),
        _value(row["difference_to_dense"], lambda value: with_interval(value, *ends, text=points)),
        _value(row["held_of_dense"], percent),
        _value(row["tpot_s"], lambda _: milliseconds(*times), doubts=row["time_doubts"] or ""),
        _value(verdict, str),
        _value(row["n"], str),
    ]


def _text(text: str) -> Cell:
    return Cell(shortened(text, most=_MOST_NAME_CHARS), text)


def _value(value: Any, text: Callable[[Any], str], *, doubts: str = "") -> Cell:
    if value is None:
        return Cell(NOT_MEASURED, None)
    # A line may break before an interval, not in it.
    return Cell(text(value).replace(", ", ",\u00a0"), value, doubts=doubts)
