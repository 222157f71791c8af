"""Dense against dense: how far answers move between two runs with nothing to be compared."""

from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from kvscope.errors import UsageError, shown
from kvscope.results.comparisons import DEFAULT_MARGIN, Comparison, answered, compare_runs, pooled
from kvscope.results.frames import Run, load_run
from kvscope.results.plain_text import visible
from kvscope.results.statistics import Interval

COLUMNS = ("batch", "device", "dtype", "method_from", "model", "step_backend", "torch_version", "transformers_version")
"""Columns of rows that say how they were computed."""
FIRST, SECOND = "first", "second"


def noise_floor_text(first: Path, second: Path, *, method: str) -> str:
    """Return what differs between two runs of a method, and how far its answers do, as plain text.

    Raises:
        UsageError: a folder that holds no run, or no answer of the method; runs over other prompts.
    """
    frames = [_answers(load_run(folder), folder, method) for folder in (first, second)]
    found = compare_runs(*frames, names=(FIRST, SECOND))
    if not found:
        raise UsageError(
            f"{shown(str(first))} and {shown(str(second))} have no prompt in common: a noise floor is that of the same "
            "tasks, lengths and seed."
        )
    rows = [_row(each) for each in found]
    margin = f"at {100 * DEFAULT_MARGIN:g} point"
    header = ["prompts", "pairs", f"{FIRST} (%)", f"{SECOND} (%)", "difference (points)", "pairs that differ", margin]
    return "\n".join(
        [
            f"{visible(method)} in two runs over the same prompts; {FIRST}: {visible(str(first))}, {SECOND}: "
            f"{visible(str(second))}",
            *_differing(*frames),
            tabulate(rows, headers=header, tablefmt="simple", disable_numparse=True),
            "Intervals are of 95 %; equivalence is tested on both sides at 5 % (TOST).",
        ]
    )


def _answers(run: Run, folder: Path, method: str) -> pd.DataFrame:
    rows = answered(pooled(run.samples, run.info))
    rows = rows[rows["method_label"] == method]
    if not len(rows):
        labels = ", ".join(each.label for each in run.info.methods)
        raise UsageError(f"{shown(str(folder))} holds no answer of {shown(method)}; its methods are {labels}.")
    return rows


def _differing(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    """Return one line for each column that the runs differ in, with both values."""
    lines = []
    for column in COLUMNS:
        before, after = (_values(frame[column]) for frame in (first, second))
        if before != after:
            lines.append(f"{column}: {before} against {after}")
    return lines or ["nothing that rows say of how they were computed differs"]


def _values(column: "pd.Series[Any]") -> str:
    return ", ".join(sorted({visible(str(value)) for value in column.dropna()})) or "unknown"


def _row(found: Comparison) -> list[str]:
    paired = found.paired
    return [
        visible(found.scope),
        f"{paired.n_pairs:,}",
        f"{100 * found.baseline_mean:.1f}",
        f"{100 * found.method_mean:.1f}",
        _points(paired.difference),
        f"{paired.discordant:,} ({100 * paired.discordant / paired.n_pairs:.1f} %)",
        paired.equivalence.verdict,
    ]


def _points(interval: Interval) -> str:
    middle = f"{100 * interval.mean:+.1f}"
    if interval.low is None or interval.high is None:
        return f"{middle} (no interval)"
    return f"{middle} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
