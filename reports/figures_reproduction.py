"""Figures of ``kvscope reproduce lsa``: claims against their ranges, and Table 1 beside the paper's."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from kvscope.reports.canvas import Margins, panels
from kvscope.reports.claims import Claim
from kvscope.reports.claims_lsa import lsa_claims
from kvscope.reports.figure_parts import ReportFigure, key_entry
from kvscope.reports.subtitle import device_of
from kvscope.reports.table_1 import method_words, table_1_records
from kvscope.reports.theme import TEXT, method_styles, theme
from kvscope.reports.units import length_text
from kvscope.results.reproduction import Loaded

_RANGE = "#CFE8DC"


def reproduction_figures(loaded: Loaded) -> list[ReportFigure]:
    """Return what can be drawn of the rows that are there."""
    found = [claims_figure(loaded), row_figure(loaded, "accuracy"), row_figure(loaded, "share")]
    return [figure for figure in found if figure is not None]


def claims_figure(loaded: Loaded) -> ReportFigure | None:
    """Draw every measured claim with its interval over the range that counts as the claim."""
    drawn = [claim for claim in lsa_claims(loaded) if claim.ours is not None and claim.unit != "x"]
    if not drawn:
        return None
    name, title = "claims", "Claims, measured, and the range that counts"
    groups = [[claim for claim in drawn if claim.unit == unit] for unit in ("%", "points")]
    groups = [group for group in groups if group]
    words = {"%": "share of dense's bytes (%)", "points": "difference (points)"}
    with theme(name):
        figure, all_axes = panels(
            len(groups), columns=1, width_in=6.0, height_in=0.3 * max(map(len, groups)) + 0.3,
            margins=Margins(left=2.2, right=0.3, top=0.3, bottom=0.55), title=title,
            subtitle=_subtitle(loaded),
            note=loaded.plan.scale_sentence,
            key=[key_entry("measured, 95 % interval", marker="o", line="-", color=TEXT),
                 key_entry("the paper", marker="D", color="#D55E00"), key_entry("counts as the claim", marker="s",
                                                                            color=_RANGE)],
        )  # fmt: skip
        for group, axes in zip(groups, all_axes, strict=True):
            _claims_panel(axes, group)
            axes.set_xlabel(words[group[0].unit])
    data = pd.DataFrame(
        [
            {"key": claim.key, "unit": claim.unit, "paper": claim.paper, "ours": claim.ours, "ci_low": claim.low,
             "ci_high": claim.high, "verdict": claim.verdict}
            for claim in drawn
        ]
    )  # fmt: skip
    caption = (
        "Each measured claim with its 95 % interval, the paper's value, and the range fixed before that counts as the "
        f"claim. {loaded.plan.scale_sentence}"
    )
    return ReportFigure(name, title, caption.strip(), figure, data)


def _claims_panel(axes: Axes, claims: list[Claim]) -> None:
    ends = [
        value for claim in claims for value in (claim.ours, claim.low, claim.high, claim.paper) if value is not None
    ]
    low, high = min(ends), max(ends)
    pad = 0.06 * max(high - low, 1.0)
    low, high = low - pad, high + pad
    for place, claim in enumerate(claims):
        if claim.asked is not None:
            left, right = max(low, claim.asked.low), min(high, claim.asked.high)
            if right > left:
                axes.barh(place, right - left, left=left, height=0.8, color=_RANGE, zorder=1)
        if claim.low is not None and claim.high is not None:
            axes.plot([claim.low, claim.high], [place, place], color=TEXT, linewidth=1.6, zorder=3)
        assert claim.ours is not None
        axes.plot([claim.ours], [place], marker="o", color=TEXT, markersize=5, zorder=4)
        if claim.paper is not None:
            axes.plot([claim.paper], [place], marker="D", color="#D55E00", markersize=5, zorder=2.5)
    axes.set_xlim(low, high)
    axes.set_ylim(len(claims) - 0.4, -0.6)
    axes.set_yticks(range(len(claims)), [_short(claim) for claim in claims], fontsize=8)
    axes.grid(axis="y", visible=False)


def _short(claim: Claim) -> str:
    return claim.key.replace("_", " ")


def row_figure(loaded: Loaded, what: str) -> ReportFigure | None:
    """Draw accuracy, or the share of bytes, of every method by row, the paper's hollow beside ours."""
    data = pd.DataFrame(table_1_records(loaded))
    if what not in data or not data[what].notna().any():
        return None
    name, title = (
        ("table_1_accuracy", "Accuracy by row of Table 1") if what == "accuracy"
        else ("table_1_share", "Bytes over dense's by row of Table 1")
    )  # fmt: skip
    data = data.sort_values(["paper_tokens"], kind="stable")
    rows = list(dict.fromkeys(data["row"]))
    methods = list(dict.fromkeys(data["method"]))
    if what == "share":
        methods = [method for method in methods if method != "dense"]
    styles = method_styles(methods)
    key = [key_entry(method_words(method), marker=styles[method].marker, color=styles[method].color)
           for method in methods]  # fmt: skip
    with theme(name):
        figure, (axes,) = panels(
            1, columns=1, width_in=7.6, height_in=3.6, margins=Margins(left=0.8, right=0.3, top=0.3, bottom=1.35),
            title=title, subtitle=_subtitle(loaded), note=f"Filled: measured here. Hollow: the paper's. "
            f"{loaded.plan.scale_sentence}", key=key,
        )  # fmt: skip
        width = 0.8 / max(1, len(methods))
        for index, method in enumerate(methods):
            own = data[data["method"] == method].set_index("row")
            style = styles[method]
            for place, row in enumerate(rows):
                if row not in own.index:
                    continue
                x = place + (index - (len(methods) - 1) / 2) * width
                _mark(axes, x, own.loc[row], what, style.color, style.marker)
        lengths = {row: int(data.loc[data["row"] == row, "length_tokens"].iloc[0]) for row in rows}
        labels = [f"{row}\nas {length_text(lengths[row])}" if loaded.plan.scaled else row for row in rows]
        axes.set_xticks(range(len(rows)), labels, rotation=35, ha="right", fontsize=8)
        axes.set_ylabel("accuracy (%)" if what == "accuracy" else "bytes over dense's (%)")
        axes.set_ylim(bottom=-3)
        axes.grid(axis="x", visible=False)
    columns = ["row", "length_tokens", "method", "n", what, f"paper_{what}"]
    if what == "accuracy":
        columns[5:5] = ["ci_low", "ci_high"]
    kept = data[data["method"].isin(methods)]
    caption = f"{title}: measured (filled) and as the paper printed it (hollow). {loaded.plan.scale_sentence}"
    return ReportFigure(name, title, caption.strip(), figure, kept.reindex(columns=columns).reset_index(drop=True))


def _mark(axes: Axes, x: float, row: "pd.Series[Any]", what: str, color: str, marker: str) -> None:
    value, printed = row.get(what), row.get(f"paper_{what}")
    if pd.notna(value):
        low, high = row.get("ci_low"), row.get("ci_high")
        if what == "accuracy" and pd.notna(low) and pd.notna(high):
            axes.plot([x, x], [100 * low, 100 * high], color=color, linewidth=1.0, zorder=2)
        axes.plot([x], [100 * value], marker=marker, color=color, markersize=5.5, markeredgecolor="white",
                  markeredgewidth=0.5, zorder=3)  # fmt: skip
    if pd.notna(printed):
        axes.plot([x], [100 * printed], marker=marker, markerfacecolor="none", markeredgecolor=color, markersize=6,
                  alpha=0.75, zorder=2.5)  # fmt: skip


def _subtitle(loaded: Loaded) -> str:
    plan = loaded.plan
    run = next(iter(loaded.runs.values()), None)
    where = "" if run is None else f" on {device_of(run.info)}"
    unfinished = any(cell.left_out is None and cell.name not in loaded.runs for cell in plan.cells)
    return f"{plan.model}{where}, profile {plan.size}, {plan.lsa}" + ("; unfinished" if unfinished else "")
