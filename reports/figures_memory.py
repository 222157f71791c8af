"""Figures with bytes or time by length: memory, and time per output token."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from kvscope.reports.canvas import Margins, panels
from kvscope.reports.cells import answered_cells, footprint_cells, memory_source, predicted_cells, step_note
from kvscope.reports.families import families, family_note, family_styles
from kvscope.reports.figure_parts import (
    NESTED,
    ReportFigure,
    SkippedFigure,
    beside,
    byte_axis,
    hollow_entry,
    key_entry,
    length_axis,
    names_key,
)
from kvscope.reports.labels import Label, end_labels, end_labels_height_in, names_margin_in
from kvscope.reports.look import look
from kvscope.reports.overlap import draw_crosses, draw_lines, draw_markers
from kvscope.reports.subtitle import subtitle_of
from kvscope.reports.theme import MethodStyle, theme
from kvscope.reports.units import bytes_text, length_text, milliseconds, number
from kvscope.results.frames import Run, records

ANSWERED = "measured while answering (ledger; no footprint cell)"
ESTIMATED = (
    "A threshold keeps what the text asks for: its line is an estimate, or all it could hold where no indexer says how "
    "much it keeps."
)


def memory_by_length(run: Run) -> ReportFigure | SkippedFigure:
    """Bytes against length, log-log: measured points, the predicted line, out-of-memory marks."""
    name, title = "memory_by_length", "Memory by length"
    source = memory_source(run)
    cells = footprint_cells(run)
    column = "kv_nvml_bytes" if source.kind == "nvml" else "held_bytes"
    cells["measured_bytes"] = cells[column].where(cells["status"] == "ok")
    columns = ["method_label", "length_tokens", "status", "reason", "measured_bytes"]
    key = ["method_label", "length_tokens"]
    data = (
        cells[columns].merge(predicted_cells(run), on=key, how="outer").merge(answered_cells(run), on=key, how="outer")
    )
    data["status"] = data["status"].fillna("not in the footprint pass")
    # Where a fresh process measured a cell, what its prompts held while they were answered is not drawn beside it.
    data["answered_bytes"] = data["answered_bytes"].where(data["measured_bytes"].isna())
    values = pd.concat([data[name] for name in ("measured_bytes", "predicted_bytes", "answered_bytes")])
    values = values.dropna().astype(float)
    values = values[values > 0]
    if not len(values):
        return SkippedFigure(name, title, "no bytes have been measured or predicted yet")
    labels = [method.label for method in run.info.methods if method.label in set(data["method_label"])]
    styles, about = _styles(run)
    lengths = sorted({*run.info.lengths_tokens, *run.info.footprint_lengths_tokens, *data["length_tokens"]})
    settings = run.samples.drop_duplicates(["method_label", "length_tokens"])["config"]
    chosen_by_text = any(
        isinstance(config, dict) and config.get("mode") == "threshold"
        for config in (*run.footprint["config"], *settings)
    )
    remarks = [NESTED] if len(labels) > 1 else []
    remarks += [about] if about else []
    note = " ".join([*remarks, *([ESTIMATED] if chosen_by_text else []), source.caption])
    measured_text = "measured in a process of its own"
    with theme(name):
        figure, (axes,) = panels(
            1,
            columns=1,
            width_in=6.2 if len(labels) <= 5 else 8.0,
            height_in=max(4.2 if len(labels) <= 5 else 5.0, _labels_in(styles, labels)),
            margins=Margins(left=0.95, right=_label_margin_in(styles), top=0.15),
            title=title,
            subtitle=subtitle_of(run),
            note=note,
            key=[
                *names_key(styles, labels),
                *([key_entry(measured_text, marker="o")] if data["measured_bytes"].notna().any() else []),
                *([hollow_entry(ANSWERED)] if data["answered_bytes"].notna().any() else []),
                *([key_entry("predicted before the run", line=":")] if data["predicted_bytes"].notna().any() else []),
                *(
                    [key_entry("out of memory (at the predicted bytes)", marker="x")]
                    if "oom" in set(data["status"])
                    else []
                ),
            ],
        )
        length_axis(axes, lengths)
        byte_axis(axes, float(values.min()) / 1.8, float(values.max()) * 1.8, which="y", most=9)
        axes.set_ylabel(beside(axes, source.axis))
        rows = {label: data[data["method_label"] == label].sort_values("length_tokens") for label in labels}
        end_labels(axes, _memory_lines(axes, rows, styles))
    caption = (
        "Bytes of the KV cache against length, both axes logarithmic. Markers are measurements, those of a process of "
        "its own joined by a line. Hollow ones are the ledger's mean over the scored prompts, where no footprint cell "
        "ran. Dotted lines are predictions made before the run, and crosses are cells that ran out of memory. "
        f"{note}"
    )
    return ReportFigure(name, title, caption, figure, data.reset_index(drop=True))


def tpot_by_length(run: Run) -> ReportFigure | SkippedFigure:
    """Time per output token against length."""
    name, title = "tpot_by_length", "Time per output token by length"
    cells = footprint_cells(run)
    columns = [
        "method_label",
        "length_tokens",
        "status",
        "reason",
        "tpot_s",
        "tpot_steps",
        "device",
        "dtype",
        "backend",
        "step_backend",
        "tpot_p10_s",
        "tpot_p90_s",
        "time_doubts",
    ]
    data = cells[columns]
    timed = data[data["status"] == "ok"]
    if not len(timed):
        return SkippedFigure(name, title, "no footprint cell has been timed yet")
    labels = [method.label for method in run.info.methods if method.label in set(data["method_label"])]
    styles, about = _styles(run)
    lengths = sorted(set(run.info.footprint_lengths_tokens) | set(timed["length_tokens"]))
    steps = sorted(set(timed["tpot_steps"]))
    step_text = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"
    failed = data[data["status"] == "oom"]
    doubted = {
        (row["method_label"], row["length_tokens"]): row["time_doubts"] for row in records(timed) if row["time_doubts"]
    }
    doubts = f"Hollow: not to be trusted ({'; '.join(dict.fromkeys(doubted.values()))})." if doubted else ""
    spread = "bars: 10th to 90th percentile" if timed["tpot_p10_s"].notna().any() else "their spread was not recorded"
    with theme(name):
        figure, (axes,) = panels(
            1,
            columns=1,
            width_in=6.2 if len(labels) <= 5 else 8.0,
            height_in=max(3.8 if len(labels) <= 5 else 4.6, _labels_in(styles, labels)),
            margins=Margins(left=0.8, right=_label_margin_in(styles), top=0.15),
            title=title,
            subtitle=f"{subtitle_of(run)}; median of {step_text} decode steps, batch 1; {spread}",
            note=" ".join(filter(None, [NESTED if len(labels) > 1 else "", about, doubts])),
            key=[
                *names_key(styles, labels),
                *([key_entry("out of memory (no time)", marker="x")] if len(failed) else []),
            ],
        )
        length_axis(axes, lengths)
        shown = [*timed["tpot_s"], *timed["tpot_p10_s"].dropna(), *timed["tpot_p90_s"].dropna()]
        top = _time_axis(axes, [1000 * value for value in shown])
        paths = {
            label: [(float(row["length_tokens"]), 1000 * row["tpot_s"]) for row in records(rows)]
            for label in labels
            if len(rows := timed[timed["method_label"] == label])
        }
        draw_lines(axes, paths, styles, width=1.4)
        hollow = [(label, i) for label, path in paths.items() for i, (x, _) in enumerate(path) if (label, x) in doubted]
        tips = {
            label: [
                f"{look().names.get(label, label)}, {length_text(row['length_tokens'])}: "
                f"{milliseconds(row['tpot_s'], row['tpot_p10_s'], row['tpot_p90_s'])} ms, {row['tpot_steps']} steps"
                for row in records(timed[timed["method_label"] == label])
            ]
            for label in paths
        }
        draw_markers(axes, paths, styles, hollow=hollow, tips=tips)
        for row in records(timed):
            if row["tpot_p10_s"] is not None and row["tpot_p90_s"] is not None:
                low, high = 1000 * row["tpot_p10_s"], 1000 * row["tpot_p90_s"]
                axes.vlines(
                    row["length_tokens"], low, high, color=styles[row["method_label"]].color, lw=1.1, alpha=0.55
                )
        crosses = {
            label: [(float(length), top) for length in failed[failed["method_label"] == label]["length_tokens"]]
            for label in labels
        }
        draw_crosses(axes, crosses, styles)
        end_labels(axes, [Label(styles[label].text, *path[-1], styles[label].color) for label, path in paths.items()])
    caption = (
        "Time per output token: the median decode step of a run without the memory sampler, batch 1. A measurement of "
        f"this machine and build, not of the method as such. {step_note(run)} {NESTED} {doubts}".rstrip()
    )
    return ReportFigure(name, title, caption, figure, data.reset_index(drop=True))


def _memory_lines(axes: Axes, rows: Mapping[str, pd.DataFrame], styles: Mapping[str, MethodStyle]) -> list[Label]:
    """Predicted lines, measured points and crosses by method; returns the labels for the lines' right ends."""
    predicted = {label: _places(table, "predicted_bytes") for label, table in rows.items()}
    measured = {label: _places(table, "measured_bytes") for label, table in rows.items()}
    answered = {label: _places(table, "answered_bytes") for label, table in rows.items()}
    crosses = {label: _places(table[table["status"] == "oom"], "predicted_bytes") for label, table in rows.items()}
    for label, path in predicted.items():
        short: dict[str, Any] = {"marker": "_", "ms": 20} if len(path) == 1 else {}
        if path:
            x, y = zip(*path, strict=True)
            axes.plot(x, y, color=styles[label].color, linestyle=":", linewidth=1, alpha=0.8, zorder=1.5, **short)
    draw_lines(axes, {label: path for label, path in measured.items() if len(path) > 1}, styles, width=1.3)
    both = {label: [*measured[label], *answered[label]] for label in rows}
    hollow = [(label, len(measured[label]) + i) for label in rows for i in range(len(answered[label]))]
    kinds = {label: ["measured"] * len(measured[label]) + [ANSWERED] * len(answered[label]) for label in rows}
    tips = {
        label: [
            f"{look().names.get(label, label)}, {length_text(int(x))}: {bytes_text(y)}, {kind}"
            for (x, y), kind in zip(both[label], kinds[label], strict=True)
        ]
        for label in rows
    }
    draw_markers(axes, both, styles, hollow=hollow, tips=tips)
    draw_crosses(axes, crosses, styles)
    ends = {label: [*predicted[label], *both[label]] for label in rows}
    return [Label(styles[label].text, *max(path), styles[label].color) for label, path in ends.items() if path]


def _places(rows: pd.DataFrame, column: str) -> list[tuple[float, float]]:
    """(length, bytes) where there are any; a logarithmic axis has no place for nil."""
    return [
        (float(row["length_tokens"]), float(row[column]))
        for row in records(rows)
        if row[column] is not None and row[column] > 0
    ]


def _styles(run: Run) -> tuple[dict[str, MethodStyle], str]:
    """Return a style a label, and what has to be said of the texts, empty if nothing."""
    labels = [method.label for method in run.info.methods]
    swept = families(labels)
    note = family_note(swept)
    return family_styles(labels, swept, with_method=True), note


def _label_margin_in(styles: dict[str, MethodStyle]) -> float:
    return names_margin_in([style.text for style in styles.values()])


def _labels_in(styles: dict[str, MethodStyle], labels: Sequence[str]) -> float:
    """Height that the labels right of the axes need, inches."""
    return end_labels_height_in([styles[label].text for label in labels])


def _time_axis(axes: Axes, values_ms: list[float]) -> float:
    """Linear from nil, or logarithmic when the times differ more than tenfold; returns the top of the axis."""
    low, high = min(values_ms), max(values_ms)
    axes.set_ylabel(beside(axes, "time per output token (ms)"))
    if high <= 10 * low:
        top = 1.15 * high
        axes.set_ylim(0, top)
        return top
    top = high * 1.6
    axes.set_yscale("log", base=2)
    axes.set_ylim(low / 1.6, top)
    first, last = math.floor(math.log2(low / 1.6)), math.ceil(math.log2(top))
    stride = math.ceil((last - first + 1) / 8)
    axes.yaxis.set_major_locator(FixedLocator([2.0**power for power in range(first, last + 1, stride)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    return top
