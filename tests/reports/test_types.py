"""Accuracy by question type, and types that pooled scores leave out by name."""

from dataclasses import dataclass

import pandas as pd
import pytest
from synthetic_rows import K, Rows, demo_rows, make_rows

from kvscope.reports.cells import ALL_TASKS, accuracy_cells
from kvscope.reports.depth import depth_rows
from kvscope.reports.summary import summary_text
from kvscope.reports.tables import all_tables
from kvscope.reports.tables_types import type_cells
from kvscope.results.comparisons import compare_methods
from kvscope.results.frames import Run, make_run
from kvscope.results.run_schema import ExcludedType

NAME = "hops_3 of long_qa counts in no pooled score: dense answers 41 % of it on training seeds (n=400)"


def typed_rows() -> Rows:
    """Nine prompts a length of a task with three types; `hops_3` is always wrong."""
    samples, footprints, info = make_rows(
        ["dense", "recency"], tasks=("niah_single_1", "long_qa"), lengths=(1 * K, 4 * K), samples=9,
        footprint_lengths=(4 * K,),
    )  # fmt: skip
    changed = []
    for row in samples:
        if row.task == "long_qa":
            kind = ("hops_2", "hops_3", "temporal")[row.sample % 3]
            row = row.model_copy(update={"question_type": kind, "score": 0.0 if kind == "hops_3" else row.score})
        changed.append(row)
    return changed, footprints, info


def run_of(rows: Rows, *, exclude: bool, samples: int | None = None) -> Run:
    excluded = ExcludedType(task="long_qa", question_type="hops_3", dense_percent=41.2, n=400)
    info = rows[2].model_copy(update={"excluded_types": (excluded,) if exclude else ()})
    return make_run(rows[0][:samples], rows[1], info=info, folder=".")


@dataclass(frozen=True)
class Cell:
    n: int
    accuracy: float
    n_excluded: int
    n_missing: int


def cell(cells: pd.DataFrame, task: str, *, label: str = "dense", length: int = 4 * K) -> Cell:
    at = cells[(cells["task"] == task) & (cells["method_label"] == label) & (cells["length_tokens"] == length)]
    (row,) = at.to_dict("records")
    return Cell(row["n"], row["accuracy"], row["n_excluded"], row["n_missing"])


def test_every_type_has_its_own_cells() -> None:
    run = run_of(typed_rows(), exclude=True)
    cells = type_cells(run)
    assert set(cells["task"]) == {"long_qa"}, "a task of one type is in the accuracy table already"
    assert len(cells) == 3 * 2 * 2
    assert (cells["n"] == 3).all()
    assert dict(zip(cells["question_type"], cells["pooled"], strict=True)) == {
        "hops_2": True, "hops_3": False, "temporal": True,
    }  # fmt: skip
    for row in cells.to_dict("records"):
        own = run.samples[(run.samples["question_type"] == row["question_type"])]
        own = own[(own["method_label"] == row["method_label"]) & (own["length_tokens"] == row["length_tokens"])]
        assert row["accuracy"] == pytest.approx(own["score"].mean())


def test_excluded_types_leave_every_pooled_score() -> None:
    rows = typed_rows()
    with_all, without = accuracy_cells(run_of(rows, exclude=False)), accuracy_cells(run_of(rows, exclude=True))
    assert cell(with_all, "long_qa").n == 9
    found = cell(without, "long_qa")
    assert (found.n, found.n_excluded, found.n_missing) == (6, 3, 0)
    assert found.accuracy == pytest.approx(1.5 * cell(with_all, "long_qa").accuracy)
    assert (cell(without, ALL_TASKS).n, cell(without, ALL_TASKS).n_excluded) == (15, 3)
    assert (cell(without, "niah_single_1").n, cell(without, "niah_single_1").n_excluded) == (9, 0)
    run = run_of(rows, exclude=True)
    pairs = {found.scope: found.paired.n_pairs for found in compare_methods(run.samples, info=run.info)}
    assert pairs == {"all prompts": 30, "1024 tokens": 15, "4096 tokens": 15, "niah_single_1": 18, "long_qa": 12}
    assert "hops_3" not in set(depth_rows(run)["question_type"])


def test_an_unfinished_run_counts_excluded_prompts_as_there() -> None:
    rows = typed_rows()
    cells = accuracy_cells(run_of(rows, exclude=True, samples=len(rows[0]) - 8))
    found = cell(cells, "long_qa")
    assert (found.n, found.n_excluded, found.n_missing) == (3, 2, 4)


def test_what_is_left_out_is_named_wherever_scores_are_pooled() -> None:
    run = run_of(typed_rows(), exclude=True)
    assert f"{NAME}." in summary_text(run)
    tables = {table.name: table for table in all_tables(run, accuracy_cells(run))}
    for name in ("stays_and_saves", "accuracy", "accuracy_by_type", "accuracy_by_depth", "statistics"):
        assert f"{NAME}." in tables[name].notes, name
    by_type = tables["accuracy_by_type"].text
    assert set(by_type.loc[by_type["question type"] == "hops_3", "in the pooled score"]) == {"no"}
    other = make_run(*demo_rows()[:2], info=demo_rows()[2].model_copy(update={"excluded_types": run.info.excluded_types}), folder=".")  # fmt: skip  # noqa: E501
    assert "counts in no pooled score" not in summary_text(other), "the run has no such task"


def test_a_run_of_single_type_tasks_has_no_such_table() -> None:
    run = make_run(*demo_rows()[:2], info=demo_rows()[2], folder=".")
    assert "accuracy_by_type" not in {table.name for table in all_tables(run, accuracy_cells(run))}
