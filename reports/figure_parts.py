"""What the figures share: the result type, axes in K tokens and bytes, and a method's points."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from kvscope.reports.canvas import text_width_in
from kvscope.reports.hover import tip
from kvscope.reports.look import look
from kvscope.reports.theme import FAINT, TEXT, MethodStyle
from kvscope.reports.units import bytes_text, length_text, with_interval

Line = Literal["-", "--", ":", "-.", "None"]
NESTED = (
    "Every point stands at its own length and value: of points that coincide the larger marker lies below the smaller, "
    "and lines that coincide take turns, dash by dash."
)


@dataclass(frozen=True)
class ReportFigure:
    """One figure with the rows behind it."""

    name: str
    """File name without ending."""
    title: str
    caption: str
    """What it shows, where the numbers come from, and what is missing."""
    figure: Figure
    data: pd.DataFrame


@dataclass(frozen=True)
class SkippedFigure:
    """A figure that could not be drawn, and why."""

    name: str
    title: str
    reason: str


def length_axis(axes: Axes, lengths: Sequence[int], *, pad: float = 0.45) -> None:
    """A log2 axis with one tick per length; labels are thinned until they fit."""
    axes.set_xscale("log", base=2)
    low, high = min(lengths), max(lengths)
    axes.set_xlim(low / 2**pad, high * 2**pad)
    figure = axes.figure
    ordered = sorted(lengths)
    places_in = [float(axes.transData.transform((length, 1))[0]) / figure.dpi for length in ordered]
    shown = [ordered[i] for i in apart(places_in, [length_text(length) for length in ordered])]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(lambda value, _: length_text(round(value)))
    axes.xaxis.set_minor_locator(FixedLocator(ordered))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("length (tokens)")


def beside(axes: Axes, text: str) -> str:
    """Return the name of a vertical axis, broken where the axis is too short for it."""
    height_in = axes.get_window_extent().height / axes.figure.dpi
    return "\n".join(textwrap.wrap(text, max(8, int(height_in / (look().pt(9) * 0.56 / 72)))))


def apart(places_in: Sequence[float], texts: Sequence[str], *, fontsize: float = 8.5) -> list[int]:
    """Return which labels along an axis leave each other room, from the last one on.

    Args:
        places_in: their centres, ascending, inches.
        texts: what stands there.
    """
    half_in = [text_width_in([text], fontsize=fontsize) / 2 for text in texts]

    def clear(left: int, right: int) -> bool:
        return places_in[right] - places_in[left] >= half_in[left] + half_in[right] + 0.05

    last = len(texts) - 1
    gaps = np.diff(places_in)
    if len(gaps) and gaps.max() < 1.5 * gaps.min():  # every second, third ... one, for a reader counts on
        for stride in range(1, len(texts) + 1):
            even = list(range(last, -1, -stride))[::-1]
            if all(clear(left, right) for left, right in itertools.pairwise(even)):
                return even
    shown = [last]
    for place in range(last - 1, -1, -1):
        if clear(place, shown[-1]):
            shown.append(place)
    return shown[::-1]


def byte_ticks(low_bytes: float, high_bytes: float, *, most: int = 7) -> list[float]:
    """Powers of two within the range, at most `most` of them, evenly strided."""
    first, last = math.floor(math.log2(low_bytes)), math.ceil(math.log2(high_bytes))
    stride = math.ceil((last - first + 1) / most)
    ticks = [2.0**power for power in range(first, last + 1, stride)]
    return [tick for tick in ticks if low_bytes <= tick <= high_bytes]


def byte_axis(axes: Axes, low_bytes: float, high_bytes: float, *, which: str, most: int = 7) -> None:
    """A log axis in bytes with ticks at powers of two written as KiB, MiB or GiB."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    if which == "y":
        axes.set_yscale("log", base=2)
        axes.set_ylim(low_bytes, high_bytes)
    else:
        axes.set_xscale("log", base=2)
        axes.set_xlim(low_bytes, high_bytes)
    axis.set_major_locator(FixedLocator(byte_ticks(low_bytes, high_bytes, most=most)))
    axis.set_major_formatter(lambda value, _: bytes_text(value))
    axis.set_minor_locator(NullLocator())


def key_entry(text: str, *, marker: str = "None", line: Line = "None", color: str = FAINT) -> Line2D:
    """A handle for the key above the panels."""
    return Line2D(
        [],
        [],
        color=color,
        marker=marker,
        linestyle=line,
        markersize=6,
        # matplotlib leaves labels that begin with an underscore out of keys.
        label=f" {text}" if text.startswith("_") else text,
        mec=TEXT,
        mew=0.4,
    )


def hollow_entry(text: str) -> Line2D:
    """A handle for the key: an outline."""
    entry = key_entry(text, marker="o")
    entry.set(markerfacecolor="white", markeredgecolor=FAINT, markeredgewidth=1.2)
    return entry


def names_key(styles: Mapping[str, MethodStyle], labels: Sequence[str], *, lines: bool = True) -> list[Line2D]:
    """Entries of a key that name methods, where they are not named beside their lines."""
    if not look().keyed:
        return []
    found: dict[str, Line2D] = {}
    for label in labels:
        style = styles[label]
        text = style.text.replace("\n", "")
        entry = key_entry(text, marker=style.marker, line=style.dash if lines else "None", color=style.color)
        found.setdefault(text, entry)
    return list(found.values())


def accuracy_tip(who: str, where: str, cell: Mapping[str, Any]) -> str:
    """Return what a point of accuracy says: value, interval and n."""
    name = look().names.get(who, who)
    value = with_interval(cell["accuracy"], cell["ci_low"], cell["ci_high"])
    return f"{name}, {where}: {value} %, n = {cell['n']}"


def points(axes: Axes, x: list[float], y: list[float], style: MethodStyle, *, says: str | None = None) -> None:
    """Draw a method's points in its own style; `says` is what they say under the pointer."""
    axes.plot(
        x,
        y,
        color=style.color,
        marker=style.marker,
        markersize=style.size,
        linestyle="None",
        markeredgecolor="white",
        markeredgewidth=0.7,
        zorder=3,
        gid=None if says is None else tip(says),
    )
