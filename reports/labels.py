"""Labels of a figure that keep out of each other's way, and the room that they need."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from kvscope.reports.canvas import text_width_in
from kvscope.reports.look import look

Pixels = npt.NDArray[np.float64]
# Line height of end labels in font sizes, and how far they may stand above and below the axes (at 100 dpi).
END_LINE, END_SLACK_PX = 1.3, 14


def end_labels_height_in(texts: Sequence[str], *, fontsize: float = 8.5) -> float:
    """Least height of the axes beside which `end_labels` finds room for all of them, inches."""
    lines = sum(1 + text.count("\n") for text in texts)
    if look().keyed:
        return 0.0
    return lines * look().pt(fontsize) / 72 * END_LINE - 2 * END_SLACK_PX / 100


def names_margin_in(texts: Sequence[str]) -> float:
    """Room right of a panel for the names of its lines, inches."""
    return 0.2 if look().keyed else 0.4 + text_width_in(texts, fontsize=8.5)


def spread(wanted: Sequence[float], sizes: Sequence[float], *, low: float, high: float) -> list[float]:
    """Centres near `wanted` such that boxes of `sizes` neither overlap nor leave [low, high] (if they fit at all).

    Pools overlapping neighbours and centres each pool on the mean of what its members want.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    groups: list[tuple[list[int], float]] = []

    def centred(members: list[int], middle: float) -> float:
        half = sum(sizes[index] for index in members) / 2
        return min(max(middle, low + half), max(high - half, low + half))

    for index in order:
        members, centre = [index], centred([index], wanted[index])
        while groups:
            before, before_centre = groups[-1]
            reach = sum(sizes[i] for i in before) / 2 + sum(sizes[i] for i in members) / 2
            if centre - before_centre >= reach - 1e-9:
                break
            groups.pop()
            members = before + members
            centre = centred(members, float(np.mean([wanted[i] for i in members])))
        groups.append((members, centre))
    places = [0.0] * len(wanted)
    for members, centre in groups:
        edge = centre - sum(sizes[index] for index in members) / 2
        for index in members:
            places[index] = edge + sizes[index] / 2
            edge += sizes[index]
    return places


@dataclass(frozen=True)
class Label:
    """Text that names the point (x, y), in data coordinates."""

    text: str
    x: float
    y: float
    color: str


def end_labels(axes: Axes, labels: Sequence[Label], *, fontsize: float = 8.5, gap_px: float = 22) -> None:
    """Write labels in the margin right of the axes, each beside the end of its line, joined by a thin leader.

    Nothing where a key names the lines.
    """
    if look().keyed:
        return
    figure, fontsize = _figure(axes), look().pt(fontsize)
    box = axes.get_window_extent()
    points = [axes.transData.transform((label.x, label.y)) for label in labels]
    line_px = fontsize * figure.dpi / 72 * END_LINE
    sizes = [line_px * (1 + label.text.count("\n")) for label in labels]
    places = spread([float(point[1]) for point in points], sizes, low=box.y0 - END_SLACK_PX, high=box.y1 + END_SLACK_PX)
    to_figure = figure.transFigure.inverted()
    for label, point, place in zip(labels, points, places, strict=True):
        x, y = to_figure.transform((box.x1 + gap_px, place))
        figure.text(
            x,
            y,
            label.text,
            va="center",
            ha="left",
            fontsize=fontsize,
            color=label.color,
            fontweight="bold",
            linespacing=1.05,
        )
        start = (point[0] + 6, point[1])
        bend = (max(box.x1 + 4, start[0]), point[1])
        leader = to_figure.transform([start, bend, (box.x1 + gap_px - 4, place)])
        figure.add_artist(
            Line2D(leader[:, 0], leader[:, 1], color=label.color, linewidth=0.6, alpha=0.6, linestyle=(0, (2, 2)))
        )


def free_labels(
    axes: Axes,
    labels: Sequence[Label],
    *,
    fontsize: float = 7.5,
    lines: Sequence[Sequence[tuple[float, float]]] = (),
    others: Sequence[tuple[float, float]] = (),
) -> None:
    """Write each label near its own point inside the axes, clear of points, of each other and, if it can, of `lines`.

    Tries places on growing rings and takes the first free one; the most crowded point chooses first. Nothing where a
    key names the points. `others` are points without a label, in data coordinates: labels keep clear of them, too.
    """
    if look().keyed:
        return
    figure, fontsize = _figure(axes), look().pt(fontsize)
    inside = axes.get_window_extent()
    points = np.array([axes.transData.transform((label.x, label.y)) for label in labels]).reshape(-1, 2)
    marks = np.array([*points, *(axes.transData.transform(point) for point in others)]).reshape(-1, 2)
    dots = np.concatenate([marks - 7, marks + 7], axis=1)
    strokes = np.concatenate([np.zeros((0, 4)), *(_stroke_boxes(axes, line) for line in lines)])
    least_place, most_place = np.array(inside.min) + 2, np.array(inside.max) - 1
    crowd = [-int((np.hypot(*(points - point).T) < 60).sum()) for point in points]
    taken = np.zeros((0, 4))
    for index in sorted(range(len(labels)), key=lambda i: (crowd[i], i)):
        label = labels[index]
        text = axes.text(0, 0, label.text, fontsize=fontsize, color=label.color, fontweight="bold", linespacing=1.0)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        extent = text.get_window_extent()
        size = np.array([extent.width + 10, extent.height + 3])
        away = marks[np.hypot(*(marks - points[index]).T) > 10]
        best: tuple[float, Pixels] | None = None
        for gap, spots in _rings(points[index], size):
            if best is not None and gap >= best[0]:
                break  # a place costs its gap at least, and rings grow
            low, high = spots[:, :2], spots[:, 2:]
            spots = spots[(low >= least_place).all(1) & (high <= most_place).all(1)]
            if not len(spots):
                continue
            cost = gap + 400 * _overlap(spots, taken) + 200 * _overlap(spots, dots) + 25 * _overlap(spots, strokes)
            # A label as near to another point as to its own would be read as that point's name.
            own = _distance(spots, points[index : index + 1])
            cost += 60 * (_distance(spots, away) < own + 6).any(1)
            least = int(cost.argmin())
            if best is None or cost[least] < best[0]:
                best = (float(cost[least]), spots[least])
        if best is None:
            text.remove()
            continue
        spot = best[1]
        taken = np.concatenate([taken, spot[None]])
        text.set_transform(figure.transFigure)
        x, y = figure.transFigure.inverted().transform((spot[:2] + spot[2:]) / 2)
        text.set_position((float(x), float(y)))
        text.set_horizontalalignment("center")
        text.set_verticalalignment("center")
        _leader(figure, points[index], spot, label.color)


def _figure(axes: Axes) -> Figure:
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


_WAYS = np.array([(math.cos(2 * math.pi * step / 24), math.sin(2 * math.pi * step / 24)) for step in range(24)])


def _rings(point: Pixels, size: Pixels) -> Iterator[tuple[float, Pixels]]:
    """Places [x0, y0, x1, y1] for a label, ring by ring, and how far their edges are from the point."""
    for gap in (9.0, 14.0, 20.0, 28.0, 38.0, 50.0, 64.0, 80.0, 100.0):
        centres = point + _WAYS * (gap + size / 2)
        yield gap, np.concatenate([centres - size / 2, centres + size / 2], 1)


def _overlap(boxes: Pixels, others: Pixels) -> Pixels:
    """Summed overlap of [x0, y0, x1, y1] boxes as a share of each; every touched one weighs at least a fifth."""
    shared = np.minimum(boxes[:, None, 2:], others[:, 2:]) - np.maximum(boxes[:, None, :2], others[:, :2])
    touched = (shared > 0).all(2)
    areas = np.where(touched, shared.prod(2), 0).sum(1)
    return np.asarray(0.2 * touched.sum(1) + areas / (boxes[:, 2:] - boxes[:, :2]).prod(1), dtype=np.float64)


def _distance(boxes: Pixels, points: Pixels) -> Pixels:
    """From each box to each point; nil inside."""
    away = np.maximum(np.maximum(boxes[:, None, :2] - points, points - boxes[:, None, 2:]), 0)
    return np.asarray(np.hypot(away[..., 0], away[..., 1]), dtype=np.float64)


def _stroke_boxes(axes: Axes, line: Sequence[tuple[float, float]]) -> Pixels:
    """The drawn line as a chain of small boxes."""
    boxes = [np.zeros((0, 4))]
    if len(line) > 1:
        for start, end in itertools.pairwise(axes.transData.transform(np.array(line))):
            along = np.linspace(0, 1, max(2, int(np.hypot(*(end - start)) / 8)))[:, None]
            middle = start + along * (end - start)
            boxes.append(np.concatenate([middle - 2, middle + 2], axis=1))
    return np.concatenate(boxes)


def _leader(figure: Figure, point: Pixels, spot: Pixels, color: str) -> None:
    """A hair line from the point to the nearest edge of a label that had to move away."""
    near = np.minimum(np.maximum(point, spot[:2]), spot[2:])
    distance = float(np.hypot(*(near - point)))
    if distance < 14:
        return
    start = point + (near - point) * (6 / distance)
    (x0, y0), (x1, y1) = figure.transFigure.inverted().transform([start, near])
    figure.add_artist(Line2D([x0, x1], [y0, y1], color=color, linewidth=0.6, alpha=0.7))
