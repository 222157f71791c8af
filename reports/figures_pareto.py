"""Accuracy against what it costs: the bytes a method holds, and the bytes a decode step reads."""

import itertools
import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator

from kvscope.reports.canvas import Margins, panels
from kvscope.reports.cells import NOT_SEEN, MemorySource, memory_source, pool_notes, pooled_answers, pooled_cells
from kvscope.reports.families import Family, families, family_styles
from kvscope.reports.figure_parts import (
    ReportFigure,
    SkippedFigure,
    accuracy_tip,
    byte_axis,
    key_entry,
    names_key,
    points,
)
from kvscope.reports.labels import Label, free_labels
from kvscope.reports.look import look
from kvscope.reports.subtitle import subtitle_of
from kvscope.reports.theme import MethodStyle, theme
from kvscope.reports.units import bytes_text, length_text
from kvscope.results.frames import Run, records

MOST_IN_COLUMN = 3
"""Panels of a figure whose width is asked for."""
READS_AXIS = "KV cache read a decode step (counted)"
READS_CAPTION = (
    "Bytes read are counted, not timed: keys and values that the step attends to and what it reads to choose them, "
    "over all layers, mean over the steps."
)


def accuracy_against_memory(run: Run, cells: pd.DataFrame) -> ReportFigure | SkippedFigure:
    """Accuracy against bytes of the same method and length, one panel a length, with the Pareto front."""
    source = memory_source(run)
    caption = (
        "Accuracy (pooled over tasks) against the bytes of the same method at the same length, metadata included. The "
        f"line is the Pareto front of the point estimates. {source.caption}"
    )
    return _pareto_figure(
        run,
        _accuracy_with(run, cells, _held_bytes(run, source)).assign(bytes_source=source.kind),
        name="accuracy_against_memory",
        title="Accuracy against memory",
        axis=source.axis,
        less="both holds less",
        note=source.caption,
        caption=caption,
        nothing=NOT_SEEN if run.info.served else "no method has both a score and measured bytes at one length yet",
    )


def accuracy_against_reads(run: Run, cells: pd.DataFrame) -> ReportFigure | SkippedFigure:
    """Accuracy against the bytes one decode step reads on the same prompts, one panel a length, with the Pareto front.

    Methods that keep everything and read little are apart from dense here and on top of it in the figure of memory.
    """
    ok = pooled_answers(run)
    caption = (
        "Accuracy (pooled over tasks) against the bytes one decode step reads, on the same prompts. A method may read "
        f"little and hold everything: see accuracy against memory beside it. {READS_CAPTION}"
    )
    return _pareto_figure(
        run,
        _accuracy_with(run, cells, _mean_bytes(ok, ok["bytes_read_per_step"])),
        name="accuracy_against_reads",
        title="Accuracy against bytes read",
        axis=READS_AXIS,
        less="both reads less",
        note=READS_CAPTION,
        caption=caption,
        nothing=NOT_SEEN if run.info.served else "no prompt has been scored yet",
    )


def _pareto_figure(
    run: Run, data: pd.DataFrame, *, name: str, title: str, axis: str, less: str, note: str, caption: str, nothing: str
) -> ReportFigure | SkippedFigure:
    """Draw accuracy against ``data["bytes"]``, or say that there is ``nothing`` to draw.

    ``less`` says what having fewer bytes means here.
    """
    if not len(data):
        return SkippedFigure(name, title, nothing)
    data = pd.concat([_with_front(rows) for _, rows in data.groupby("length_tokens")], ignore_index=True)
    lengths = sorted(set(data["length_tokens"]))
    # A panel a length: in a column of text more than these are taller than a page.
    panels_shown = lengths[-MOST_IN_COLUMN:] if look().keyed else lengths
    labels = [method.label for method in run.info.methods]
    swept = families(labels)
    styles = family_styles(labels, swept)
    crowded = len(labels) > 5
    key = [key_entry(f"Pareto front: nothing else {less} and is more accurate", line="-")]
    if not (data.groupby("length_tokens")["pareto"].sum() > 1).any():
        key = []
    for family in swept:
        style = styles[next(iter(family.values))]
        key.append(key_entry(family.text, marker=style.marker, color=style.color, line=style.dash))
    key = [*names_key(styles, [label for label in labels if label in set(data["method_label"])], lines=False), *key]
    with theme(name):
        figure, all_axes = panels(
            len(panels_shown),
            columns=2,
            width_in=4.6 if crowded or len(lengths) == 1 else 3.7,
            height_in=3.2 if crowded else 2.7,
            margins=Margins(left=0.75, right=0.25, top=0.42, bottom=0.62),
            title=title,
            subtitle=f"{subtitle_of(run)}; up and left is better; bars: 95 % intervals",
            note=note,
            key=key,
        )
        for length, axes in zip(panels_shown, all_axes, strict=True):
            _pareto_panel(axes, data[data["length_tokens"] == length], styles, axis, swept)
            axes.set_title(f"{length_text(length)} tokens", fontweight="bold")
    if len(panels_shown) < len(lengths):
        caption += f" Shorter lengths are in the CSV alone: {', '.join(map(length_text, lengths[:-MOST_IN_COLUMN]))}."
    caption = " ".join([caption, *pool_notes(run.info)])
    return ReportFigure(name, title, caption, figure, data)


def _held_bytes(run: Run, source: MemorySource) -> pd.DataFrame:
    """Bytes by method and length: NVML's from the footprint pass, or the ledger's from the scored prompts."""
    key = ["method_label", "length_tokens"]
    if source.kind == "nvml":
        measured = run.footprint[run.footprint["status"] == "ok"][[*key, "kv_nvml_bytes"]]
        return measured.rename(columns={"kv_nvml_bytes": "bytes"})
    ok = pooled_answers(run)
    return _mean_bytes(ok, ok["resident_kv_bytes"] + ok["metadata_bytes"])


def _mean_bytes(rows: pd.DataFrame, values: "pd.Series[float]") -> pd.DataFrame:
    """Mean of ``values`` over the prompts of each method and length."""
    key = ["method_label", "length_tokens"]
    held = values.astype("float64").rename("bytes")
    return pd.concat([rows[key], held], axis=1).groupby(key)["bytes"].mean().reset_index()


def _accuracy_with(run: Run, cells: pd.DataFrame, bytes_of: pd.DataFrame) -> pd.DataFrame:
    """Pooled accuracy joined with the bytes of the same method and length."""
    pooled = pooled_cells(run, cells)
    key = ["method_label", "length_tokens"]
    columns = [*key, "n", "accuracy", "ci_low", "ci_high"]
    data = pooled[columns].dropna(subset=["accuracy"]).merge(bytes_of, on=key, how="inner")
    data["bytes"] = data["bytes"].astype("float64")
    return data[data["bytes"] > 0].reset_index(drop=True)


def _with_front(rows: pd.DataFrame) -> pd.DataFrame:
    """Mark the rows that no other row beats in both bytes and accuracy."""
    ordered = rows.sort_values(["bytes", "accuracy"], ascending=[True, False])
    best_before = ordered["accuracy"].cummax().shift(fill_value=-math.inf)
    return rows.assign(pareto=ordered["accuracy"] > best_before)


def _pareto_panel(
    axes: Axes, rows: pd.DataFrame, styles: dict[str, MethodStyle], axis: str, swept: Sequence[Family]
) -> None:
    low, high = float(rows["bytes"].min()), float(rows["bytes"].max())
    pad = max(2.0, (high / low) ** 0.15)
    byte_axis(axes, low / pad, high * pad, which="x", most=5)
    axes.set_ylim(-8, 112)
    axes.yaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    axes.set_ylabel("accuracy (%)")
    axes.set_xlabel(axis)
    front = [(row["bytes"], 100 * row["accuracy"]) for row in records(rows[rows["pareto"]].sort_values("bytes"))]
    steps = front[:1]
    for (_, before), (x, y) in itertools.pairwise(front):
        steps += [(x, before), (x, y)]
    axes.plot(*zip(*steps, strict=True), color="#999999", linewidth=1.2, zorder=1)
    place = {row["method_label"]: (row["bytes"], 100 * row["accuracy"]) for row in records(rows)}
    paths = [[place[label] for label in family.values if label in place] for family in swept]
    for family, path in zip(swept, paths, strict=True):
        style = styles[next(iter(family.values))]
        if path:
            axes.plot(*zip(*path, strict=True), color=style.color, linestyle=style.dash, linewidth=1.1, zorder=2)
    labels, bars = [], []
    for row in records(rows):
        style = styles[row["method_label"]]
        x, y = row["bytes"], 100 * row["accuracy"]
        if row["ci_low"] is not None:
            bars.append([(x, 100 * row["ci_low"]), (x, 100 * row["ci_high"])])
            axes.plot(*zip(*bars[-1], strict=True), color=style.color, linewidth=1, alpha=0.35)
        where = f"{length_text(row['length_tokens'])}, {bytes_text(x)}"
        points(axes, [x], [y], style, says=accuracy_tip(row["method_label"], where, row))
        labels.append(Label(style.text, x, y, style.color))
    free_labels(axes, labels, lines=[steps, *bars, *(path for path in paths if path)])
