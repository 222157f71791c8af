"""The part of a run that a report shows: chosen methods, under the names they were given; numbers stay as they are."""

import re
from dataclasses import replace

import pandas as pd

from kvscope.reports.cells import comparisons
from kvscope.reports.look import look
from kvscope.reports.table_parts import Table
from kvscope.results.frames import Run


def shown_run(run: Run) -> Run:
    """Return the run with the methods of the look alone, for figures.

    Comparisons are those of the whole run: Holm's correction goes over all methods, whichever are shown.
    """
    chosen = look().methods
    if not chosen:
        return run
    part = replace(
        run,
        info=run.info.model_copy(
            update={
                "methods": tuple(method for method in run.info.methods if method.label in chosen),
                "plan": tuple(cell for cell in run.info.plan if cell.method_label in chosen),
            }
        ),
        samples=_rows(run.samples, chosen),
        footprint=_rows(run.footprint, chosen),
        max_context=_rows(run.max_context, chosen),
        throughput=_rows(run.throughput, chosen),
    )
    part.memo[f"{comparisons.__module__}.{comparisons.__qualname__}"] = [
        each for each in comparisons(run) if each.method_label in chosen
    ]
    return part


def _rows(frame: pd.DataFrame, chosen: tuple[str, ...]) -> pd.DataFrame:
    return frame[frame["method_label"].isin(chosen)].reset_index(drop=True)


def shown_table(table: Table) -> Table:
    """Return a table with the rows of the methods that are shown, under their names; data keep the labels."""
    chosen, names = look().methods, look().names
    data, text = table.data, table.text
    if chosen and "method_label" in data.columns:
        data = _rows(data, chosen)
    if chosen and "method" in text.columns:
        text = text[text["method"].isin(chosen)].reset_index(drop=True)
    if names and "method" in text.columns:
        text = text.assign(method=[names.get(label, label) for label in text["method"]])
    used = {mark for cell in text.to_numpy().ravel() for mark in re.findall(r"\(([a-z]{1,2})\)", str(cell))}
    notes = tuple(
        note for note in table.notes if not chosen or not (m := re.match(r"\(([a-z]{1,2})\) ", note)) or m[1] in used
    )
    if chosen:
        notes = (*notes, f"Shown: {', '.join(names.get(label, label) for label in chosen)}; the run has more methods.")
    return replace(table, data=data, text=text, notes=notes)
