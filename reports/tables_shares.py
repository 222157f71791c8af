"""The table of methods at equal bytes, every length: what was asked for, what was held and read, accuracy and time."""

from typing import Any

import pandas as pd

from kvscope.reports.cells import pool_notes, step_note
from kvscope.reports.shares import asks_for_shares, share_cells
from kvscope.reports.table_parts import Notes, Table, excluded_notes
from kvscope.reports.units import length_text, milliseconds, number, percent, points, with_interval
from kvscope.results.frames import Run, records


def share_tables(run: Run, cells: pd.DataFrame) -> list[Table]:
    """The table at equal bytes; none in a run without a method that was asked for a share."""
    return [equal_bytes_table(run, cells)] if asks_for_shares(run) else []


def equal_bytes_table(run: Run, cells: pd.DataFrame) -> Table:
    """One row a (length, method); `cells` comes from `accuracy_cells(run)`."""
    data = share_cells(run, cells)
    notes = Notes()
    text = pd.DataFrame([_text(row, notes) for row in records(data)])
    caption = (
        "Methods by the share of dense's bytes that was asked for: of those on the device (held), or of those a decode "
        "step reads, for methods that hold everything. A budget comes as near as pages and the method allow, so each "
        "row has what was held and read: the ledger's bytes over dense's for the same prompts, metadata included, mean "
        "over decode steps and prompts. Accuracy is pooled over tasks, with its 95 % interval; minus dense is paired. "
        "TPOT is the median time per output token of a footprint cell, where the method decoded alone in a process of "
        "its own."
    )
    lines = (*notes.lines(), *pool_notes(run.info), *excluded_notes(run.info), *filter(None, [step_note(run)]))
    return Table("equal_bytes", "Methods at equal bytes", caption, data, text, lines)


def _text(row: dict[str, Any], notes: Notes) -> dict[str, str]:
    asked = "-" if row["asked_share"] is None else f"{number(100 * row['asked_share'])} % {row['asked_of']}"
    why = row["reason"] or "no prompt was scored"
    return {
        "length (tokens)": length_text(row["length_tokens"]),
        "asked for": asked,
        "method": row["setting"],
        "held, % of dense's": notes.mark(why) if row["held_of_dense"] is None else percent(row["held_of_dense"]),
        "read, % of dense's": notes.mark(why if row["held_of_dense"] is None else "dense was not measured here")
        if row["read_of_dense"] is None
        else percent(row["read_of_dense"]),
        "accuracy, %": notes.mark(why)
        if row["accuracy"] is None
        else f"{with_interval(row['accuracy'], row['ci_low'], row['ci_high'])} n={row['n']}",
        "minus dense, points": notes.mark(row["difference_note"] or why)
        if row["difference_to_dense"] is None
        else with_interval(row["difference_to_dense"], row["difference_low"], row["difference_high"], text=points),
        "TPOT, ms": notes.mark("no footprint cell of this method and length was measured")
        if row["tpot_s"] is None
        else notes.doubted(milliseconds(row["tpot_s"], row["tpot_p10_s"], row["tpot_p90_s"]), row["time_doubts"]),
    }
