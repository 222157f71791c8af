"""Table and figure of methods at equal bytes: what was asked, held and read; nothing in runs without shares."""

import pandas as pd
import pytest
from synthetic_rows import KINDS, K, Kind, Rows, make_rows

from kvscope.reports.build import all_figures
from kvscope.reports.cells import accuracy_cells
from kvscope.reports.export import markdown
from kvscope.reports.figure_parts import ReportFigure, SkippedFigure
from kvscope.reports.figures_shares import equal_bytes_figures
from kvscope.reports.shares import share_cells, without_share
from kvscope.reports.tables import all_tables
from kvscope.results.frames import Run, make_run

SHARES = (0.05, 0.135, 0.25)
_HELD = [
    Kind("snapkv", "-", "-", "-", "freed", share, finds=0.4 + 2 * share, options=(("share", share),))
    for share in SHARES
]
_READ = [Kind("quest", "-", "-", "-", "resident", 1, 1 / 8, share, 0.9, (("read_share", share),)) for share in SHARES]
ASKED = {kind.label: kind for kind in (*_HELD, *_READ)}


@pytest.fixture(scope="module")
def rows() -> Rows:
    KINDS.update(ASKED)
    try:
        return make_rows(
            ["dense", "lsa:threshold=0.5,tau=64", *ASKED], tasks=("niah_single_1", "niah_multikey_2"),
            lengths=(4 * K, 16 * K), samples=8, footprint_lengths=(16 * K,),
        )  # fmt: skip
    finally:
        for label in ASKED:
            del KINDS[label]


@pytest.fixture(scope="module")
def run(rows: Rows) -> Run:
    return make_run(rows[0], rows[1], info=rows[2], folder=".")


def test_a_label_without_its_share() -> None:
    assert without_share("snapkv:window_tokens=16,share=0.25,kv=int4") == (
        "snapkv:window_tokens=16,kv=int4",
        "held",
        0.25,
    )
    assert without_share("quest:read_share=0.05") == ("quest", "read", 0.05)
    assert without_share("dense") == ("dense", None, None)
    for own in ("mine:share=heads", "mine:share=4,sinks=2", "mine:share=nan"):  # options of a method of one's own
        assert without_share(own) == (own, None, None)


def test_shares_are_those_of_the_rows(run: Run) -> None:
    cells = share_cells(run, accuracy_cells(run))
    assert len(cells) == 2 * 8
    mine = run.samples[(run.samples["method_label"] == "snapkv:share=0.25") & (run.samples["length_tokens"] == 4 * K)]
    held = (mine["resident_kv_bytes"] + mine["metadata_bytes"]) / mine["dense_kv_bytes"]
    row = cells[(cells["method_label"] == "snapkv:share=0.25") & (cells["length_tokens"] == 4 * K)].iloc[0]
    assert row["held_of_dense"] == pytest.approx(held.mean())
    assert (row["asked_of"], row["asked_share"], row["setting"]) == ("held", 0.25, "snapkv")
    dense = cells[cells["method_label"] == "dense"]
    assert dense["read_of_dense"].tolist() == [1, 1]
    # Times are of the footprint pass alone, and there was one at 16K.
    assert cells[cells["length_tokens"] == 4 * K]["tpot_s"].isna().all()
    assert cells[cells["length_tokens"] == 16 * K]["tpot_s"].notna().all()
    order = cells[cells["length_tokens"] == 4 * K]["asked_of"].tolist()
    assert [None if pd.isna(each) else each for each in order] == [None] * 2 + ["held"] * 3 + ["read"] * 3


def test_the_table_says_what_was_asked_and_why_a_time_lacks(run: Run) -> None:
    table = {each.name: each for each in all_tables(run, accuracy_cells(run))}["equal_bytes"]
    assert {"-", "5 % held", "13.5 % held", "25 % read"} <= set(table.text["asked for"])
    assert any("no footprint cell" in note for note in table.notes)
    assert "process of its own" in markdown(table)


def test_the_figure_has_a_front_for_each_length_and_side(run: Run) -> None:
    (figure,) = equal_bytes_figures(run, accuracy_cells(run))
    assert isinstance(figure, ReportFigure)
    assert len(figure.figure.axes) == 4
    for side in ("held", "read"):
        assert (figure.data.groupby("length_tokens")[f"pareto_{side}"].sum() >= 1).all()
    front = figure.data[figure.data["pareto_held"] & (figure.data["length_tokens"] == 4 * K)]
    for row in figure.data[figure.data["length_tokens"] == 4 * K].itertuples():
        assert ((front["held_of_dense"] <= row.held_of_dense) & (front["accuracy"] >= row.accuracy)).any()


def test_nothing_of_it_without_shares_and_a_reason_without_scores(rows: Rows) -> None:
    plain = make_rows(["dense"], tasks=("niah_single_1",), lengths=(4 * K,), samples=2, footprint_lengths=())
    run = make_run(plain[0], plain[1], info=plain[2], folder=".")
    cells = accuracy_cells(run)
    assert "equal_bytes" not in {table.name for table in all_tables(run, cells)}
    assert "equal_bytes" not in {figure.name for figure in all_figures(run, cells)}
    empty = make_run([], [], info=rows[2], folder=".")
    (skipped,) = equal_bytes_figures(empty, accuracy_cells(empty))
    assert isinstance(skipped, SkippedFigure)
    table = {each.name: each for each in all_tables(empty, accuracy_cells(empty))}["equal_bytes"]
    assert (table.text["accuracy, %"].str.startswith("n/m")).all()


def test_a_figure_without_dense_says_that_dense_lacks(rows: Rows) -> None:
    alone = [row for row in rows[0] if row.method_label != "dense"]
    run = make_run(alone, [], info=rows[2], folder=".")
    (skipped,) = equal_bytes_figures(run, accuracy_cells(run))
    assert isinstance(skipped, SkippedFigure)
    assert "dense was not measured" in skipped.reason


def test_a_line_joins_shares_and_every_point_stays_visible(run: Run) -> None:
    cells = accuracy_cells(run)
    alike = cells.assign(accuracy=0.5, ci_low=0.4, ci_high=0.6)
    (figure,) = equal_bytes_figures(run, alike)
    assert isinstance(figure, ReportFigure)
    held = figure.figure.axes[0]
    joined = [line for line in held.lines if line.get_linestyle() != "None" and len(line.get_xdata()) == len(SHARES)]
    assert len(joined) == len({label.partition(":")[0] for label in ASKED})
    # dense and three of quest are within pixels of each other: each is a ring around those after it.
    full = [line for line in held.lines if line.get_linestyle() == "None" and line.get_xdata()[0] > 90]
    sizes = [line.get_markersize() for line in full]
    assert len(full) == 1 + len(SHARES)
    assert len(set(sizes[1:])) == len(SHARES)
    # A method on the front is named once, however many of its points are there.
    names = [text.get_text() for text in held.texts]
    assert len(names) == len(set(names))
