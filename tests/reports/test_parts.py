"""Reports of a run put together from parts: lengths with other tasks, and where each part was measured."""

from pathlib import Path
from typing import Any

import pytest
from synthetic_rows import H100, K, make_rows

from kvscope.reports.build import all_figures, build_report
from kvscope.reports.cells import ALL_TASKS, accuracy_cells, pool_notes
from kvscope.reports.depth import depth_scopes, depth_table
from kvscope.reports.figure_parts import ReportFigure
from kvscope.reports.summary import summary_text
from kvscope.reports.tables import all_tables
from kvscope.results.frames import Run, make_run
from kvscope.results.packed import Rows, write_packed
from kvscope.results.run_schema import CutCell, RunPart
from kvscope.results.schema import SampleRow

TASKS = ("niah_single_1", "niah_multikey_2", "cwe")
LENGTHS = (1 * K, 4 * K, 16 * K)


def parted(
    methods: list[str], *, needle_lengths: tuple[int, ...] | None = None, lengths: tuple[int, ...] = LENGTHS
) -> Run:
    """Needles at some lengths, cwe at 4K alone, always in the middle of the text and with more bytes."""
    needle_lengths = needle_lengths or lengths
    samples, _, info = make_rows(methods, machine=H100, tasks=TASKS, lengths=lengths, samples=12, footprint_lengths=())
    lengths_of = {"niah_single_1": needle_lengths, "niah_multikey_2": needle_lengths, "cwe": (4 * K,)}
    rows = [row for row in samples if row.length_tokens in lengths_of[row.task]]
    rows = [row if row.task != "cwe" else row.model_copy(update=_cwe(row)) for row in rows]
    cut = CutCell(task="cwe", length_tokens=4 * K, samples=12, reason="the time was over")
    parts = (
        RunPart(tasks=TASKS[:2], lengths_tokens=needle_lengths, samples=12, seeds=(0, 1), commit="a" * 40),
        RunPart(tasks=TASKS[2:], lengths_tokens=(4 * K,), samples=20, cut=(cut,), commit="b" * 40, fewer="costly"),
    )
    return make_run(rows, [], info=info.model_copy(update={"parts": parts}), folder="")


def _cwe(row: SampleRow) -> dict[str, Any]:
    assert row.resident_kv_bytes is not None
    assert row.bytes_read_per_step is not None
    held_bytes, read_bytes = 3 * row.resident_kv_bytes, 5 * row.bytes_read_per_step
    return {"depth": 0.5, "score": 0.0, "resident_kv_bytes": held_bytes, "bytes_read_per_step": read_bytes}


def test_bytes_beside_a_pooled_accuracy_are_those_of_its_prompts() -> None:
    run = parted(["dense", "recency"])
    needles = run.samples[run.samples["task"] != "cwe"].groupby(["method_label", "length_tokens"])
    held_bytes = needles["resident_kv_bytes"].mean() + needles["metadata_bytes"].mean()
    read_bytes = needles["bytes_read_per_step"].mean()
    cells = accuracy_cells(run)
    figures = {figure.name: figure for figure in all_figures(run, cells)}
    for name, expected in (("accuracy_against_memory", held_bytes), ("accuracy_against_reads", read_bytes)):
        figure = figures[name]
        assert isinstance(figure, ReportFigure)
        found = figure.data.set_index(["method_label", "length_tokens"])["bytes"]
        assert found.to_dict() == pytest.approx(expected.to_dict())
    short = parted(["dense", "recency"], lengths=LENGTHS[:2])  # this table is about the longest, which has cwe then
    stays = {table.name: table for table in all_tables(short, accuracy_cells(short))}["stays_and_saves"].data
    found = stays.set_index("method_label")
    for label in ("dense", "recency"):
        assert found.loc[label, "held_bytes"] == pytest.approx(held_bytes[label, 4 * K])
        assert found.loc[label, "bytes_read_per_step"] == pytest.approx(read_bytes[label, 4 * K])
    shares = read_bytes["recency", 4 * K] / read_bytes["dense", 4 * K]
    assert found.loc["recency", "read_of_dense"] == pytest.approx(shares)


def test_lengths_are_pooled_over_the_same_tasks() -> None:
    run = parted(["dense", "recency"])
    cells = accuracy_cells(run).set_index(["task", "method_label", "length_tokens"])
    for length in LENGTHS:
        needles = run.samples[(run.samples["task"] != "cwe") & (run.samples["length_tokens"] == length)]
        for label in ("dense", "recency"):
            cell = cells.loc[(ALL_TASKS, label, length)]
            assert cell["n"] == 24
            assert cell["accuracy"] == pytest.approx(needles[needles["method_label"] == label]["score"].mean())
    (note,) = pool_notes(run.info)
    assert note.endswith("in no pooled accuracy: cwe.")
    tables = {table.name: table for table in all_tables(run, accuracy_cells(run))}
    assert note in tables["accuracy"].notes
    assert tables["accuracy"].text["task"].iloc[0] == "tasks of every length"
    assert note in summary_text(run)
    figures = {figure.name: figure for figure in all_figures(run, accuracy_cells(run))}
    for name in ("accuracy_by_length", "accuracy_against_reads"):
        figure = figures[name]
        assert isinstance(figure, ReportFigure)
        assert note in figure.caption


def test_without_a_task_of_every_length_the_pool_says_so() -> None:
    run = parted(["dense"], needle_lengths=(1 * K, 16 * K))
    assert pool_notes(run.info) == (
        "No task was asked for at every length: pooled accuracies of two lengths are over different tasks.",
    )
    cells = accuracy_cells(run).set_index(["task", "length_tokens"])
    assert [cells.loc[(ALL_TASKS, length)]["n"] for length in LENGTHS] == [24, 12, 24]


def test_a_run_of_one_part_pools_all_its_tasks() -> None:
    samples, _, info = make_rows(["dense"], machine=H100, tasks=TASKS, lengths=LENGTHS, samples=2, footprint_lengths=())
    assert pool_notes(info) == ()
    cells = accuracy_cells(make_run(samples, [], info=info, folder=""))
    assert set(cells[cells["task"] == ALL_TASKS]["n"]) == {6}


def test_one_method_is_shown_by_task() -> None:
    run = parted(["dense"])
    figures = {figure.name: figure for figure in all_figures(run, accuracy_cells(run))}
    by_length, by_task = figures["accuracy_by_length"], figures["accuracy_by_task"]
    assert isinstance(by_length, ReportFigure)
    assert isinstance(by_task, ReportFigure)
    assert [axes.get_title(loc="left") for axes in by_length.figure.axes] == list(TASKS)
    assert ALL_TASKS not in set(by_length.data["task"])
    (panel,) = by_task.figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == list(TASKS)
    lines = [line.split() for line in summary_text(run).splitlines()]
    (cwe,) = [line for line in lines if line[:1] == ["cwe"]]
    assert (cwe[1], cwe[-1]) == ("-", "-")
    assert cwe[2] == "0.0"


def test_a_task_of_one_depth_has_no_heatmap() -> None:
    run = parted(["dense"])
    assert [scope.name for scope in depth_scopes(run)] == ["niah_* pooled", "niah_single_1", "niah_multikey_2"]
    table = depth_table(run)
    assert "cwe" not in set(table.text["task"])
    assert any("Not by depth: cwe" in note for note in table.notes)
    few = run.samples[(run.samples["task"] != "cwe") | (run.samples["sample"] < 5)]
    run = Run(samples=few, footprint=run.footprint, info=run.info, folder=Path())
    assert "cwe" in [scope.name for scope in depth_scopes(run)]


def test_the_page_says_where_each_part_was_measured(tmp_path: Path) -> None:
    samples, _, _ = make_rows(["dense"], machine=H100, tasks=TASKS, lengths=LENGTHS, samples=12, footprint_lengths=())
    run = parted(["dense"])
    there = set(zip(run.samples["task"], run.samples["length_tokens"], strict=True))
    write_packed(tmp_path, run.info, Rows(samples=[r for r in samples if (r.task, r.length_tokens) in there]))
    build_report(tmp_path)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "niah_single_1, niah_multikey_2 at 1K, 4K, 16K: n = 12 prompts a cell (commit aaaaaaaaaaaa)" in page
    assert "cwe at 4K: n = 20 prompts a cell (commit bbbbbbbbbbbb)" in page
    assert "12 of cwe at 4K: the time was over" in page
    assert "costly" in page
