"""Figures laid out in inches.

Sizes are fixed, never fitted by a layout engine: the place of every label is then known before it is drawn, and the
same rows give the same picture.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvscope.errors import UsageError
from kvscope.reports.look import look
from kvscope.reports.theme import FAINT
from kvscope.results.plain_text import shortened

TITLE_IN, LINE_IN = 0.34, 0.19
_MOST_WORDS = 1_200
# A panel of a figure whose width is asked for: below the first fewer stand side by side, below the second is none.
_LEAST_PANEL_IN, _NARROWEST_PANEL_IN = 1.3, 0.6


@dataclass(frozen=True)
class Margins:
    """Space around each panel, inches. `right` is where end labels go."""

    left: float = 0.8
    right: float = 0.2
    top: float = 0.35
    bottom: float = 0.6


def panels(
    count: int,
    *,
    columns: int,
    width_in: float,
    height_in: float,
    margins: Margins,
    title: str,
    subtitle: str = "",
    note: str = "",
    key: Sequence[Line2D] = (),
    rowed: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` equal panels, a title with subtitle above, and an optional key and note below.

    Everything outside the panels has its own band, so nothing can cover data. Where the look asks for a width, panels
    become narrower, and fewer stand side by side; `rowed` ones keep their height.

    Raises:
        UsageError: that width leaves no room beside the names of methods.
    """
    worn = look()
    sizes = worn.pt
    columns = min(columns, count)
    if worn.width_in is not None:
        columns, width_in = _within(worn.width_in, columns, width_in, margins)
        height_in = height_in if rowed else min(height_in, max(_LEAST_PANEL_IN, 0.75 * width_in))
    rows = math.ceil(count / columns)
    cell_w, cell_h = width_in + margins.left + margins.right, height_in + margins.top + margins.bottom
    total_w = worn.width_in or max(columns * cell_w, 5.6)
    head_texts = (title, subtitle) if worn.titled else ("", "")
    heading = _wrapped(head_texts[0], total_w, most=90, fontsize=12, bold=True)
    under = _wrapped(head_texts[1], total_w, most=_MOST_WORDS, fontsize=9)
    notes = _wrapped("" if worn.style == "paper" else note, total_w, most=_MOST_WORDS, fontsize=8)
    title_in = TITLE_IN + 0.22 * (len(heading) - 1) if heading else 0.08
    key_columns, key_lines = _key_layout(key, total_w)
    key_in = (0.11 + LINE_IN * sizes(9) / 9 * key_lines) if key else 0.0
    head = title_in + LINE_IN * len(under) + key_in + (0.08 if worn.titled else 0.0)
    foot = LINE_IN * len(notes) + (0.12 if notes else 0.0)
    total_h = head + rows * cell_h + foot
    figure = Figure(figsize=(total_w, total_h))
    FigureCanvasAgg(figure)
    left = 0.12 / total_w
    figure.text(left, 1 - 0.1 / total_h, "\n".join(heading), fontsize=sizes(12), fontweight="bold", va="top")
    below: dict[str, Any] = {"color": FAINT, "va": "top", "linespacing": 1.25}
    figure.text(left, 1 - title_in / total_h, "\n".join(under), fontsize=sizes(9), **below)
    if key:
        figure.legend(
            handles=list(key),
            loc="upper left",
            bbox_to_anchor=(0.06 / total_w, 1 - (title_in + LINE_IN * len(under)) / total_h),
            ncols=key_columns,
            frameon=False,
            fontsize=sizes(8.5),
            handletextpad=0.5,
            columnspacing=1.6,
            borderaxespad=0.2,
        )
    if notes:
        figure.text(left, 0.08 / total_h, "\n".join(notes), fontsize=sizes(8), color=FAINT, va="bottom")
    axes = []
    for index in range(count):
        row, column = divmod(index, columns)
        start = column * cell_w + margins.left
        bottom = total_h - head - (row + 1) * cell_h + margins.bottom
        axes.append(figure.add_axes((start / total_w, bottom / total_h, width_in / total_w, height_in / total_h)))
    return figure, axes


def _within(total_w: float, columns: int, width_in: float, margins: Margins) -> tuple[int, float]:
    """Return (panels side by side, width of each) that fill a width."""
    for n in range(columns, 0, -1):
        room = total_w / n - margins.left - margins.right
        if n == 1 or room >= min(width_in, _LEAST_PANEL_IN):
            break
    if room < _NARROWEST_PANEL_IN:
        raise UsageError(
            f"--width: {total_w:.2g} inches leave no room beside the names of methods or tasks: take more, or give "
            "shorter names with --label."
        )
    return n, room


def _wrapped(text: str, total_w: float, *, most: int, fontsize: float, bold: bool = False) -> list[str]:
    """Return a text of `most` characters at most as lines that a figure holds."""
    a_char_in = look().pt(fontsize) * (0.62 if bold else 0.57) / 72
    room = max(12, int((total_w - 0.2) / a_char_in))
    return textwrap.wrap(shortened(text, most=most), room, break_on_hyphens=False)


def _key_layout(key: Sequence[Line2D], total_w: float) -> tuple[int, int]:
    """Return (columns of a key, lines of its longest column); labels that are too long are broken in place."""
    if not key:
        return 0, 0
    for entry in key:
        entry.set_label("\n".join(_wrapped(str(entry.get_label()), total_w - 0.5, most=_MOST_WORDS, fontsize=8.5)))
    sizes = [text_width_in([str(entry.get_label())], fontsize=8.5) + 0.65 for entry in key]
    columns = len(key) if sum(sizes) < total_w else max(1, int(total_w / max(sizes)))
    lines = [1 + str(entry.get_label()).count("\n") for entry in key]
    return columns, max(sum(map(int, column)) for column in np.array_split(lines, columns))


def text_width_in(texts: Sequence[str], *, fontsize: float) -> float:
    """Generous width of the longest line in bold DejaVu Sans, inches."""
    longest = max((len(line) for text in texts for line in text.split("\n")), default=0)
    return longest * look().pt(fontsize) * 0.68 / 72


def title_band_in(titles: Sequence[str]) -> float:
    """Room above a panel for its title, inches."""
    return 0.27 + 0.16 * max(1 + title.count("\n") for title in titles)
