"""Figures with bytes or time: accuracy against memory, memory by length, time per output token by length."""

import itertools
import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator

from kvscope.reports.canvas import Label, Margins, end_labels, free_labels, panels, text_width_in
from kvscope.reports.cells import ALL_TASKS, MemorySource, footprint_cells, memory_source, predicted_cells
from kvscope.reports.figure_parts import (
    ReportFigure,
    SkippedFigure,
    byte_axis,
    key_entry,
    length_axis,
    shift,
    subtitle_of,
)
from kvscope.reports.theme import MethodStyle, method_styles, theme
from kvscope.reports.units import length_text, number
from kvscope.results.frames import Run, records

SIDE_BY_SIDE = "Points of one length stand side by side, so that equal values stay visible."


def accuracy_against_memory(run: Run, cells: pd.DataFrame) -> ReportFigure | SkippedFigure:
    """Accuracy against bytes of the same method and length, one panel a length, with the Pareto front."""
    name, title = "accuracy_against_memory", "Accuracy against memory"
    source = memory_source(run)
    data = _accuracy_with_bytes(run, cells, source)
    if not len(data):
        return SkippedFigure(name, title, "no method has both a score and measured bytes at one length yet")
    data = pd.concat([_with_front(rows) for _, rows in data.groupby("length_tokens")], ignore_index=True)
    lengths = sorted(set(data["length_tokens"]))
    labels = [method.label for method in run.info.methods]
    styles = method_styles(labels)
    crowded = len(labels) > 5
    drawn = bool((data.groupby("length_tokens")["pareto"].sum() > 1).any())
    with theme(name):
        figure, all_axes = panels(
            len(lengths),
            columns=2,
            width_in=4.6 if crowded or len(lengths) == 1 else 3.7,
            height_in=3.2 if crowded else 2.7,
            margins=Margins(left=0.75, right=0.25, top=0.42, bottom=0.62),
            title=title,
            subtitle=f"{subtitle_of(run)}; up and left is better; bars: 95 % intervals",
            note=source.caption,
            key=[key_entry("Pareto front: nothing else is both smaller and more accurate", line="-")] if drawn else [],
        )
        for length, axes in zip(lengths, all_axes, strict=True):
            _pareto_panel(axes, data[data["length_tokens"] == length], styles, source)
            axes.set_title(f"{length_text(length)} tokens", fontweight="bold")
    caption = (
        "Accuracy (pooled over tasks) against the bytes of the same method at the same length, metadata included. The "
        f"line is the Pareto front of the point estimates. {source.caption}"
    )
    return ReportFigure(name, title, caption, figure, data)


def memory_by_length(run: Run) -> ReportFigure | SkippedFigure:
    """Bytes against length, log-log: measured points, the predicted line, out-of-memory marks."""
    name, title = "memory_by_length", "Memory by length"
    source = memory_source(run)
    cells = footprint_cells(run)
    column = "kv_nvml_bytes" if source.kind == "nvml" else "held_bytes"
    cells["measured_bytes"] = cells[column].where(cells["status"] == "ok")
    columns = ["method_label", "length_tokens", "status", "reason", "measured_bytes"]
    data = cells[columns].merge(predicted_cells(run), on=["method_label", "length_tokens"], how="outer")
    data["status"] = data["status"].fillna("not in the footprint pass")
    values = pd.concat([data["measured_bytes"], data["predicted_bytes"]]).dropna().astype(float)
    values = values[values > 0]
    if not len(values):
        return SkippedFigure(name, title, "no bytes have been measured or predicted yet")
    labels = [method.label for method in run.info.methods if method.label in set(data["method_label"])]
    styles = method_styles([method.label for method in run.info.methods])
    lengths = sorted(set(run.info.lengths_tokens) | set(run.info.footprint_lengths_tokens))
    with theme(name):
        figure, (axes,) = panels(
            1,
            columns=1,
            width_in=6.2 if len(labels) <= 5 else 8.0,
            height_in=4.2 if len(labels) <= 5 else 5.0,
            margins=Margins(left=0.95, right=_label_margin_in(styles), top=0.15),
            title=title,
            subtitle=subtitle_of(run),
            note=f"{SIDE_BY_SIDE} {source.caption}" if len(labels) > 1 else source.caption,
            key=[
                key_entry("measured", marker="o"),
                key_entry("predicted", line="-"),
                *(
                    [key_entry("out of memory (at the predicted bytes)", marker="x")]
                    if "oom" in set(data["status"])
                    else []
                ),
            ],
        )
        length_axis(axes, lengths)
        byte_axis(axes, float(values.min()) / 1.8, float(values.max()) * 1.8, which="y", most=9)
        axes.set_ylabel(source.axis)
        ends = []
        for place, label in enumerate(labels):
            rows = data[data["method_label"] == label].sort_values("length_tokens")
            end = _memory_line(axes, rows, styles[label], factor=shift(place, len(labels)))
            if end is not None:
                ends.append(end)
        end_labels(axes, ends)
    caption = (
        "Bytes of the KV cache against length, both axes logarithmic. Lines are predictions made before the run, "
        f"markers are measurements, crosses are cells that ran out of memory. {SIDE_BY_SIDE} {source.caption}"
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
    ]
    data = cells[columns]
    timed = data[data["status"] == "ok"]
    if not len(timed):
        return SkippedFigure(name, title, "no footprint cell has been timed yet")
    labels = [method.label for method in run.info.methods if method.label in set(data["method_label"])]
    styles = method_styles([method.label for method in run.info.methods])
    lengths = sorted(set(run.info.footprint_lengths_tokens) | set(timed["length_tokens"]))
    steps = sorted(set(timed["tpot_steps"]))
    step_text = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"
    failed = data[data["status"] == "oom"]
    with theme(name):
        figure, (axes,) = panels(
            1,
            columns=1,
            width_in=6.2 if len(labels) <= 5 else 8.0,
            height_in=3.8 if len(labels) <= 5 else 4.6,
            margins=Margins(left=0.8, right=_label_margin_in(styles), top=0.15),
            title=title,
            subtitle=f"{subtitle_of(run)}; median of {step_text} decode steps, batch 1",
            note=SIDE_BY_SIDE if len(labels) > 1 else "",
            key=[key_entry("out of memory (no time)", marker="x")] if len(failed) else [],
        )
        length_axis(axes, lengths)
        top = _time_axis(axes, [1000 * value for value in timed["tpot_s"]])
        ends = []
        for place, label in enumerate(labels):
            style, factor = styles[label], shift(place, len(labels))
            rows = timed[timed["method_label"] == label]
            x = [factor * length for length in rows["length_tokens"]]
            y = [1000 * value for value in rows["tpot_s"]]
            _points(axes, x, y, style, line=True)
            for length in failed[failed["method_label"] == label]["length_tokens"]:
                axes.plot(factor * length, top, marker="x", color=style.color, mew=2, markersize=7, clip_on=False)
            if x:
                ends.append(Label(style.text, x[-1], y[-1], style.color))
        end_labels(axes, ends)
    caption = (
        "Time per output token: the median decode step of a run without the memory sampler, batch 1. A measurement of "
        f"this machine and build, not of the method as such. {SIDE_BY_SIDE}"
    )
    return ReportFigure(name, title, caption, figure, data.reset_index(drop=True))


def _accuracy_with_bytes(run: Run, cells: pd.DataFrame, source: MemorySource) -> pd.DataFrame:
    """Pooled accuracy joined with bytes: NVML's from the footprint pass, or the ledger's from the very same prompts."""
    pooled = cells[cells["task"] == (ALL_TASKS if len(run.info.tasks) > 1 else run.info.tasks[0])]
    key = ["method_label", "length_tokens"]
    if source.kind == "nvml":
        measured = run.footprint[run.footprint["status"] == "ok"][[*key, "kv_nvml_bytes"]]
        bytes_of: pd.DataFrame = measured.rename(columns={"kv_nvml_bytes": "bytes"})
    else:
        ok = run.samples[run.samples["status"] == "ok"]
        held = (ok["resident_kv_bytes"] + ok["metadata_bytes"]).astype("float64").rename("bytes")
        bytes_of = pd.concat([ok[key], held], axis=1).groupby(key)["bytes"].mean().reset_index()
    columns = [*key, "n", "accuracy", "ci_low", "ci_high"]
    data = pooled[columns].dropna(subset=["accuracy"]).merge(bytes_of, on=key, how="inner")
    data["bytes"] = data["bytes"].astype("float64")
    data["bytes_source"] = source.kind
    return data[data["bytes"] > 0].reset_index(drop=True)


def _with_front(rows: pd.DataFrame) -> pd.DataFrame:
    """Mark the rows that no other row beats in both bytes and accuracy."""
    ordered = rows.sort_values(["bytes", "accuracy"], ascending=[True, False])
    best_before = ordered["accuracy"].cummax().shift(fill_value=-math.inf)
    return rows.assign(pareto=ordered["accuracy"] > best_before)


def _pareto_panel(axes: Axes, rows: pd.DataFrame, styles: dict[str, MethodStyle], source: MemorySource) -> None:
    low, high = float(rows["bytes"].min()), float(rows["bytes"].max())
    pad = max(2.0, (high / low) ** 0.15)
    byte_axis(axes, low / pad, high * pad, which="x", most=5)
    axes.set_ylim(-8, 112)
    axes.yaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    axes.set_ylabel("accuracy (%)")
    axes.set_xlabel(source.axis)
    front = [(row["bytes"], 100 * row["accuracy"]) for row in records(rows[rows["pareto"]].sort_values("bytes"))]
    steps = front[:1]
    for (_, before), (x, y) in itertools.pairwise(front):
        steps += [(x, before), (x, y)]
    axes.plot(*zip(*steps, strict=True), color="#999999", linewidth=1.2, zorder=1)
    labels, bars = [], []
    for row in records(rows):
        style = styles[row["method_label"]]
        x, y = row["bytes"], 100 * row["accuracy"]
        if row["ci_low"] is not None:
            bars.append([(x, 100 * row["ci_low"]), (x, 100 * row["ci_high"])])
            axes.plot(*zip(*bars[-1], strict=True), color=style.color, linewidth=1, alpha=0.35)
        _points(axes, [x], [y], style, line=False)
        labels.append(Label(style.text, x, y, style.color))
    free_labels(axes, labels, lines=[steps, *bars])


def _memory_line(axes: Axes, rows: pd.DataFrame, style: MethodStyle, *, factor: float) -> Label | None:
    """One method's predicted line, measured points and crosses; returns the label for the line's right end."""
    predicted = [
        (factor * row["length_tokens"], float(row["predicted_bytes"]))
        for row in records(rows)
        if row["predicted_bytes"]
    ]
    if predicted:
        xs, ys = zip(*predicted, strict=True)
        alone = "_" if len(xs) == 1 else "None"
        axes.plot(xs, ys, color=style.color, ls=style.dash, lw=1.1, alpha=0.8, marker=alone, ms=26, zorder=2)
    measured = [
        (factor * row["length_tokens"], float(row["measured_bytes"]))
        for row in records(rows)
        if row["measured_bytes"] is not None and row["measured_bytes"] > 0
    ]
    _points(axes, [x for x, _ in measured], [y for _, y in measured], style, line=False)
    crosses = [
        (factor * row["length_tokens"], float(row["predicted_bytes"]))
        for row in records(rows)
        if row["status"] == "oom" and row["predicted_bytes"]
    ]
    for x, y in crosses:
        axes.plot(x, y, marker="x", color=style.color, mew=2, markersize=7.5, zorder=4)
    ends = predicted or measured
    if not ends:
        return None
    x, y = max(ends)
    return Label(style.text, x, y, style.color)


def _label_margin_in(styles: dict[str, MethodStyle]) -> float:
    return 0.4 + text_width_in([style.text for style in styles.values()], fontsize=8.5)


def _points(axes: Axes, x: list[float], y: list[float], style: MethodStyle, *, line: bool) -> None:
    axes.plot(
        x,
        y,
        color=style.color,
        marker=style.marker,
        markersize=style.size,
        linestyle=style.dash if line else "None",
        linewidth=1.4,
        markeredgecolor="white",
        markeredgewidth=0.7,
        zorder=3,
    )


def _time_axis(axes: Axes, values_ms: list[float]) -> float:
    """Linear from nil, or logarithmic when the times differ more than tenfold; returns the top of the axis."""
    low, high = min(values_ms), max(values_ms)
    axes.set_ylabel("time per output token (ms)")
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
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    return top
