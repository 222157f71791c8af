"""Accuracy figures: by length and by task."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator

from kvscope.reports.canvas import Margins, panels, text_width_in, title_band_in
from kvscope.reports.cells import ALL_TASKS, pool_notes, pooled_cells, pooled_tasks
from kvscope.reports.figure_parts import (
    NESTED,
    ReportFigure,
    SkippedFigure,
    accuracy_tip,
    apart,
    length_axis,
    names_key,
)
from kvscope.reports.hover import tip
from kvscope.reports.labels import Label, end_labels, end_labels_height_in, names_margin_in
from kvscope.reports.look import look
from kvscope.reports.overlap import draw_lines, draw_markers
from kvscope.reports.subtitle import subtitle_of
from kvscope.reports.theme import MethodStyle, figure_names, method_styles, short_lines, theme
from kvscope.reports.units import length_text
from kvscope.results.frames import Run, records

_ONE_PANEL = 4
"""Up to this many methods share one panel with their intervals; more get a panel each."""
HEAT = "cividis"


def accuracy_by_length(run: Run, cells: pd.DataFrame) -> ReportFigure | SkippedFigure:
    """Accuracy pooled over tasks against length, one line a method, 95 % intervals."""
    name, title = "accuracy_by_length", "Accuracy by length"
    if len(run.info.methods) == 1 and len(run.info.tasks) > 1:
        return _by_length_and_task(run, cells, name=name, title=title)
    pooled = pooled_cells(run, cells)
    data = pooled.dropna(subset=["accuracy"])
    if not len(data):
        return SkippedFigure(name, title, "no prompt has been scored yet")
    labels = [method.label for method in run.info.methods if method.label in set(data["method_label"])]
    styles = method_styles([method.label for method in run.info.methods])
    lengths = list(run.info.lengths_tokens)
    subtitle = (
        f"{subtitle_of(run)}; {', '.join(pooled_tasks(run.info))}; {_counts_text(data)} prompts a point; "
        "bars: 95 % intervals"
    )
    with theme(name):
        if len(labels) <= _ONE_PANEL:
            right = names_margin_in([styles[label].text for label in labels])
            figure, (axes,) = panels(
                1,
                columns=1,
                width_in=5.6,
                height_in=max(3.3, end_labels_height_in([styles[label].text for label in labels])),
                margins=Margins(right=right, top=0.15),
                title=title,
                subtitle=subtitle,
                key=names_key(styles, labels),
            )
            _percent_axis(axes)
            length_axis(axes, lengths)
            _lines(axes, {label: data[data["method_label"] == label] for label in labels}, styles, width=1.6)
            ends = [(label, data[data["method_label"] == label].iloc[-1]) for label in labels]
            end_labels(
                axes,
                [
                    Label(styles[label].text, row["length_tokens"], 100 * row["accuracy"], styles[label].color)
                    for label, row in ends
                ],
            )
        else:
            names = figure_names([method.label for method in run.info.methods])
            titles = [short_lines(names[label], width=34) for label in labels]
            figure, all_axes = panels(
                len(labels),
                columns=3,
                width_in=3.1,
                height_in=1.9,
                margins=Margins(left=0.7, right=0.25, top=title_band_in(titles), bottom=0.62),
                title=title,
                subtitle=f"{subtitle}; in grey: dense",
            )
            dense = data[data["method_label"] == "dense"]
            for label, text, axes in zip(labels, titles, all_axes, strict=True):
                if label != "dense" and len(dense):
                    at = dense["length_tokens"].to_numpy(float)
                    axes.plot(at, 100 * dense["accuracy"].to_numpy(float), color="#AAAAAA", linewidth=3.5, zorder=1)
                _percent_axis(axes)
                length_axis(axes, lengths)
                _lines(axes, {label: data[data["method_label"] == label]}, styles, width=1.4)
                axes.set_title(text, color=styles[label].color, fontweight="bold")
    caption = (
        "Accuracy pooled over tasks, with 95 % intervals (Wilson for 0/1 scores, bootstrap for graded ones). "
        f"{NESTED} Prompts without a score (out of memory, "
        "failed) are left out, never counted as wrong."
    )
    caption = " ".join([caption, *pool_notes(run.info)])
    return ReportFigure(name, title, caption, figure, data.reset_index(drop=True))


def _by_length_and_task(run: Run, cells: pd.DataFrame, *, name: str, title: str) -> ReportFigure | SkippedFigure:
    """The one method's accuracy against length, one panel a task: pooled, its tasks would hide each other."""
    data = cells[cells["task"] != ALL_TASKS].dropna(subset=["accuracy"])
    tasks = [task for task in run.info.tasks if task in set(data["task"])]
    if not tasks:
        return SkippedFigure(name, title, "no prompt has been scored yet")
    label = run.info.methods[0].label
    style = method_styles([label])[label]
    with theme(name):
        figure, all_axes = panels(
            len(tasks),
            columns=3,
            width_in=3.1,
            height_in=1.9,
            margins=Margins(left=0.7, right=0.25, top=0.43, bottom=0.62),
            title=f"{title}: {label}",
            subtitle=f"{subtitle_of(run)}; {_counts_text(data)} prompts a point; bars: 95 % intervals",
        )
        for task, axes in zip(tasks, all_axes, strict=True):
            _percent_axis(axes)
            length_axis(axes, list(run.info.lengths_tokens))
            _lines(axes, {label: data[data["task"] == task]}, {label: style}, width=1.4)
            axes.set_title(short_lines(task, width=34), fontweight="bold")
    caption = (
        f"Accuracy of {label} by task, with 95 % intervals (Wilson for 0/1 scores, bootstrap for graded ones). Prompts "
        "without a score (out of memory, failed) are left out, never counted as wrong; n of each point is in the "
        "accuracy table."
    )
    return ReportFigure(name, title, caption, figure, data.reset_index(drop=True))


def _counts_text(data: pd.DataFrame) -> str:
    counts = sorted(set(data["n"]))
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]}-{counts[-1]}"


def accuracy_by_task(run: Run, cells: pd.DataFrame) -> ReportFigure | SkippedFigure:
    """Accuracy as a grid of methods by lengths, one panel a task, the number of prompts in every cell."""
    name, title = "accuracy_by_task", "Accuracy by task"
    data = cells[cells["task"] != ALL_TASKS].dropna(subset=["accuracy"])
    tasks = [task for task in run.info.tasks if task in set(data["task"])]
    if len(run.info.tasks) < 2:
        return SkippedFigure(name, title, "the run has one task; see accuracy by length")
    if not tasks:
        return SkippedFigure(name, title, "no prompt has been scored yet")
    labels = [method.label for method in run.info.methods]
    names = figure_names(labels)
    texts = [short_lines(names[label]) for label in labels]
    lengths = list(run.info.lengths_tokens)
    # Of one method the tasks are the rows of one panel.
    alone = labels[0] if len(labels) == 1 else None
    rows = tasks if alone else labels
    texts = [short_lines(task) for task in tasks] if alone else texts
    groups = [tasks] if alone else [[task] for task in tasks]
    with theme(name):
        figure, all_axes = panels(
            len(groups),
            columns=2,
            width_in=max(1.3, 0.52 * len(lengths)),
            height_in=max(0.4, 0.1 + 0.14 * max(1 + text.count("\n") for text in texts)) * len(rows),
            margins=Margins(left=0.25 + text_width_in(texts, fontsize=8.5), right=0.2, top=0.42, bottom=0.6),
            title=title,
            subtitle=f"{subtitle_of(run)}; accuracy in %, n prompts a cell; hatched: nothing scored",
            rowed=True,
        )
        for group, axes in zip(groups, all_axes, strict=True):
            filled = {
                (lengths.index(cell["length_tokens"]), rows.index(cell["task" if alone else "method_label"])): (
                    cell["accuracy"],
                    cell["n"],
                    accuracy_tip(cell["method_label"], f"{cell['task']}, {length_text(cell['length_tokens'])}", cell),
                )
                for cell in records(data[data["task"].isin(group)])
            }
            heat_panel(axes, filled, lengths=lengths, rows=len(rows))
            axes.yaxis.set_major_locator(FixedLocator([row + 0.5 for row in range(len(rows))]))
            axes.set_yticklabels(texts)
            axes.set_title(short_lines(alone or group[0], width=34), fontweight="bold")
    caption = "Accuracy (%) and number of scored prompts n of each task. Intervals are in the accuracy table."
    return ReportFigure(name, title, caption, figure, data.reset_index(drop=True))


def _lines(axes: Axes, tables: Mapping[str, pd.DataFrame], styles: Mapping[str, MethodStyle], *, width: float) -> None:
    """One line a method with its points and intervals, all at their own length."""
    paths = {
        label: [(float(row["length_tokens"]), 100 * row["accuracy"]) for row in records(rows)]
        for label, rows in tables.items()
    }
    draw_lines(axes, paths, styles, width=width)
    draw_markers(axes, paths, styles, tips={label: _tips(rows) for label, rows in tables.items()})
    for place, (label, rows) in enumerate(tables.items()):
        low, high = 100 * rows["ci_low"].to_numpy(float), 100 * rows["ci_high"].to_numpy(float)
        x = rows["length_tokens"].to_numpy(float)
        # Of bars on top of each other the earlier method's is the wider.
        bar = 1.1 + 1.4 * (len(tables) - 1 - place)
        axes.vlines(x, low, high, color=styles[label].color, linewidth=bar, alpha=0.55, zorder=1.9)


def _tips(rows: pd.DataFrame) -> list[str]:
    return [accuracy_tip(row["method_label"], length_text(row["length_tokens"]), row) for row in records(rows)]


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-4, 104)
    axes.yaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    axes.set_ylabel("accuracy (%)")


def heat_panel(
    axes: Axes, filled: dict[tuple[int, int], tuple[float, int, str]], *, lengths: list[int], rows: int
) -> None:
    """A grid of lengths by rows; `filled` maps (column, row) to (accuracy, n, its tip), all others are hatched.

    Cells that are too small for n have the accuracy alone.
    """
    colors = colormaps[HEAT]
    cell_in = axes.get_window_extent().width / axes.figure.dpi / len(lengths)
    counts = [f"n={n}" for _, n, _ in filled.values()]
    tall = axes.get_window_extent().height / axes.figure.dpi / rows >= 0.26
    counted = tall and text_width_in(counts, fontsize=6.5) * 0.85 <= cell_in
    axes.grid(visible=False)
    axes.set_xlim(0, len(lengths))
    axes.set_ylim(rows, 0)
    for column in range(len(lengths)):
        for row in range(rows):
            if (column, row) not in filled:
                axes.add_artist(
                    Rectangle((column, row), 1, 1, facecolor="white", edgecolor="#CCCCCC", hatch="////", lw=0)
                )
                continue
            accuracy, n, says = filled[column, row]
            color = colors(accuracy)
            cell = Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=0.8, gid=tip(says))
            axes.add_artist(cell)
            ink = "white" if 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 0.5 else "black"
            middle = column + 0.5
            written: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
            if counted:
                axes.text(middle, row + 0.36, f"{100 * accuracy:.0f}", fontsize=look().pt(8.5), **written)
                axes.text(middle, row + 0.76, f"n={n}", fontsize=look().pt(6.5), **written)
            else:
                axes.text(middle, row + 0.5, f"{100 * accuracy:.0f}", fontsize=look().pt(7), **written)
    texts = [length_text(length) for length in lengths]
    shown = apart([cell_in * (column + 0.5) for column in range(len(lengths))], texts)
    axes.xaxis.set_major_locator(FixedLocator([column + 0.5 for column in shown]))
    axes.set_xticklabels([texts[column] for column in shown])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("length (tokens)")
