"""How much of the prompt stays on the device while decoding, for methods that choose again and again."""

from collections import defaultdict
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from kvscope.reports.canvas import Margins, panels
from kvscope.reports.figure_parts import ReportFigure, names_key
from kvscope.reports.labels import Label, end_labels, end_labels_height_in, names_margin_in
from kvscope.reports.subtitle import subtitle_of
from kvscope.reports.theme import MethodStyle, method_styles, theme
from kvscope.reports.units import length_text
from kvscope.results.frames import Run

# A short interval would turn the line into a band of markers.
_MARKERS = 8
COLUMNS = ["method_label", "length_tokens", "refresh", "step", "n", "resident_fraction", "recalled_bytes"]


def resident_over_steps(run: Run) -> list[ReportFigure]:
    """The resident share of the prompt after each refresh, one panel a length; nothing where no method refreshes."""
    data = refreshes(run)
    if not len(data):
        return []
    name, title = "resident_over_steps", "Resident set over decode steps"
    lengths = sorted(set(data["length_tokens"]))
    styles = method_styles([method.label for method in run.info.methods])
    shown = [styles[label].text for label in dict.fromkeys(data["method_label"])]
    with theme(name):
        figure, all_axes = panels(
            len(lengths),
            columns=2,
            width_in=3.6,
            height_in=max(2.6, end_labels_height_in(shown)),
            margins=Margins(left=0.75, right=names_margin_in(shown), top=0.42, bottom=0.62),
            title=title,
            subtitle=f"{subtitle_of(run)}; share of the prompt's tokens, everything that stays counted",
            note="Mean over prompts whose answers reached the refresh; sinks, window and chunks on their way count.",
            key=names_key(styles, list(dict.fromkeys(data["method_label"]))),
        )
        for length, axes in zip(lengths, all_axes, strict=True):
            _panel(axes, data[data["length_tokens"] == length], styles)
            axes.set_title(f"{length_text(length)} tokens", fontweight="bold")
    caption = (
        "Share of the prompt's tokens on the device after each refresh of the resident set, against the step of that "
        "refresh: a mean over the prompts whose answers reached it. Sinks, recency window and chunks on their way "
        "count as resident; decoded tokens come on top."
    )
    return [ReportFigure(name, title, caption, figure, data)]


def refreshes(run: Run) -> pd.DataFrame:
    """Return one row a (method, length, refresh): step, prompts that reached it, resident share, bytes recalled."""
    found: dict[tuple[str, int, int, int], list[tuple[float, int]]] = defaultdict(list)
    told = run.samples[(run.samples["status"] == "ok") & run.samples["residency"].notna()]
    residency: dict[str, Any]
    for label, length, residency in zip(told["method_label"], told["length_tokens"], told["residency"], strict=True):
        if not residency["prompt_tokens"]:
            continue
        for index, (tokens, moved_bytes) in enumerate(
            zip(residency["resident_tokens"], residency["recalled_bytes"], strict=True)
        ):
            key = (label, length, index, index * residency["tau"])
            found[key].append((tokens / residency["prompt_tokens"], moved_bytes))
    rows = [
        (*key, len(values), sum(share for share, _ in values) / len(values), sum(n for _, n in values) / len(values))
        for key, values in found.items()
    ]
    order = {method.label: place for place, method in enumerate(run.info.methods)}
    rows.sort(key=lambda row: (row[1], order.get(row[0], len(order)), row[2]))
    return pd.DataFrame(rows, columns=COLUMNS)


def _panel(axes: Axes, rows: pd.DataFrame, styles: dict[str, MethodStyle]) -> None:
    ends = []
    last = max(1, int(rows["step"].max()))
    for label, own in rows.groupby("method_label", sort=False):
        style = styles[str(label)]
        x = [int(step) for step in own["step"]]
        y = [100 * float(share) for share in own["resident_fraction"]]
        axes.plot(
            x,
            y,
            color=style.color,
            marker=style.marker,
            markersize=style.size,
            markevery=max(1, len(x) // _MARKERS),
            linestyle=style.dash,
            linewidth=1.4,
            drawstyle="steps-post",
            markeredgecolor="white",
            markeredgewidth=0.7,
        )
        ends.append(Label(style.text, x[-1], y[-1], style.color))
    axes.set_xlim(-0.04 * last, 1.04 * last)
    axes.set_ylim(0, 105)
    axes.set_xlabel("decode step of the refresh")
    axes.set_ylabel("resident share of the prompt (%)")
    end_labels(axes, ends)
