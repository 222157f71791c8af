"""Points of several methods that coincide: none is moved, each stays visible."""

import pytest
from matplotlib.colors import same_color
from synthetic_rows import Rows, wide_rows

from kvscope.reports.canvas import Margins, panels
from kvscope.reports.cells import accuracy_cells
from kvscope.reports.figure_parts import ReportFigure
from kvscope.reports.figures_accuracy import accuracy_by_length
from kvscope.reports.figures_memory import memory_by_length, tpot_by_length
from kvscope.reports.labels import Label, free_labels
from kvscope.reports.theme import method_styles
from kvscope.results.frames import make_run


@pytest.fixture(scope="module")
def rows() -> Rows:
    return wide_rows(tasks=1, samples=2)


def markers(figure: ReportFigure, color: str) -> list[tuple[float, float, float]]:
    """(x, y, size) of a method's points."""
    (axes,) = figure.figure.axes
    lines = [line for line in axes.lines if line.get_linestyle() == "None" and line.get_marker() not in ("x", "_")]
    return [
        (*map(float, point), line.get_markersize())
        for line in lines
        if same_color(line.get_color(), color)
        for point in line.get_xydata()
    ]


def test_points_stand_at_their_own_length_and_value(rows: Rows) -> None:
    run = make_run(rows[0], rows[1], info=rows[2], folder=".")
    styles = method_styles([method.label for method in rows[2].methods])
    for figure, column, unit in ((memory_by_length(run), "measured_bytes", 1.0), (tpot_by_length(run), "tpot_s", 1e3)):
        assert isinstance(figure, ReportFigure)
        for label, data in figure.data[figure.data["status"] == "ok"].groupby("method_label"):
            found = sorted(markers(figure, styles[str(label)].color))
            assert [x for x, _, _ in found] == sorted(data["length_tokens"])
            assert sorted(y for _, y, _ in found) == pytest.approx(sorted(unit * data[column]))


def test_dense_is_never_above_what_holds_more(rows: Rows) -> None:
    figure = memory_by_length(make_run(rows[0], rows[1], info=rows[2], folder="."))
    assert isinstance(figure, ReportFigure)
    (axes,) = figure.figure.axes
    styles = method_styles([method.label for method in rows[2].methods])
    dense, quest = (
        next(
            axes.transData.transform(line.get_xydata())
            for line in axes.lines
            if same_color(line.get_color(), styles[label].color) and len(line.get_xydata()) > 4
        )
        for label in ("dense", "quest")
    )
    assert (dense[:, 0] == quest[:, 0]).all()
    assert (dense[:, 1] < quest[:, 1]).all()


def test_equal_points_are_rings_and_equal_lines_take_turns(rows: Rows) -> None:
    kept = {"dense", "quest", "dsa"}
    info = rows[2].model_copy(update={"methods": tuple(m for m in rows[2].methods if m.label in kept)})
    samples = [row.model_copy(update={"score": 1.0}) for row in rows[0] if row.method_label in kept and row.score]
    run = make_run(samples, [], info=info, folder=".")
    figure = accuracy_by_length(run, accuracy_cells(run))
    assert isinstance(figure, ReportFigure)
    styles = method_styles([method.label for method in info.methods])
    sizes = [markers(figure, styles[label].color)[0][2] for label in ("dense", "quest", "dsa")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    (axes,) = figure.figure.axes
    drawn = [line for line in axes.lines if len(line.get_xydata()) > 1]
    assert len(drawn) == 3
    assert all(line.is_dashed() for line in drawn)


def test_a_label_keeps_clear_of_points_without_one() -> None:
    """Where a label would stand, a bare point sends it to another side."""

    def place(others: list[tuple[float, float]]) -> tuple[float, float, float, float]:
        _, (axes,) = panels(1, columns=1, width_in=3, height_in=3, margins=Margins(), title="-")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        free_labels(axes, [Label("dense", 0.5, 0.5, "black")], others=others)
        box = axes.texts[0].get_window_extent()
        (x0, y0), (x1, y1) = axes.transData.inverted().transform([(box.x0, box.y0), (box.x1, box.y1)])
        return x0, y0, x1, y1

    x0, y0, x1, y1 = place([])
    taken = ((x0 + x1) / 2, (y0 + y1) / 2)
    x0, y0, x1, y1 = place([taken])
    assert not (x0 <= taken[0] <= x1 and y0 <= taken[1] <= y1)
