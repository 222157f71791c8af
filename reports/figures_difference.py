"""What each method loses or gains against dense, with its interval and the margin: half a point is seen."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from kvscope.reports.canvas import Margins, panels, text_width_in
from kvscope.reports.cells import comparisons
from kvscope.reports.figure_parts import ReportFigure, SkippedFigure, key_entry
from kvscope.reports.hover import tip
from kvscope.reports.look import look
from kvscope.reports.subtitle import subtitle_of
from kvscope.reports.theme import FAINT, MethodStyle, figure_names, method_styles, short_lines, theme
from kvscope.reports.units import length_text, points, with_interval
from kvscope.results.comparisons import POOLED
from kvscope.results.frames import Run, records

_ROW_IN = 0.2
_MOST_ROWS = 60
_LINEAR_MARGINS = 2.0
"""The axis is linear within so many margins, logarithmic beyond."""
_TICKS = (-100.0, -50.0, -20.0, -10.0, -5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
COLUMNS = ["scope", "length_tokens", "method_label", "n_pairs", "difference", "difference_low", "difference_high",
           "interval", "margin", "noninferiority", "equivalence", "verdict"]  # fmt: skip


def accuracy_minus_dense(run: Run) -> ReportFigure | SkippedFigure:
    """Paired differences to dense in points: over all prompts and by length, intervals and the margin's band."""
    name, title = "accuracy_minus_dense", "Accuracy minus dense"
    data = difference_cells(run)
    if not len(data):
        reason = "the run has no dense to compare with, or no method beside it that answered its prompts"
        return SkippedFigure(name, title, reason)
    labels = list(dict.fromkeys(data["method_label"]))
    by_length = len(data) <= _MOST_ROWS
    drawn = data if by_length else data[data["scope"] == POOLED].reset_index(drop=True)
    styles = method_styles([method.label for method in run.info.methods])
    names = figure_names([method.label for method in run.info.methods])
    texts = _row_texts(drawn, names)
    values = [
        with_interval(row["difference"], row["difference_low"], row["difference_high"], text=points)
        for row in records(drawn)
    ]
    margin = 100 * float(drawn["margin"].iloc[0])
    beside_in = 0.0 if look().keyed else text_width_in(values, fontsize=8) + 0.1
    with theme(name):
        figure, (axes,) = panels(
            1,
            columns=1,
            width_in=5.2,
            height_in=_ROW_IN * (sum(1 + text.count("\n") for text in texts) + 1),
            margins=Margins(left=0.2 + text_width_in(texts, fontsize=8.5), right=0.2 + beside_in, top=0.1, bottom=0.6),
            title=title,
            subtitle=f"{subtitle_of(run)}; paired, on the prompts both answered",
            note="" if by_length else "By length: see the table of statistics.",
            key=[
                key_entry(f"margin, {margin:g} {'point' if margin == 1 else 'points'}, fixed before", line="--"),
                key_entry("all prompts", marker="D"),
                *([key_entry("one length", marker="o")] if len(drawn) > len(labels) else []),
                key_entry("95 % interval", line="-"),
            ],
            rowed=True,
        )
        _draw(axes, drawn, texts, styles, margin=margin)
        if not look().keyed:
            for row, text in enumerate(values):
                axes.text(
                    1.01, _middles(texts)[row], text, transform=axes.get_yaxis_transform(), fontsize=look().pt(8),
                    va="center", color=FAINT,
                )  # fmt: skip
    caption = (
        "Accuracy minus dense's on the prompts both answered, in percentage points, with 95 % intervals: over all "
        f"prompts{', and by length' if by_length else ''}. Dashed: the margin of non-inferiority, fixed before the "
        f"run. The axis is linear within {_LINEAR_MARGINS * margin:g} points and logarithmic beyond."
    )
    return ReportFigure(name, title, caption, figure, data)


def difference_cells(run: Run) -> pd.DataFrame:
    """One row a (method, scope): all prompts first, then every length where there are several."""
    lengths = {f"{length} tokens": length for length in run.info.lengths_tokens}
    order = {method.label: place for place, method in enumerate(run.info.methods)}
    rows: list[dict[str, Any]] = [
        {
            "scope": found.scope,
            "length_tokens": lengths.get(found.scope),
            "method_label": found.method_label,
            "n_pairs": found.paired.n_pairs,
            "difference": found.paired.difference.mean,
            "difference_low": found.paired.difference.low,
            "difference_high": found.paired.difference.high,
            "interval": found.paired.difference.kind,
            "margin": found.paired.noninferiority.margin,
            "noninferiority": found.paired.noninferiority.verdict,
            "equivalence": found.paired.equivalence.verdict,
            "verdict": found.verdict,
        }
        for found in comparisons(run)
        if found.scope == POOLED or found.scope in lengths
    ]
    rows.sort(key=lambda row: (order[row["method_label"]], row["length_tokens"] or 0))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"length_tokens": "Int64"})


def _row_texts(data: pd.DataFrame, names: dict[str, str]) -> list[str]:
    texts = []
    for row in records(data):
        is_all = row["scope"] == POOLED
        texts.append(short_lines(names[row["method_label"]]) if is_all else length_text(row["length_tokens"]))
    return texts


def _middles(texts: list[str]) -> list[float]:
    """Height of every row, in rows from the top; a name of two lines takes two."""
    middles, used = [], 0.5
    for text in texts:
        size = 1 + text.count("\n")
        middles.append(used + size / 2)
        used += size
    return middles


def _draw(axes: Axes, data: pd.DataFrame, texts: list[str], styles: dict[str, MethodStyle], *, margin: float) -> None:
    middles = _middles(texts)
    axes.set_ylim(middles[-1] + (1 + texts[-1].count("\n")) / 2 + 0.5, 0)
    shown = pd.concat([data[name] for name in ("difference", "difference_low", "difference_high")]).astype(float) * 100
    low, high = min(float(shown.min()), -margin) * 1.25, max(float(shown.max()), margin) * 1.25
    linear = _LINEAR_MARGINS * margin
    axes.set_xscale("symlog", linthresh=linear, linscale=1.0)
    axes.set_xlim(low - 0.3 * margin, high + 0.3 * margin)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    places = [float(axes.transData.transform((tick, 0))[0]) / axes.figure.dpi for tick in ticks]
    axes.xaxis.set_major_locator(FixedLocator([ticks[i] for i in _kept(ticks, places)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axes.yaxis.set_major_locator(FixedLocator(middles))
    axes.set_yticklabels(texts)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("accuracy minus dense (points)")
    axes.axvline(0, color=FAINT, linewidth=0.9, zorder=1)
    for side in (-margin, margin):
        axes.axvline(side, color=FAINT, linewidth=1, linestyle="--", zorder=1)
    axes.axvspan(-margin, margin, color="#EEEEEE", zorder=0)
    for row, middle in zip(records(data), middles, strict=True):
        style, is_all = styles[row["method_label"]], row["scope"] == POOLED
        if row["difference_low"] is not None and row["difference_high"] is not None:  # of one context there is none
            ends = [100 * row["difference_low"], 100 * row["difference_high"]]
            axes.plot(ends, [middle, middle], color=style.color, linewidth=2.2 if is_all else 1.1, zorder=2)
        axes.plot(
            [100 * row["difference"]], [middle], color=style.color, marker="D" if is_all else "o",
            markersize=6 if is_all else 4.5, markeredgecolor="white", markeredgewidth=0.7, linestyle="None", zorder=3,
            gid=tip(_says(row)),
        )  # fmt: skip


def _says(row: dict[str, Any]) -> str:
    name = look().names.get(row["method_label"], row["method_label"])
    where = row["scope"] if row["length_tokens"] is None else length_text(row["length_tokens"])
    value = with_interval(row["difference"], row["difference_low"], row["difference_high"], text=points)
    return f"{name}, {where}: {value} points, n = {row['n_pairs']} pairs, {row['noninferiority']}"


def _kept(ticks: list[float], places_in: list[float]) -> list[int]:
    """Ticks whose labels leave each other room; nil always has its own."""
    texts = [f"{tick:+g}" for tick in ticks]
    nil = ticks.index(0.0)
    kept = [nil]
    for step in (-1, 1):
        at = nil
        for place in range(nil + step, len(ticks) if step > 0 else -1, step):
            room = text_width_in([texts[place], texts[at]], fontsize=8.5)
            if abs(places_in[place] - places_in[at]) >= room + 0.05:
                kept.append(place)
                at = place
    return sorted(kept)
