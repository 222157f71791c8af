"""The run in a few lines of plain text, for the end of `kvscope run` and `kvscope report`."""

import pandas as pd

from kvscope.reports.cells import (
    ALL_TASKS,
    NOT_SEEN,
    accuracy_cells,
    comparisons,
    footprint_cells,
    memory_source,
    pool_notes,
    pooled_answers,
    pooled_cells,
    pooled_tasks,
    step_note,
)
from kvscope.reports.coverage import coverage
from kvscope.reports.legible import legible
from kvscope.reports.subtitle import subtitle_of
from kvscope.reports.table_parts import Notes, Table, excluded_notes
from kvscope.reports.tables_limits import limit_tables
from kvscope.reports.ties import tie_notes
from kvscope.reports.units import byte_unit, length_text, milliseconds, number, points, with_interval
from kvscope.results.comparisons import POOLED, baseline_label
from kvscope.results.frames import Run, records
from kvscope.terminal import folded, grid
from kvscope.units import format_bytes

_INTERVALS_UP_TO = 5
"""With more lengths than this the intervals would not fit a terminal; they are in the tables."""


def summary_text(run: Run, *, width: int | None = None) -> str:
    """Accuracy, difference to dense, bytes, verdict and time by method and length as text, and what is missing.

    Lines are at most `width` columns, None for any.
    """
    run = legible(run)
    parts = [subtitle_of(run)]
    if run.info.tasks:
        cells = accuracy_cells(run)
        parts.append(_accuracy(run, cells, width))
        parts.append(_differences(run, cells, width))
    searched = run.info.config.get("find_max") is True
    if not searched and (len(run.footprint) or run.info.footprint_lengths_tokens):
        parts.append(_memory(run, width))
        parts.append(_time(run, width))
    elif run.info.served:
        parts.append(f"Footprint: not measured: {NOT_SEEN}.{_server_memory(run)}")
    elif run.info.tasks:
        parts.append(_memory_of_samples(run, width))
    parts += [f"{table.title}\n{text_of(table, width=width)}" for table in limit_tables(run)]
    parts += excluded_notes(run.info)
    parts += tie_notes(run)
    parts += coverage(run).sentences()
    parts += run.messages
    return folded("\n\n".join(parts), width) + "\n"


def text_of(table: Table, *, width: int | None = None) -> str:
    """A table as plain text, with its caption and notes."""
    columns = list(table.text.columns)
    # A table of which nothing was measured has no columns.
    lines = [grid(table.text.values.tolist(), columns, aligned=["left"] * len(columns), width=width)] if columns else []
    return "\n".join([*lines, table.caption, *table.notes])


def _accuracy(run: Run, cells: pd.DataFrame, width: int | None) -> str:
    """Accuracy by method, pooled over tasks; of a single method by task."""
    pooled = pooled_cells(run, cells)
    by_task = len(run.info.methods) == 1 and len(run.info.tasks) > 1
    shown = cells[cells["task"] != ALL_TASKS] if by_task else pooled
    intervals = len(run.info.lengths_tokens) <= _INTERVALS_UP_TO
    texts = {}
    for cell in records(shown):
        if cell["accuracy"] is None:
            text = "-" if cell["reason"] == "not asked for" else _status(cell["reason"].split(":")[0])
        else:
            ends = (cell["ci_low"], cell["ci_high"]) if intervals else (None, None)
            text = with_interval(cell["accuracy"], *ends)
        texts[cell["task" if by_task else "method_label"], cell["length_tokens"]] = text
    counts = sorted(set(shown["n"]) - {0}) or [0]
    n_text = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    title = f"Accuracy (%{', 95 % interval' if intervals else ''}) by length in tokens, {n_text} prompts a cell"
    lengths = list(run.info.lengths_tokens)
    if by_task:
        table = _grid(list(run.info.tasks), "task", texts, lengths, width=width)
        return f"{title}: {run.info.methods[0].label} by task; -: not asked for\n{table}"
    text = f"{title}: {', '.join(pooled_tasks(run.info))}\n{_methods_grid(run, texts, lengths, width=width)}"
    return "\n".join([text, *pool_notes(run.info)])


def _differences(run: Run, cells: pd.DataFrame, width: int | None) -> str:
    """Paired difference to dense by method and length; over all prompts with its interval and what it proves."""
    title = "Accuracy minus dense (points, paired)"
    baseline = baseline_label(run.info)
    others = [method.label for method in run.info.methods if method.label != baseline]
    if baseline is None or not others:
        return f"{title}: none, the run has {'no dense' if baseline is None else 'dense alone'}."
    texts = {}
    for cell in records(pooled_cells(run, cells)):
        text = "no pairs" if cell["n_missing"] == 0 else "not run"
        if cell["difference_to_dense"] is not None:
            text = points(cell["difference_to_dense"])
        texts[cell["method_label"], cell["length_tokens"]] = text
    last = dict.fromkeys(others, "no pairs")
    for found in (each for each in comparisons(run) if each.scope == POOLED):
        whole = found.paired.difference
        last[found.method_label] = f"{with_interval(whole.mean, whole.low, whole.high, text=points)} {found.verdict}"
    lengths = list(run.info.lengths_tokens)
    table = _grid(others, "method", texts, lengths, last=("all prompts", last), width=width)
    return f"{title} by length in tokens; over all prompts with 95 % interval and verdict\n{table}"


def _memory(run: Run, width: int | None) -> str:
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
    verdicts = _verdicts(cells)
    last = ("verdict", verdicts) if verdicts else None
    table = _methods_grid(run, texts, _footprint_lengths(cells), last=last, width=width)
    return f"{title}\n{table}\n{source.caption}{'' if verdicts else ' So there is no verdict on the savings.'}"


def _verdicts(cells: pd.DataFrame) -> dict[str, str]:
    """What NVML says of each method's saving, by length where it differs; empty where it was measured nowhere."""
    found: dict[str, dict[str, list[str]]] = {}
    for cell in records(cells):
        verdict = cell["verdict"] if cell["status"] == "ok" else None
        if verdict is not None:
            lengths = found.setdefault(cell["method_label"], {}).setdefault(verdict, [])
            lengths.append(length_text(cell["length_tokens"]))
    if all(set(verdicts) == {"not_measured"} for verdicts in found.values()):
        return {}
    return {
        label: next(iter(verdicts))
        if len(verdicts) == 1
        else "; ".join(f"{verdict} at {', '.join(lengths)}" for verdict, lengths in verdicts.items())
        for label, verdicts in found.items()
    }


def _memory_of_samples(run: Run, width: int | None) -> str:
    """Bytes of a run without a footprint pass: the ledger's, mean over the prompts behind the pooled accuracies."""
    ok = pooled_answers(run)
    key = ["method_label", "length_tokens"]
    held = (ok["resident_kv_bytes"] + ok["metadata_bytes"]).astype("float64")
    shown = ok[key].assign(held=held, dense=ok["dense_kv_bytes"].astype("float64")).groupby(key).mean().reset_index()
    unit = byte_unit(shown["dense"].tolist())
    texts = {
        (row["method_label"], row["length_tokens"]): f"{number(row['held'] / unit.size_bytes)} "
        f"({100 * row['held'] / row['dense']:.1f} %)"
        for row in records(shown)
        if row["dense"]
    }
    table = _methods_grid(run, texts, list(run.info.lengths_tokens), absent="not run", width=width)
    return (
        f"KV cache on the device (ledger, not NVML), {unit.name} (share of dense), by length in tokens\n{table}\n"
        "Mean over the scored prompts, metadata included. No footprint pass: no times, and no verdict on the savings."
    )


def _server_memory(run: Run) -> str:
    """What NVML said of a server's processes, most over the answers; nothing where it said nothing."""
    told = [row["nvml_bytes"] for row in run.samples["served"].dropna() if row["nvml_bytes"] is not None]
    return (
        f" Its processes held up to {format_bytes(max(told))} of GPU memory (NVML), weights included." if told else ""
    )


def _time(run: Run, width: int | None) -> str:
    cells = footprint_cells(run)
    lengths = _footprint_lengths(cells)
    known = bool(cells["tpot_p10_s"].notna().any())
    spread = known and len(lengths) <= _INTERVALS_UP_TO
    notes = Notes()
    texts = {}
    for cell in records(cells):
        text = _status(cell["status"])
        if cell["tpot_s"] is not None:
            ends = (cell["tpot_p10_s"], cell["tpot_p90_s"]) if spread else (None, None)
            text = notes.doubted(milliseconds(cell["tpot_s"], *ends), cell["time_doubts"])
        texts[cell["method_label"], cell["length_tokens"]] = text
    how = "median [10th, 90th percentile]" if spread else "median" if known else "median; spread not recorded"
    table = _methods_grid(run, texts, lengths, width=width)
    return "\n".join(filter(None, [f"Time per output token (ms, {how}) by length in tokens", table, *notes.lines(),
                                   step_note(run)]))  # fmt: skip


def _status(status: str) -> str:
    return "not run" if status in ("missing", "not run yet", "") else status


def _footprint_lengths(cells: pd.DataFrame) -> list[int]:
    return sorted(set(cells["length_tokens"]))


def _methods_grid(
    run: Run,
    texts: dict[tuple[str, int], str],
    lengths: list[int],
    *,
    last: tuple[str, dict[str, str]] | None = None,
    absent: str = "not asked",
    width: int | None,
) -> str:
    labels = [method.label for method in run.info.methods]
    return _grid(labels, "method", texts, lengths, last=last, absent=absent, width=width)


def _grid(
    names: list[str],
    what: str,
    texts: dict[tuple[str, int], str],
    lengths: list[int],
    *,
    last: tuple[str, dict[str, str]] | None = None,
    absent: str = "not asked",
    width: int | None,
) -> str:
    """A row a name and a column a length; `last` is the header of one more column and its texts by name."""
    rows = [[name, *(texts.get((name, length), absent) for length in lengths)] for name in names]
    headers = [what, *map(length_text, lengths)]
    aligned = ["left", *("right" for _ in lengths)]
    if last is not None:
        headers.append(last[0])
        aligned.append("left")
        rows = [[*row, last[1].get(row[0], "-")] for row in rows]
    return grid(rows, headers, aligned=aligned, width=width)
