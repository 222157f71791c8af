"""Accuracy against the share of dense's bytes, held and read, of every method that was asked for shares."""

import itertools
import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from kvscope.reports.canvas import Margins, panels
from kvscope.reports.cells import pool_notes
from kvscope.reports.figure_parts import ReportFigure, SkippedFigure, accuracy_tip, key_entry
from kvscope.reports.labels import Label, free_labels
from kvscope.reports.overlap import draw_lines, draw_markers
from kvscope.reports.shares import asks_for_shares, share_cells, without_share
from kvscope.reports.subtitle import subtitle_of
from kvscope.reports.theme import FAINT, MethodStyle, method_styles, theme
from kvscope.reports.units import length_text, percent
from kvscope.results.frames import Run, records

SIDES = {"held_of_dense": ("held", "KV cache on the device, % of dense's"),
         "read_of_dense": ("read", "KV cache read a decode step, % of dense's")}  # fmt: skip
"""Column -> its word, and the name of its axis."""
TICKS = (1, 2, 5, 10, 20, 50, 100, 200)
MOST_LENGTHS = 4
_WITHOUT_DENSE = "dense was not measured beside the methods, and reads are shown as a share of its"
_FULL, _LEFT_OUT = "equal_bytes", "no method with a share of dense's bytes was scored yet"


def equal_bytes_figures(run: Run, cells: pd.DataFrame) -> list[ReportFigure | SkippedFigure]:
    """A row of panels for bytes held and one for bytes read, a column a length; none where no share was asked for.

    `cells` comes from `accuracy_cells(run)`.
    """
    if not asks_for_shares(run):
        return []
    title = "Accuracy at equal bytes"
    scored = share_cells(run, cells).dropna(subset=["accuracy", "held_of_dense"])
    data = scored.dropna(subset=["read_of_dense"]).reset_index(drop=True)
    if not len(data):
        return [SkippedFigure(_FULL, title, _WITHOUT_DENSE if len(scored) else _LEFT_OUT)]
    for column, (word, _) in SIDES.items():
        data[f"pareto_{word}"] = False
        for _, rows in data.groupby("length_tokens"):
            data.loc[rows.index, f"pareto_{word}"] = _front(rows, column)
    lengths = sorted(set(data["length_tokens"]))[-MOST_LENGTHS:]
    settings = dict.fromkeys(without_share(method.label)[0] for method in run.info.methods)
    styles = method_styles([each for each in settings if each in set(data["setting"])])
    swept = {each for each in styles if data.loc[data["setting"] == each, "asked_share"].nunique() > 1}
    key = [
        key_entry(each, marker=style.marker, color=style.color, line=style.dash if each in swept else "None")
        for each, style in styles.items()
    ]
    key.append(key_entry("Pareto front", line="-"))
    caption = (
        "Accuracy (pooled over tasks) against bytes, as a share of dense's for the same prompts, metadata included; "
        "bars are 95 % intervals. Nothing that has fewer bytes is more accurate than what is on the Pareto front, and "
        "a method has its name at the first of its points there. Of points that coincide the larger marker lies below "
        "the smaller. Above, bytes on the device; below, bytes one decode step reads. A line joins the shares that one "
        "method was asked for. Methods that hold everything were asked for a share of the reads."
    )
    with theme(_FULL):
        figure, all_axes = panels(
            len(SIDES) * len(lengths),
            columns=len(lengths),
            width_in=4.1,
            height_in=3.0,
            margins=Margins(left=0.7, right=0.2, top=0.42, bottom=0.62),
            title=title,
            subtitle=f"{subtitle_of(run)}; up and left is better; bars: 95 % intervals",
            note="Bytes are the ledger's, of dense's for the same prompts, mean over decode steps.",
            key=key,
        )
        places = itertools.product(SIDES.items(), lengths)
        for axes, ((column, (word, axis)), length) in zip(all_axes, places, strict=True):
            rows = data[data["length_tokens"] == length]
            _share_axis(axes, data[column], axis)
            _panel(axes, rows, column, f"pareto_{word}", styles)
            axes.set_title(f"{length_text(length)} tokens, bytes {word}", fontweight="bold")
    return [ReportFigure(_FULL, title, " ".join([caption, *pool_notes(run.info)]), figure, data)]


def _front(rows: pd.DataFrame, column: str) -> "pd.Series[bool]":
    """Whether no other row has fewer bytes (or as few) and is more accurate (or as accurate)."""
    ordered = rows.sort_values([column, "accuracy"], ascending=[True, False])
    best_before = ordered["accuracy"].cummax().shift(fill_value=-math.inf)
    front: pd.Series[bool] = (ordered["accuracy"] > best_before).reindex(rows.index)
    return front


def _share_axis(axes: Axes, shares: "pd.Series[float]", name: str) -> None:
    axes.set_xscale("log")
    axes.set_xlim(100 * shares.min() / 1.25, 100 * shares.max() * 1.25)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if _inside(axes, tick)]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(name)
    axes.set_ylim(-6, 108)
    axes.yaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    axes.set_ylabel("accuracy (%)")


def _inside(axes: Axes, tick: float) -> bool:
    low, high = axes.get_xlim()
    return bool(low <= tick <= high)


def _panel(axes: Axes, rows: pd.DataFrame, column: str, front: str, styles: dict[str, MethodStyle]) -> None:
    steps: list[tuple[float, float]] = []
    for row in records(rows[rows[front]].sort_values(column)):
        x, y = 100 * row[column], 100 * row["accuracy"]
        steps += [(x, steps[-1][1]), (x, y)] if steps else [(x, y)]
    if steps:
        axes.plot(*zip(*steps, strict=True), color=FAINT, linewidth=1.2, zorder=1)
    paths: dict[str, list[tuple[float, float]]] = {}
    lines: dict[str, list[tuple[float, float]]] = {}
    tips: dict[str, list[str]] = {}
    named: dict[str, Label] = {}
    for setting, style in styles.items():
        mine = records(rows[rows["setting"] == setting].sort_values(["asked_share", column]))
        paths[setting] = [(100 * row[column], 100 * row["accuracy"]) for row in mine]
        swept = [at for at, row in zip(paths[setting], mine, strict=True) if row["asked_share"] is not None]
        lines |= {setting: swept} if len(swept) > 1 else {}
        tips[setting] = [_tip(row, x) for row, (x, _) in zip(mine, paths[setting], strict=True)]
        for row, (x, y) in zip(mine, paths[setting], strict=True):
            if row[front]:
                named.setdefault(setting, Label(style.text, x, y, style.color))
            if row["ci_low"] is not None:
                bar = [100 * row["ci_low"], 100 * row["ci_high"]]
                axes.plot([x, x], bar, color=style.color, linewidth=1, alpha=0.3)
    draw_lines(axes, lines, styles, width=1.1)
    draw_markers(axes, paths, styles, tips=tips)
    others = list(itertools.chain.from_iterable(paths.values()))
    free_labels(axes, list(named.values()), lines=[steps, *lines.values()], others=others)


def _tip(row: dict[str, Any], x_percent: float) -> str:
    return accuracy_tip(row["method_label"], f"{length_text(row['length_tokens'])}, {percent(x_percent / 100)} %", row)
