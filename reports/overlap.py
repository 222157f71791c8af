"""Points and lines of several methods that coincide: all stay at their own place, and each stays visible.

Nothing is ever moved aside, because a reader takes the order of points for the order of values. Of points on top of
each other the first method's marker is the largest and lies below; lines along the same path are dashed in turns.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from kvscope.reports.hover import tip
from kvscope.reports.theme import MethodStyle

Path = Sequence[tuple[float, float]]
Dashes = tuple[float, tuple[float, float]]

_NEAR_PX = 5.0
"""Markers whose centres are this near hide each other."""
_SAME_PX = 1.0
_RING_PT = 4.0
"""How much larger a marker is than the one on top of it."""
_MOST_RINGS = 6
_DASH = 4.0


def draw_markers(
    axes: Axes,
    paths: Mapping[str, Path],
    styles: Mapping[str, MethodStyle],
    *,
    hollow: Sequence[tuple[str, int]] = (),
    tips: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Draw every method's points; of points on top of each other the earlier method's is the larger and lies below.

    Axes must have their final limits: nearness is judged in pixels.

    Args:
        hollow: (label, place in its path) of points that are drawn as outlines.
        tips: what each point says where the pointer is on it.
    """
    spots = [(label, i, *point) for label, path in paths.items() for i, point in enumerate(path)]
    above = _points_above(axes, [(x, y) for _, _, x, y in spots])
    for (label, i, x, y), rings in zip(spots, above, strict=True):
        style = styles[label]
        empty = (label, i) in hollow
        axes.plot(
            [x],
            [y],
            color=style.color,
            marker=style.marker,
            markersize=style.size + _RING_PT * min(rings, _MOST_RINGS),
            linestyle="None",
            markerfacecolor="white" if empty else style.color,
            markeredgecolor=style.color if empty else "white",
            markeredgewidth=1.2 if empty else 0.7,
            clip_on=False,
            zorder=3 - 0.01 * rings,
            gid=None if tips is None else tip(tips[label][i]),
        )


def draw_lines(
    axes: Axes, paths: Mapping[str, Path], styles: Mapping[str, MethodStyle], *, width: float, alpha: float = 1.0
) -> list[Line2D]:
    """Draw every method's line in its own dash; lines along the same path take turns instead, dash by dash."""
    turns = _turns(axes, paths)
    drawn = []
    for label, path in paths.items():
        style = styles[label]
        xs, ys = [x for x, _ in path], [y for _, y in path]
        drawn += axes.plot(
            xs, ys, color=style.color, linestyle=turns.get(label, style.dash), linewidth=width, alpha=alpha, zorder=2
        )
    return drawn


def draw_crosses(axes: Axes, paths: Mapping[str, Path], styles: Mapping[str, MethodStyle]) -> None:
    """Draw a cross a point; of crosses on top of each other the earlier method's is the larger."""
    spots = [(label, point) for label, path in paths.items() for point in path]
    for (label, (x, y)), rings in zip(spots, _points_above(axes, [point for _, point in spots]), strict=True):
        size = 7.0 + _RING_PT * min(rings, _MOST_RINGS)
        axes.plot(x, y, marker="x", color=styles[label].color, mew=2, markersize=size, clip_on=False, zorder=4)


def _points_above(axes: Axes, points: Path) -> list[int]:
    """For each point, how many later ones lie on top of it."""
    if not points:
        return []
    pixels = axes.transData.transform(np.array(points, dtype=float))
    counts = []
    for i, pixel in enumerate(pixels):
        away = np.hypot(*(pixels[i + 1 :] - pixel).T)
        counts.append(int((away < _NEAR_PX).sum()))
    return counts


def _turns(axes: Axes, paths: Mapping[str, Path]) -> dict[str, Dashes]:
    """Label -> dashes that leave room for those of the lines along the same path; lines that are alone are left out."""
    pixels = {label: axes.transData.transform(np.array(path, dtype=float)) for label, path in paths.items() if path}
    groups: list[list[str]] = []
    for label, path in pixels.items():
        for group in groups:
            head = pixels[group[0]]
            if head.shape == path.shape and np.abs(head - path).max() < _SAME_PX:
                group.append(label)
                break
        else:
            groups.append([label])
    return {
        label: (-_DASH * place, (_DASH, _DASH * (len(group) - 1)))
        for group in groups
        if len(group) > 1
        for place, label in enumerate(group)
    }
