"""Accuracy by depth of the evidence and length: the cells behind the heatmaps and their table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kvscope.reports.answers import NOWHERE, Answers, by_cell
from kvscope.reports.table_parts import Notes, Table, excluded_notes
from kvscope.reports.units import length_text, percent
from kvscope.results.comparisons import baseline_label, pooled
from kvscope.results.frames import Run, once, records

# By fewer prompts nobody can tell that a task has one depth only; by more, a task whose depths lie in such a range has.
_PROMPTS_TO_JUDGE, _DEPTH_RANGE = 10, 0.2
NIAH = "niah_"
NIAH_POOL = "niah_* pooled"
ALL_DEPTHS = "all"
DEPTH_COLUMNS = [
    "task",
    "method_label",
    "length_tokens",
    "depth",
    "depth_from",
    "depth_to",
    "n",
    "accuracy",
    "ci_low",
    "ci_high",
    "interval",
]


@dataclass(frozen=True)
class Scope:
    """Tasks whose prompts share one heatmap.

    Attributes:
        name: the task, or ``niah_* pooled``.
        tasks: the tasks pooled.
        bins: equal parts of the depth axis.
    """

    name: str
    tasks: tuple[str, ...]
    bins: int


@once
def depth_rows(run: Run) -> pd.DataFrame:
    """The scored prompts whose evidence has one known depth; question types excluded from pooled scores are not in."""
    rows = pooled(run.samples, run.info)
    return rows[(rows["status"] == "ok") & rows["depth"].notna()]


@once
def depth_scopes(run: Run) -> list[Scope]:
    """The needle tasks pooled (where the run has several), then every task by itself.

    Other tasks are not pooled with them: the depth of an answer spread over the whole text is near its middle. Tasks
    all of whose prompts have it there (see `depthless_tasks`) are left out.
    """
    rows = depth_rows(run)
    flat = depthless_tasks(run)
    scored = set(rows["task"].unique())
    there = [task for task in run.info.tasks if task in scored and task not in flat]
    needles = tuple(task for task in there if task.startswith(NIAH))
    groups = [(NIAH_POOL, needles)] if len(needles) > 1 else []
    groups += [(task, (task,)) for task in there]
    scopes = []
    for name, tasks in groups:
        mine = rows[rows["task"].isin(tasks)]
        cells = mine["method_label"].nunique() * mine["length_tokens"].nunique()
        scopes.append(Scope(name, tasks, _bins(len(mine) / cells)))
    return scopes


@once
def depthless_tasks(run: Run) -> list[str]:
    """Return the tasks whose evidence is at about one depth in every prompt, as where the whole text is asked for."""
    found = []
    for task, rows in depth_rows(run).groupby("task", sort=False):
        prompts = rows.drop_duplicates(["length_tokens", "sample"])
        if len(prompts) >= _PROMPTS_TO_JUDGE and prompts["depth"].max() - prompts["depth"].min() < _DEPTH_RANGE:
            found.append(str(task))
    return found


def depthless_note(run: Run) -> str:
    """Return the sentence that names them; empty where there are none."""
    flat = depthless_tasks(run)
    return (
        f"Not by depth: {', '.join(flat)}, of which every prompt has its evidence at about one depth." if flat else ""
    )


def depth_baseline(run: Run) -> str | None:
    """The method whose accuracy is shown task by task: dense, else the run's first with scored prompts."""
    there = set(depth_rows(run)["method_label"].unique())
    baseline = baseline_label(run.info)
    order = [baseline, *(method.label for method in run.info.methods)]
    return next((label for label in order if label in there), None)


def depth_cells(run: Run, scopes: Sequence[Scope], *, label: str | None = None) -> pd.DataFrame:
    """One row per scope, method (or only ``label``), length and part of the depth with prompts in it.

    Fractions in [0, 1]; 95 % intervals (Wilson for 0/1 scores, bootstrap for graded ones). ``depth`` names the part;
    every length has a row for all depths, too.
    """
    rows = depth_rows(run)
    if label is not None:
        rows = rows[rows["method_label"] == label]
    found = by_cell(rows, ["task", "method_label", "length_tokens"])
    answers, depths = Answers(rows), rows["depth"].to_numpy(dtype=np.float64)
    cells: list[dict[str, object]] = []
    for scope in scopes:
        for method in run.info.methods:
            for length in run.info.lengths_tokens:
                theirs = [found.get((task, method.label, length), NOWHERE) for task in scope.tasks]
                mine = np.concatenate(theirs)
                if not len(mine):
                    continue
                head = {"task": scope.name, "method_label": method.label, "length_tokens": length}
                cells.append(head | {"depth": ALL_DEPTHS, "depth_from": 0.0, "depth_to": 1.0} | answers.accuracy(mine))
                parts = np.minimum((depths[mine] * scope.bins).astype(np.int64), scope.bins - 1)
                for at in map(int, np.unique(parts)):
                    low, high = at / scope.bins, (at + 1) / scope.bins
                    place = {"depth": depth_text(low, high), "depth_from": low, "depth_to": high}
                    cells.append(head | place | answers.accuracy(mine[parts == at]))
    return pd.DataFrame(cells, columns=DEPTH_COLUMNS)


def depth_text(low: float, high: float) -> str:
    """Name a part of the depth axis: ``10-20 %``."""
    return f"{100 * low:.0f}-{100 * high:.0f} %"


def depth_table(run: Run) -> Table:
    """Accuracy by depth and length: for reading, dense by task; in the CSV, every method."""
    notes = Notes()
    scopes, label = depth_scopes(run), depth_baseline(run)
    data = depth_cells(run, scopes)
    lengths = list(run.info.lengths_tokens)
    found = {
        (cell["task"], cell["depth"], cell["length_tokens"]): cell
        for cell in records(data[data["method_label"] == label])
    }
    scored = {(task, length) for task, _, length in found}
    texts: list[dict[str, str]] = []
    for scope in scopes:
        parts = [depth_text(i / scope.bins, (i + 1) / scope.bins) for i in range(scope.bins)]
        for depth in (ALL_DEPTHS, *parts):
            row = {"task": scope.name, "depth": depth}
            for length in lengths:
                cell = found.get((scope.name, depth, length))
                if cell is not None:
                    row[length_text(length)] = f"{percent(cell['accuracy'])} n={cell['n']}"
                elif (scope.name, length) in scored:
                    row[length_text(length)] = notes.mark("no prompt has its evidence at this depth")
                else:
                    row[length_text(length)] = notes.mark("no prompt of this length was scored")
            texts.append(row)
    text = pd.DataFrame(texts, columns=["task", "depth", *map(length_text, lengths)])
    lines = notes.lines() if texts else ("No scored prompt has evidence at one known depth.",)
    caption = (
        f"Accuracy (%) of {label or 'no method'} and number of scored prompts n, by depth of the evidence (0 % = start "
        "of the haystack; the mean place where there are several pieces) and length. The CSV holds every method, and "
        "95 % intervals."
    )
    lines = (*lines, *filter(None, [depthless_note(run)]), *excluded_notes(run.info))
    return Table("accuracy_by_depth", "Accuracy by depth and length", caption, data, text, lines)


def _bins(prompts_per_length: float) -> int:
    """Ten parts when that leaves five prompts a cell on average, else five."""
    return 10 if prompts_per_length >= 50 else 5
