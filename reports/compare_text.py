"""A comparison of runs as text for a terminal, and as plain values for JSON."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvscope.reports.compare import SIDES, RunComparison, pair_text
from kvscope.reports.gates import change_of, change_text
from kvscope.reports.table_parts import Notes
from kvscope.reports.units import byte_unit, length_text, measured, milliseconds, p_text, percent, points, with_interval
from kvscope.results.frames import Run
from kvscope.results.plain_text import shortened
from kvscope.terminal import folded, grid

_MOST_VALUE_CHARS = 60
_MOST_GAPS = 20


def compare_text(runs: Sequence[Run], found: Sequence[RunComparison], *, width: int | None = None) -> str:
    """Return the tables of every run against the first; lines are at most `width` columns, None for any."""
    names = [f"{chr(ord('A') + place)}  {run.folder}" for place, run in enumerate(runs)]
    parts = ["\n".join(names)]
    for each in found:
        if len(found) > 1:
            parts.append(f"{each.letter} against A")
        sections = (_accuracy, _bytes, _times, _gaps, _differences)
        parts += [text for section in sections if (text := section(each, width))]
        parts += [folded(note, width) for note in _remarks(each)]
    return "\n\n".join(parts)


def _accuracy(found: RunComparison, width: int | None) -> str:
    if not found.accuracy:
        return "Accuracy: no prompt was answered in both runs."
    b = found.letter
    rows = [
        [
            row.method_label,
            row.scope,
            str(row.paired.n_pairs),
            percent(row.baseline_mean),
            percent(row.method_mean),
            with_interval(
                row.paired.difference.mean, row.paired.difference.low, row.paired.difference.high, text=points
            ),
            f"{row.paired.lost} / {row.paired.won}",
            p_text(row.paired.p_value),
            row.verdict,
        ]
        for row in found.accuracy
    ]
    tests = ", ".join(dict.fromkeys(row.paired.test for row in found.accuracy))
    title = (
        f"Accuracy on the same prompts (%; {b} minus A in points with 95 % interval; lost and won: pairs; p: {tests}; "
        "verdict: p after Holm over the methods of a scope)"
    )
    headers = ["method", "prompts", "n", "A", b, f"{b} - A", "lost / won", "p", "verdict"]
    aligned = ["left", "left", *["right"] * 6, "left"]
    same = ", ".join(
        f"{pair_text(pair)} {n_same} of {n}"
        for pair, (n_same, n) in zip(found.pairs, found.same_answers, strict=True)
        if n
    )
    table = grid(rows, headers, aligned=aligned, width=width)
    return "\n".join([folded(title, width), table, folded(f"Answers that are the same text: {same}.", width)])


def _bytes(found: RunComparison, width: int | None) -> str:
    if not found.cells:
        return ""
    b = found.letter
    unit = byte_unit(cell[f"dense_kv_bytes_{side}"] for cell in found.cells for side in SIDES)
    nvml = any(cell[f"kv_nvml_bytes_{side}"] is not None for cell in found.cells for side in SIDES)
    columns = {"device": "held_bytes", **({"NVML": "kv_nvml_bytes"} if nvml else {})}
    if any(cell[f"host_kv_bytes_{side}"] for cell in found.cells for side in SIDES):
        columns["host"] = "host_kv_bytes"
    rows = []
    for cell in found.cells:
        row = [pair_text((cell["baseline"], cell["method"])), length_text(cell["length_tokens"]), cell["source"]]
        for column in columns.values():
            old, new = (cell[f"{column}_{side}"] for side in SIDES)
            row += ["n/m" if value is None else unit.text(value) for value in (old, new)]
            row.append("n/m" if old is None or new is None else change_text(change_of(old, new)))
        rows.append(row)
    headers = [
        "method",
        "length",
        "from",
        *(text for name in columns for text in (f"A {name}", f"{b} {name}", "change")),
    ]
    title = (
        f"Bytes of the KV cache ({unit.name}; device: the ledger's, metadata included; from footprint cells, or means "
        "over the answers of the same prompts)"
    )
    aligned = ["left", "right", "left", *["right"] * (3 * len(columns))]
    return f"{folded(title, width)}\n{grid(rows, headers, aligned=aligned, width=width)}"


def _times(found: RunComparison, width: int | None) -> str:
    timed = [cell for cell in found.cells if cell["tpot_s_a"] is not None and cell["tpot_s_b"] is not None]
    if not timed:
        return "Times: no footprint cell was timed in both runs."
    notes, rows, b = Notes(), [], found.letter
    for cell in timed:
        row = [pair_text((cell["baseline"], cell["method"])), length_text(cell["length_tokens"])]
        for side in SIDES:
            middle, low, high = (cell[f"{name}_{side}"] for name in ("tpot_s", "tpot_p10_s", "tpot_p90_s"))
            row.append(notes.doubted(milliseconds(middle, low, high), cell[f"time_doubts_{side}"]))
        change = change_text(change_of(cell["tpot_s_a"], cell["tpot_s_b"]))
        row.append(notes.doubted(change, cell["steps_differ"]))
        if cell["ttft_s_a"] is not None and cell["ttft_s_b"] is not None:
            row += [measured(cell["ttft_s_a"]), measured(cell["ttft_s_b"])]
            row.append(change_text(change_of(cell["ttft_s_a"], cell["ttft_s_b"])))
        else:
            row += ["n/m"] * 3
        rows.append(row)
    title = "Time per output token (TPOT, ms, median [10th, 90th percentile]) and time to first token (TTFT, s)"
    headers = ["method", "length", "A TPOT", f"{b} TPOT", "change", "A TTFT", f"{b} TTFT", "change"]
    table = grid(rows, headers, aligned=["left", *["right"] * 7], width=width)
    return "\n".join([folded(title, width), table, *(folded(line, width) for line in notes.lines())])


def _gaps(found: RunComparison, width: int | None) -> str:
    if not found.gaps:
        return "Every prompt of these methods is compared." if found.accuracy else ""
    by_place: dict[tuple[str, str, int, int], list[str]] = defaultdict(list)
    for gap in found.gaps:
        by_place[gap.why, gap.task, gap.length_tokens, gap.n].append(pair_text(gap.methods))
    rows = [
        [str(n), task, length_text(length), why, "all" if len(names) == len(found.pairs) else ", ".join(names)]
        for (why, task, length, n), names in by_place.items()
    ]
    table = grid(
        rows[:_MOST_GAPS],
        ["prompts", "task", "length", "why", "methods"],
        aligned=["right", "left", "right", "left", "left"],
        width=width,
    )
    more = [f"and {len(rows) - _MOST_GAPS} more lines; --json has all."] if len(rows) > _MOST_GAPS else []
    return "\n".join(["Prompts that are in no comparison", table, *more]).replace(" in B", f" in {found.letter}")


def _differences(found: RunComparison, width: int | None) -> str:
    if not found.differences:
        return "Configuration, versions and environment are the same."
    rows = [
        [each.area, each.key, *(shortened(value, most=_MOST_VALUE_CHARS) for value in (each.a, each.b))]
        for each in found.differences
    ]
    table = grid(rows, ["what", "key", "A", found.letter], aligned=["left"] * 4, width=width)
    return f"Configuration, versions and environment that differ\n{table}"


def _remarks(found: RunComparison) -> list[str]:
    lines = [
        f"The footprint of {pair_text(cell.methods)} at {length_text(cell.length_tokens)} is not compared: A {cell.a}, "
        f"{found.letter} {cell.b}."
        for cell in found.lone_cells
    ]
    for name, labels in zip(("A", found.letter), found.left_out, strict=True):
        if labels:
            lines.append(f"Methods of {name} that are compared with nothing: {', '.join(labels)} (see --pair).")
    return [*lines, *(note.replace(" in B", f" in {found.letter}") for note in found.notes)]


def compare_values(runs: Sequence[Run], found: Sequence[RunComparison], crossed: Sequence[str]) -> dict[str, Any]:
    """Return everything of a comparison as plain values; fractions, bytes and seconds, as the keys say."""
    return {
        "runs": {chr(ord("A") + place): str(run.folder) for place, run in enumerate(runs)},
        "comparisons": [_values(each) for each in found],
        "crossed": list(crossed),
    }


def _values(found: RunComparison) -> dict[str, Any]:
    labels = {pair_text(pair): pair for pair in found.pairs}
    return {
        "run": found.letter,
        "methods": [
            {"baseline": pair[0], "method": pair[1], "n_answers": n, "n_same_answers": n_same}
            for pair, (n_same, n) in zip(found.pairs, found.same_answers, strict=True)
        ],
        "accuracy": [
            {
                **asdict(row),
                "method_label": labels[row.method_label][1],
                "verdict": row.verdict,
            }
            for row in found.accuracy
        ],
        "cells": list(found.cells),
        "lone_cells": [asdict(cell) for cell in found.lone_cells],
        "unmatched_prompts": [asdict(gap) for gap in found.gaps],
        "methods_left_out": {"A": list(found.left_out[0]), found.letter: list(found.left_out[1])},
        "differences": [asdict(each) for each in found.differences],
        "notes": list(found.notes),
    }
