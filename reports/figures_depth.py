"""The needle heatmap: accuracy by depth of the evidence and length, by method and by task."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.ticker import FixedLocator

from kvscope.reports.canvas import Margins, panels, text_width_in, title_band_in
from kvscope.reports.depth import (
    ALL_DEPTHS,
    NIAH_POOL,
    Scope,
    depth_baseline,
    depth_cells,
    depth_scopes,
    depthless_note,
)
from kvscope.reports.figure_parts import ReportFigure, SkippedFigure, accuracy_tip
from kvscope.reports.figures_accuracy import heat_panel
from kvscope.reports.look import look
from kvscope.reports.subtitle import subtitle_of
from kvscope.reports.theme import figure_names, short_lines, theme
from kvscope.reports.units import length_text
from kvscope.results.frames import Run, records

_CELL_W_IN, _CELL_H_IN, _NARROW_H_IN = 0.54, 0.36, 0.2
_WIDEST_IN = 16.5
_NO_DEPTH = "no scored prompt has evidence at one known depth"


def needle_heatmap(run: Run) -> ReportFigure | SkippedFigure:
    """Accuracy by evidence depth and length, one panel a method: the needle tasks pooled, or else the first task."""
    name, title = "needle_heatmap", "Accuracy by depth of the evidence and length"
    scopes = depth_scopes(run)
    if not scopes:
        return SkippedFigure(name, title, _NO_DEPTH)
    scope = scopes[0]
    data = depth_cells(run, [scope])
    labels = [method.label for method in run.info.methods if method.label in set(data["method_label"])]
    names = figure_names([method.label for method in run.info.methods])
    shown = [(names[label], scope, data[data["method_label"] == label]) for label in labels]
    return _heatmaps(run, name, title, shown, about=", ".join(scope.tasks), data=data)


def depth_by_task(run: Run) -> ReportFigure | SkippedFigure:
    """Dense accuracy by evidence depth and length, one panel a task, the needle tasks pooled first."""
    name, title = "depth_by_task", "Accuracy by depth and length, by task"
    scopes, label = depth_scopes(run), depth_baseline(run)
    if not scopes or label is None:
        return SkippedFigure(name, title, _NO_DEPTH)
    if len(scopes) == 1:
        return SkippedFigure(name, title, "the run has one task with depths; see the heatmap by method")
    data = depth_cells(run, scopes, label=label)
    method = figure_names([method.label for method in run.info.methods])[label]
    shown = [
        (scope.name, scope, data[data["task"] == scope.name]) for scope in scopes if scope.name in set(data["task"])
    ]
    return _heatmaps(
        run,
        name,
        f"{title}: {label}",
        shown,
        about=f"{method} by task",
        data=data,
    )


def _heatmaps(
    run: Run, name: str, title: str, shown: Sequence[tuple[str, Scope, pd.DataFrame]], *, about: str, data: pd.DataFrame
) -> ReportFigure:
    lengths = list(run.info.lengths_tokens)
    bins = max(scope.bins for _, scope, _ in shown)
    ticks = {scope.bins: [f"{100 * i / scope.bins:.0f} %" for i in range(scope.bins + 1)] for _, scope, _ in shown}
    width = max(1.5, _CELL_W_IN * len(lengths))
    titles = [short_lines(text, width=int(11 * width)) for text, _, _ in shown]
    left = 0.45 + text_width_in(["100 %"], fontsize=8.5)
    margins = Margins(left=left, right=0.2, top=title_band_in(titles), bottom=0.6)
    most = 2 if len(shown) in (2, 4) else 3
    columns = max(1, min(most, int(_WIDEST_IN / (width + margins.left + margins.right))))
    with theme(name):
        figure, all_axes = panels(
            len(shown),
            columns=columns,
            width_in=width,
            height_in=(_CELL_H_IN if not look().keyed else _NARROW_H_IN) * bins,
            margins=margins,
            title=title,
            subtitle=f"{subtitle_of(run)}; {about}; accuracy in %, n prompts a cell; hatched: nothing scored",
            rowed=True,
        )
        for (_, scope, cells), text, axes in zip(shown, titles, all_axes, strict=True):
            filled = {
                (lengths.index(cell["length_tokens"]), round(cell["depth_from"] * scope.bins)): (
                    cell["accuracy"],
                    cell["n"],
                    accuracy_tip(
                        f"{cell['method_label']}, {cell['task']}",
                        f"{length_text(cell['length_tokens'])}, depth {cell['depth']}",
                        cell,
                    ),
                )
                for cell in records(cells[cells["depth"] != ALL_DEPTHS])
            }
            heat_panel(axes, filled, lengths=lengths, rows=scope.bins)
            axes.yaxis.set_major_locator(FixedLocator(list(range(scope.bins + 1))))
            axes.set_yticklabels(ticks[scope.bins])
            axes.set_ylabel("depth of the evidence")
            axes.set_title(text, fontweight="bold")
    pooled = (
        f"; {NIAH_POOL} is over all needle tasks of the run" if any(s.name == NIAH_POOL for _, s, _ in shown) else ""
    )
    caption = (
        f"Accuracy (%) and number of scored prompts n, by depth of the evidence (0 % = start of the prompt) and "
        f"length; {about}{pooled}. Cells of few prompts say little. {depthless_note(run)}".rstrip()
    )
    return ReportFigure(name, title, caption, figure, data.reset_index(drop=True))
