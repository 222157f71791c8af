"""Figures with bytes or time by length: memory, and time per output token."""

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator

from kvscope.reports.canvas import Label, Margins, end_labels, end_labels_height_in, panels, text_width_in
from kvscope.reports.cells import footprint_cells, memory_source, predicted_cells, step_note
from kvscope.reports.families import families, family_note, family_styles
from kvscope.reports.figure_parts import (
    ReportFigure,
    SkippedFigure,
    byte_axis,
    key_entry,
    length_axis,
    points,
    shift,
    subtitle_of,
)
from kvscope.reports.theme import MethodStyle, theme
from kvscope.reports.units import number
from kvscope.results.frames import Run, records

SIDE_BY_SIDE = "Points of one length stand side by side, so that equal values stay visible."


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
    data = cells[columns].merge(predicted_cells(run), on=["method_label", "length_tokens"], how="outer")
    data["status"] = data["status"].fillna("not in the footprint pass")
    values = pd.concat([data["measured_bytes"], data["predicted_bytes"]]).dropna().astype(float)
    values = values[values > 0]
    if not len(values):
        return SkippedFigure(name, title, "no bytes have been measured or predicted yet")
    labels = [method.label for method in run.info.methods if method.label in set(data["method_label"])]
    styles, about = _styles(run)
    lengths = sorted({*run.info.lengths_tokens, *run.info.footprint_lengths_tokens, *data["length_tokens"]})
    chosen_by_text = any(
        isinstance(config, dict) and config.get("mode") == "threshold"
        for config in (*run.footprint["config"], *run.samples["config"])
    )
    remarks = [SIDE_BY_SIDE] if len(labels) > 1 else []
    remarks += [about] if about else []
    note = " ".join([*remarks, *([ESTIMATED] if chosen_by_text else []), source.caption])
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
        f"markers are measurements, crosses are cells that ran out of memory. {note}"
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
    with theme(name):
        figure, (axes,) = panels(
            1,
            columns=1,
            width_in=6.2 if len(labels) <= 5 else 8.0,
            height_in=max(3.8 if len(labels) <= 5 else 4.6, _labels_in(styles, labels)),
            margins=Margins(left=0.8, right=_label_margin_in(styles), top=0.15),
            title=title,
            subtitle=f"{subtitle_of(run)}; median of {step_text} decode steps, batch 1",
            note=f"{SIDE_BY_SIDE} {about}".strip() if len(labels) > 1 else "",
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
            points(axes, x, y, style, line=True)
            for length in failed[failed["method_label"] == label]["length_tokens"]:
                axes.plot(factor * length, top, marker="x", color=style.color, mew=2, markersize=7, clip_on=False)
            if x:
                ends.append(Label(style.text, x[-1], y[-1], style.color))
        end_labels(axes, ends)
    caption = (
        "Time per output token: the median decode step of a run without the memory sampler, batch 1. A measurement of "
        f"this machine and build, not of the method as such. {step_note(run)} {SIDE_BY_SIDE}"
    )
    return ReportFigure(name, title, caption, figure, data.reset_index(drop=True))


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
    points(axes, [x for x, _ in measured], [y for _, y in measured], style, line=False)
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


def _styles(run: Run) -> tuple[dict[str, MethodStyle], str]:
    """Return a style a label, and what has to be said of the texts, empty if nothing."""
    labels = [method.label for method in run.info.methods]
    swept = families(labels)
    note = family_note(swept)
    return family_styles(labels, swept, with_method=True), note


def _label_margin_in(styles: dict[str, MethodStyle]) -> float:
    return 0.4 + text_width_in([style.text for style in styles.values()], fontsize=8.5)


def _labels_in(styles: dict[str, MethodStyle], labels: Sequence[str]) -> float:
    """Height that the labels right of the axes need, inches."""
    return end_labels_height_in([styles[label].text for label in labels])


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
