"""The resident set over decode steps: the numbers behind the figure, and its absence where nothing is re-chosen."""

from pathlib import Path

import pandas as pd
import pytest
from synthetic_rows import Rows, demo_rows
from test_figures import drawn

from kvscope.reports.figure_parts import ReportFigure, SkippedFigure
from kvscope.reports.figures_residency import COLUMNS, refreshes, resident_over_steps
from kvscope.results.frames import Run, make_run
from kvscope.results.schema import ResidencyRecord


def with_residency() -> Rows:
    """The demo's rows, `random` re-chosen every 16 steps: sample i of a length refreshes i % 3 + 1 times."""
    samples, footprints, info = demo_rows()
    changed = []
    for row in samples:
        if row.method == "random" and row.status == "ok":
            n = row.sample % 3 + 1
            record = ResidencyRecord(
                tau=16, prompt_tokens=1000, resident_tokens=tuple(100 * (row.sample + k) for k in range(n)),
                recalled_bytes=tuple(range(n)), hit_rate=None, fallbacks=0,
            )  # fmt: skip
            row = row.model_copy(update={"residency": record})
        changed.append(row)
    return changed, footprints, info


def of_refreshes(run: Run, cells: pd.DataFrame) -> list[ReportFigure | SkippedFigure]:
    """What ``all_figures`` ends with."""
    return list(resident_over_steps(run))


def test_one_row_a_refresh_with_the_mean_of_those_who_reached_it() -> None:
    rows = with_residency()
    run = make_run(*rows[:2], info=rows[2], folder=".")
    data = refreshes(run)
    assert list(data.columns) == COLUMNS
    length = min(data["length_tokens"])
    own = [row for row in rows[0] if row.residency is not None and row.length_tokens == length]
    for row in data[data["length_tokens"] == length].itertuples():
        reached = [each for each in own if len(each.residency.resident_tokens) > row.refresh]  # type: ignore[union-attr]
        shares = [each.residency.resident_tokens[row.refresh] / 1000 for each in reached]  # type: ignore[union-attr]
        assert (row.step, row.n) == (16 * row.refresh, len(reached))
        assert row.resident_fraction == pytest.approx(sum(shares) / len(shares))
        assert row.recalled_bytes == row.refresh
    assert set(data["method_label"]) == {row.method_label for row in own}


def test_the_figure_is_drawn_and_left_out_where_nothing_refreshes(tmp_path: Path) -> None:
    figure = drawn(with_residency(), figures=of_refreshes)["resident_over_steps"]
    figure.figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert "everything that stays counted" in str([text.get_text() for text in figure.figure.texts])
    assert drawn(demo_rows(), figures=of_refreshes) == {}
