"""Times with their spread, and those that are not to be trusted: marked wherever they are quoted."""

import re
from typing import Any

import pytest
from pydantic import ValidationError
from synthetic_rows import Rows, demo_rows

from kvscope.reports.cells import accuracy_cells
from kvscope.reports.coverage import coverage
from kvscope.reports.figures_memory import tpot_by_length
from kvscope.reports.summary import summary_text
from kvscope.reports.tables import all_tables
from kvscope.reports.trust import time_doubts
from kvscope.reports.units import milliseconds
from kvscope.results.frames import Run, make_run
from kvscope.results.memory_rows import FootprintRow

OTHERS = "2 other processes on the GPU"


def timed(rows: Rows, **of_random: Any) -> Run:
    """The run with a spread in every row; rows of `random` are changed."""
    footprints = []
    for row in rows[1]:
        updates: dict[str, Any] = {"tpot_p10_s": 0.99 * row.tpot_s, "tpot_p90_s": 1.02 * row.tpot_s}  # type: ignore[operator]
        updates |= of_random if row.method == "random" else {}
        footprints.append(FootprintRow.model_validate(row.model_dump() | updates))
    return make_run(rows[0], footprints, info=rows[2], folder=".")


@pytest.mark.parametrize(
    ("row", "doubts"),
    [
        ({}, ""),
        ({"other_processes": 0, "load_1min": 2.4, "cpu_cores": 2, "tpot_p10_s": 1.0, "tpot_p90_s": 1.5}, ""),
        ({"other_processes": 2}, OTHERS),
        ({"load_1min": 2.6, "cpu_cores": 2}, "host load over 2.5 on 2 cores"),
        ({"load_1min": 4.1, "cpu_cores": 2}, "host load over 4 on 2 cores"),
        ({"load_1min": 8.0, "cpu_cores": 2}, "host load over 4 on 2 cores"),
        ({"load_1min": 2.6}, ""),
        ({"tpot_p10_s": 1.0, "tpot_p90_s": 1.6}, "p90 of the steps is over 1.5 times p10"),
        ({"step_p10_s": 1.0, "step_p90_s": 1.6}, "p90 of the steps is over 1.5 times p10"),
        (
            {"other_processes": 1, "load_1min": 9, "cpu_cores": 2},
            "1 other process on the GPU; host load over 8 on 2 cores",
        ),
    ],
)
def test_what_a_row_says_against_its_times(row: dict[str, Any], doubts: str) -> None:
    assert time_doubts(row) == doubts


def test_doubtful_times_are_marked_wherever_they_are_quoted() -> None:
    run = timed(demo_rows(), other_processes=2)
    for table in all_tables(run, accuracy_cells(run)):
        if "TPOT (ms)" not in table.text:
            continue
        cells = dict(zip(table.text["method"], table.text["TPOT (ms)"], strict=True))
        note = next(note for note in table.notes if "not to be trusted" in note)
        assert note.endswith(f"time not to be trusted: {OTHERS}.")
        assert cells["random"].endswith(note[: note.index(")") + 1])
        assert not cells["dense"].endswith(")")
    summary = summary_text(run)
    assert f"(a) time not to be trusted: {OTHERS}." in summary
    assert re.search(r"^random +10\.\d \[\d+\.\d, \d+\.\d\] \(a\) ", summary, re.MULTILINE)
    assert coverage(run).sentences() == [f"Times are not to be trusted: {OTHERS} (random at 2K, random at 8K)."]
    figure = tpot_by_length(run)
    assert OTHERS in figure.caption  # type: ignore[union-attr]
    (axes,) = figure.figure.axes  # type: ignore[union-attr]
    hollow = [line for line in axes.lines if line.get_marker() != "None" and line.get_markerfacecolor() == "white"]
    assert len(hollow) == 2


def test_rows_without_a_spread_say_so() -> None:
    samples, footprints, info = demo_rows()
    text = summary_text(make_run(samples, footprints, info=info, folder="."))
    assert "Time per output token (ms, median; spread not recorded)" in text
    assert "not to be trusted" not in text


@pytest.mark.parametrize(
    ("ends", "text"),
    [((9.65e-3, 9.812e-3), "9.70 [9.65, 9.81]"), ((9.6999e-3, 9.7001e-3), "9.70 [9.70, 9.70]"), ((None, None), "9.70")],
)
def test_ends_are_rounded_like_the_median(ends: tuple[float | None, float | None], text: str) -> None:
    assert milliseconds(9.7e-3, *ends) == text


def test_percentiles_must_hold_the_median() -> None:
    row = demo_rows()[1][0]
    with pytest.raises(ValidationError, match="tpot_p10_s <= tpot_s <= tpot_p90_s does not hold"):
        FootprintRow.model_validate(row.model_dump() | {"tpot_p10_s": 1.0})
