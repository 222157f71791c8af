"""The main table of a report, short enough for a paper: what each method holds, reads, answers and takes."""

import math
from typing import Any

import pandas as pd

from kvscope.reports.look import look
from kvscope.reports.table_parts import Notes, Table, excluded_notes
from kvscope.reports.tables_memory import stays_data
from kvscope.reports.units import byte_unit, length_text, milliseconds, number, percent, points, with_interval
from kvscope.results.comparisons import baseline_label
from kvscope.results.frames import Run, records

MOST_ROWS = 10


def main_table(run: Run, cells: pd.DataFrame) -> Table:
    """At most ten methods at one length: the longest at which dense was measured, for the others stand against it.

    Where there are more, dense and the most accurate of the others stand in it, and a note names the rest.
    """
    baseline = baseline_label(run.info)
    found = stays_data(run, cells, _length(run, baseline))
    rows = records(found)
    chosen = look().methods
    shown = [row for row in rows if not chosen or row["method_label"] in chosen]
    if len(shown) > MOST_ROWS:
        ranked = sorted(shown, key=lambda row: _rank(row, baseline))
        kept = {row["method_label"] for row in ranked[:MOST_ROWS]}
        left = [row["method_label"] for row in shown if row["method_label"] not in kept]
        shown = [row for row in shown if row["method_label"] in kept]
    else:
        left = []
    data = found[found["method_label"].isin([row["method_label"] for row in shown])]
    unit = byte_unit(data["held_bytes"].tolist())
    notes = Notes()
    text = pd.DataFrame([_text(row, unit.name, unit.size_bytes, notes) for row in shown])
    length = next((row["length_tokens"] for row in rows if row["length_tokens"] is not None), None)
    where = "" if length is None else f" at {length_text(length)} tokens"
    caption = (
        f"Methods{where}: bytes on the device (ledger, keys, values and metadata) and of dense's, bytes one decode "
        "step reads of dense's, median time per output token, accuracy pooled over tasks and the paired difference to "
        "dense, with 95 % intervals."
    )
    remark = (f"{len(left)} methods are in the other tables alone: {', '.join(left)}.",) if left else ()
    columns = [column for column in data.columns if column not in ("stays", "saves", "source")]
    lines = (*notes.lines(), *excluded_notes(run.info), *remark)
    return Table("main", "In short", caption, data[columns].reset_index(drop=True), text, lines)


def _length(run: Run, baseline: str | None) -> int | None:
    """Return the longest length at which dense was timed, or else scored; of a run without dense, any method."""
    for frame in (run.footprint, run.samples):
        ok = frame.loc[frame["status"] == "ok", ["method_label", "length_tokens"]]
        for rows in (ok[ok["method_label"] == baseline], ok):
            if len(rows):
                return int(rows["length_tokens"].max())
    return None


def _rank(row: dict[str, Any], baseline: str | None) -> tuple[bool, float, float]:
    """Dense first, then the more accurate, then the smaller."""
    accuracy = 0.0 if row["accuracy"] is None else row["accuracy"]
    return row["method_label"] != baseline, -accuracy, math.inf if row["held_bytes"] is None else row["held_bytes"]


def _text(row: dict[str, Any], unit: str, unit_bytes: int, notes: Notes) -> dict[str, str]:
    why = row["not_measured"].split("; ")[0] or "not measured in this run"
    share = f" ({percent(row['held_of_dense'])} %)" if row["held_of_dense"] is not None else ""
    return {
        "method": row["method_label"],
        f"device, {unit} (of dense)": notes.mark(why)
        if row["held_bytes"] is None
        else f"{number(row['held_bytes'] / unit_bytes)}{share}",
        "reads, % of dense's": notes.mark(
            "dense has no such cell here" if row["bytes_read_per_step"] is not None else why
        )
        if row["read_of_dense"] is None
        else percent(row["read_of_dense"]),
        "TPOT, ms": notes.mark(why)
        if row["tpot_s"] is None
        else notes.doubted(milliseconds(row["tpot_s"], row["tpot_p10_s"], row["tpot_p90_s"]), row["time_doubts"]),
        "accuracy, %": notes.mark("no prompt was scored at this length")
        if row["accuracy"] is None
        else f"{with_interval(row['accuracy'], row['ci_low'], row['ci_high'])} n={row['n']}",
        "minus dense, points": notes.mark(row["difference_note"] or "no prompt was scored at this length")
        if row["difference_to_dense"] is None
        else with_interval(row["difference_to_dense"], row["difference_low"], row["difference_high"], text=points),
    }
