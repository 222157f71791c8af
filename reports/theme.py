"""One look for all figures: colour-blind safe colours, a marker a method, fonts and sizes in points.

Colours are Okabe and Ito's (2008) without their yellow, which is too faint on white, plus Tol's olive and wine for the
eighth and ninth method; grey is left to what stands behind methods. No figure relies on colour alone: each method has a
marker of its own and a written label.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl

from kvscope.reports.look import look
from kvscope.reports.subtitle import shared_options
from kvscope.results.plain_text import shortened

DENSE_COLOR = "#000000"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999933", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*", "<", ">", "h")
Dash = Literal["-", "--", ":", "-."]
#: In turns: without colour, lines are told apart by their dashes and markers.
DASHES: tuple[Dash, ...] = ("--", "-.", ":", "-")
GRID, FAINT, TEXT = "#DDDDDD", "#666666", "#222222"
PNG_DPI, PRINT_DPI = 160, 300
_MOST_LABEL_CHARS = 160
_MOST_LINE_CHARS = 48


@dataclass(frozen=True)
class MethodStyle:
    """How one method looks in every figure of a run."""

    color: str
    marker: str
    dash: Dash
    text: str
    """The label, broken into short lines."""

    @property
    def size(self) -> float:
        """Marker size in points; open shapes look smaller at the same size."""
        return 8.5 if self.marker in "*PX" else 6.5


def figure_names(labels: Sequence[str]) -> dict[str, str]:
    """Label -> what figures call the method: options that tell no method of its name apart are left out.

    The line under a figure's title says them once (see ``subtitle_of``).
    """
    shared = shared_options(labels)
    names = {}
    for label in labels:
        if label in look().names:
            names[label] = look().names[label]
            continue
        name, _, text = label.partition(":")
        own = [part for part in text.split(",") if part not in shared.get(name, [])]
        names[label] = f"{name}:{','.join(own)}" if text and own else name
    return names


def method_styles(labels: Sequence[str]) -> dict[str, MethodStyle]:
    """A style per method label, by its place in the run; `dense` is always black with a circle."""
    styles = {}
    names = figure_names(labels)
    others = [label for label in labels if label != "dense"]
    for label in labels:
        if label == "dense":
            styles[label] = MethodStyle(DENSE_COLOR, MARKERS[0], "-", short_lines(names[label]))
            continue
        place = others.index(label)
        marker = MARKERS[1 + place % (len(MARKERS) - 1)]
        # The second round of colours has other dashes than the first.
        dash = DASHES[(place + place // len(COLORS)) % len(DASHES)]
        styles[label] = MethodStyle(COLORS[place % len(COLORS)], marker, dash, short_lines(names[label]))
    return styles


def short_lines(label: str, *, width: int = 20) -> str:
    """Break `name:key=value,key=value` after the colon and commas so that no line exceeds `width` where avoidable."""
    if len(label) <= width:
        return label
    label = shortened(label, most=_MOST_LABEL_CHARS)
    name, colon, options = label.partition(":")
    lines = [name + colon]
    for part in options.split(",") if options else []:
        if len(lines) > 1 and len(lines[-1]) + len(part) + 1 <= width:
            lines[-1] += f",{part}"
        else:
            if len(lines) > 1:
                lines[-1] += ","
            lines.append(part)
    return "\n".join(shortened(line, most=max(width, _MOST_LINE_CHARS)) for line in lines)


@contextmanager
def theme(name: str) -> Iterator[None]:
    """matplotlib settings for one figure; `name` seeds the SVG ids, so that figures can share one HTML page."""
    pt = look().pt
    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": pt(9),
        "axes.titlesize": pt(9.5),
        "axes.titlelocation": "left",
        # Where it stands by default. Said, matplotlib does not measure all ticks anew to see whether one is in its way.
        "axes.titley": 1.0,
        "axes.labelsize": pt(9),
        "axes.edgecolor": FAINT,
        "axes.labelcolor": TEXT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": TEXT,
        "ytick.labelcolor": TEXT,
        "xtick.labelsize": pt(8.5),
        "ytick.labelsize": pt(8.5),
        "text.color": TEXT,
        "figure.dpi": 100,
        # Text stays text: it can be found, copied and edited, and TrueType is what publishers take.
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
        # A dollar sign in a name is a dollar sign, no formula.
        "text.parse_math": False,
        "svg.hashsalt": f"kvscope-{name}",
    }
    with mpl.rc_context(settings):
        yield
