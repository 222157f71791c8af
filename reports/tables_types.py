"""Accuracy by question type, for tasks that ask several kinds of questions."""

from typing import Any

import pandas as pd

from kvscope.reports.answers import NOWHERE, Answers, Places, by_cell
from kvscope.reports.table_parts import Notes, Table, excluded_notes
from kvscope.reports.units import length_text, with_interval
from kvscope.results.frames import Run, records

TYPE_COLUMNS = [
    "task",
    "question_type",
    "pooled",
    "method_label",
    "length_tokens",
    "n",
    "n_not_measured",
    "accuracy",
    "ci_low",
    "ci_high",
    "interval",
    "reason",
]


def type_cells(run: Run) -> pd.DataFrame:
    """Accuracy per task, question type, method and length, with 95 % intervals; tasks of one type are left out.

    Fractions in [0, 1]. ``pooled`` is False for types that pooled scores leave out. ``reason`` says why prompts lack a
    score.
    """
    kinds: dict[str, dict[str, None]] = {task: {} for task in run.info.tasks}
    for task, kind in by_cell(run.samples, ["task", "question_type"]):
        kinds.setdefault(task, {})[kind] = None
    if all(len(types) < 2 for types in kinds.values()):
        return pd.DataFrame(columns=TYPE_COLUMNS)
    found = by_cell(run.samples, ["task", "question_type", "method_label", "length_tokens"])
    answers = Answers(run.samples)
    cells = []
    for task, types in kinds.items():
        for kind in sorted(types) if len(types) > 1 else ():
            for method in run.info.methods:
                for length in run.info.lengths_tokens:
                    rows = found.get((task, kind, method.label, length), NOWHERE)
                    head = {"task": task, "question_type": kind, "pooled": run.info.pools(task, kind)}
                    head |= {"method_label": method.label, "length_tokens": length}
                    cells.append(head | _accuracy(answers, rows))
    return pd.DataFrame(cells, columns=TYPE_COLUMNS)


def type_tables(run: Run) -> list[Table]:
    """The table, or none where every task asks one kind of question."""
    cells = type_cells(run)
    if not len(cells):
        return []
    notes = Notes()
    lengths = list(run.info.lengths_tokens)
    texts = []
    for (task, kind, label), group in cells.groupby(["task", "question_type", "method_label"], sort=False):
        by_length = {cell["length_tokens"]: cell for cell in records(group)}
        pooled = bool(group["pooled"].iloc[0])
        texts.append(
            {"task": task, "question type": kind, "in the pooled score": "yes" if pooled else "no", "method": label}
            | {length_text(length): _text(by_length[length], notes) for length in lengths}
        )
    caption = (
        "Accuracy in percent by question type, with its 95 % interval and the number of scored prompts n. Types that "
        "are not in the pooled score are measured all the same."
    )
    lines = (*notes.lines(), *excluded_notes(run.info))
    return [Table("accuracy_by_type", "Accuracy by question type", caption, cells, pd.DataFrame(texts), lines)]


def _accuracy(answers: Answers, rows: Places) -> dict[str, object]:
    reasons = answers.failures(rows)
    if not len(rows):
        reasons.append("no prompt of this type is there")
    return {"reason": "; ".join(reasons)} | answers.accuracy(rows)


def _text(cell: dict[str, Any], notes: Notes) -> str:
    if cell["accuracy"] is None:
        return notes.mark(cell["reason"])
    return f"{with_interval(cell['accuracy'], cell['ci_low'], cell['ci_high'])} n={cell['n']}"
