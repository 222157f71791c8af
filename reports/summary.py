"""The run in a few lines of plain text, for the end of `kvscope run` and `kvscope report`."""

import pandas as pd
from tabulate import tabulate

from kvscope.reports.cells import (
    ALL_TASKS,
    accuracy_cells,
    footprint_cells,
    memory_source,
    pool_notes,
    pooled_cells,
    pooled_tasks,
    step_note,
)
from kvscope.reports.coverage import coverage
from kvscope.reports.figure_parts import subtitle_of
from kvscope.reports.table_parts import Table, excluded_notes
from kvscope.reports.tables_limits import limit_tables
from kvscope.reports.units import byte_unit, length_text, measured, number
from kvscope.results.comparisons import baseline_label
from kvscope.results.frames import Run, records

_INTERVALS_UP_TO = 5
"""With more lengths than this the intervals would not fit a terminal; they are in the tables."""


def summary_text(run: Run) -> str:
    """Accuracy, memory and time by method and length as plain text, and what is missing."""
    parts = [subtitle_of(run)]
    if run.info.tasks:
        parts.append(_accuracy(run))
    searched = run.info.config.get("find_max") is True
    if not searched and (len(run.footprint) or run.info.footprint_lengths_tokens):
        parts.append(_memory(run))
        parts.append(_time(run))
    parts += [f"{table.title}\n{text_of(table)}" for table in limit_tables(run)]
    parts += excluded_notes(run.info)
    parts += coverage(run).sentences()
    parts += run.messages
    return "\n\n".join(parts) + "\n"


def text_of(table: Table) -> str:
    """A table as plain text, with its caption and notes."""
    columns = list(table.text.columns)
    grid = tabulate(
        table.text.values.tolist(), headers=columns, tablefmt="simple", disable_numparse=True, colalign=["left"]
    )
    return "\n".join([grid, table.caption, *table.notes])


def _accuracy(run: Run) -> str:
    """Accuracy by method, pooled over tasks; of a single method by task."""
    cells = accuracy_cells(run)
    pooled = pooled_cells(run, cells)
    by_task = len(run.info.methods) == 1 and len(run.info.tasks) > 1
    shown = cells[cells["task"] != ALL_TASKS] if by_task else pooled
    intervals = len(run.info.lengths_tokens) <= _INTERVALS_UP_TO
    texts = {}
    for cell in records(shown):
        if cell["accuracy"] is None:
            text = "-" if cell["reason"] == "not asked for" else _status(cell["reason"].split(":")[0])
        else:
            text = f"{100 * cell['accuracy']:.1f}"
            if intervals and cell["ci_low"] is not None:
                text += f" [{100 * cell['ci_low']:.0f}-{100 * cell['ci_high']:.0f}]"
        texts[cell["task" if by_task else "method_label"], cell["length_tokens"]] = text
    counts = sorted(set(shown["n"]) - {0}) or [0]
    n_text = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    title = f"Accuracy (%{', 95 % interval' if intervals else ''}) by length in tokens, {n_text} prompts a cell"
    lengths = list(run.info.lengths_tokens)
    if by_task:
        grid = _grid(list(run.info.tasks), "task", texts, lengths)
        return f"{title}: {run.info.methods[0].label} by task; -: not asked for\n{grid}"
    text = f"{title}: {', '.join(pooled_tasks(run.info))}\n{_methods_grid(run, texts, lengths)}"
    return "\n".join([text, *pool_notes(run.info)])


def _memory(run: Run) -> str:
    source = memory_source(run)
    column = "kv_nvml_bytes" if source.kind == "nvml" else "held_bytes"
    cells = footprint_cells(run)
    unit = byte_unit(cells["dense_kv_bytes"].dropna().tolist())
    texts = {}
    whole = {
        cell["length_tokens"]: cell["dense_kv_bytes"] if source.kind == "ledger" else cell["kv_nvml_bytes"]
        for cell in records(cells)
        if cell["status"] == "ok" and (source.kind == "ledger" or cell["method_label"] == baseline_label(run.info))
    }
    for cell in records(cells):
        text = _status(cell["status"])
        if cell["status"] == "ok":
            dense = whole.get(cell["length_tokens"])
            share = f" ({100 * cell[column] / dense:.1f} %)" if dense else ""
            text = f"{number(cell[column] / unit.size_bytes)}{share}"
        texts[cell["method_label"], cell["length_tokens"]] = text
    title = f"{source.axis}, {unit.name} (share of dense where it was measured), by length in tokens"
    return f"{title}\n{_methods_grid(run, texts, _footprint_lengths(cells))}\n{source.caption}"


def _time(run: Run) -> str:
    cells = footprint_cells(run)
    texts = {
        (cell["method_label"], cell["length_tokens"]): (
            _status(cell["status"]) if cell["tpot_s"] is None else measured(1000 * cell["tpot_s"])
        )
        for cell in records(cells)
    }
    grid = _methods_grid(run, texts, _footprint_lengths(cells))
    return f"Time per output token (ms, median) by length in tokens\n{grid}\n{step_note(run)}".rstrip()


def _status(status: str) -> str:
    return "not run" if status in ("missing", "not run yet", "") else status


def _footprint_lengths(cells: pd.DataFrame) -> list[int]:
    return sorted(set(cells["length_tokens"]))


def _methods_grid(run: Run, texts: dict[tuple[str, int], str], lengths: list[int]) -> str:
    return _grid([method.label for method in run.info.methods], "method", texts, lengths)


def _grid(names: list[str], what: str, texts: dict[tuple[str, int], str], lengths: list[int]) -> str:
    rows = [[name, *(texts.get((name, length), "not asked") for length in lengths)] for name in names]
    headers = [what, *map(length_text, lengths)]
    aligned = ("left", *("right" for _ in lengths))
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=aligned)
