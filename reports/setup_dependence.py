"""How much lsa's result depends on each setting: one changed at a time, a table of all and a figure each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from kvscope.methods.kv_format import FORMATS
from kvscope.reports.canvas import Margins, panels
from kvscope.reports.claim_rows import CellRows, cell_rows
from kvscope.reports.figure_parts import ReportFigure
from kvscope.reports.subtitle import device_of
from kvscope.reports.table_parts import Table
from kvscope.reports.theme import COLORS, FAINT, TEXT, theme
from kvscope.reports.units import length_text, points, with_interval
from kvscope.results.frames import records
from kvscope.results.reproduction import Loaded
from kvscope.results.statistics import Interval, PairedDifference

WORDS = {
    "chunk_tokens": "Chunk size (tokens)",
    "threshold": "Threshold",
    "tau": "Tau (decode steps between refreshes)",
    "policy": "Policy, refresh",
    "kv": "Format of the store (kv)",
    "length": "Length (tokens)",
    "task": "Task",
}
"""Setting -> what its axis says, in the order of the figures."""
NAMED = ("policy", "task", "kv")
"""Settings whose values have no order, so that no line joins them."""
LONGEST_UPRIGHT = 6
"""Characters of a value's name that is not turned; names that are take the place of the axis' own."""
RAW = "none"
"""Value of ``kv`` where nothing is packed: rows leave it out."""
_COLUMNS = [
    "setting", "value", "as_asked", "method_label", "length_tokens", "n", "share", "share_low", "share_high",
    "accuracy", "dense_accuracy", "difference", "difference_low", "difference_high", "lost", "won",
]  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One value of one setting."""

    setting: str
    value: str
    as_asked: bool
    """Whether it is the method as asked for, which is in every figure."""
    label: str
    length_tokens: int
    share: Interval | None
    paired: PairedDifference
    accuracy: float
    dense_accuracy: float


def setup_points(loaded: Loaded) -> list[Point]:
    """Return every point that has rows, by setting in the order of ``WORDS``, values ascending."""
    if "points" not in loaded.memo:
        loaded.memo["points"] = _points(loaded)
    found: list[Point] = loaded.memo["points"]
    return found


def _points(loaded: Loaded) -> list[Point]:
    found: list[Point | None] = []
    for cell, run in loaded.of_role("sweep"):
        if run is None:
            continue
        rows = cell_rows(loaded, cell, run)
        found += _options(rows)
        found.append(_point(rows, "lsa", "length", str(cell.lengths_tokens[0]), as_asked=len(cell.methods) > 2))
        if len(cell.methods) > 2:
            for task in run.info.tasks:
                samples = run.samples[run.samples["task"] == task]
                own = CellRows(cell, replace(run, samples=samples))
                found.append(_point(own, "lsa", "task", task, as_asked=False))
    order = list(WORDS)
    return sorted(
        (each for each in found if each is not None), key=lambda each: (order.index(each.setting), _order(each))
    )


def _order(point: Point) -> tuple[float, str]:
    if point.setting == "kv":
        return float([RAW, *FORMATS].index(point.value)), ""  # most bits first
    try:
        return float(point.value), ""
    except ValueError:
        return 0.0, point.value


def _options(rows: CellRows) -> list[Point | None]:
    found: list[Point | None] = []
    for name in rows.plan.methods:
        setting, equals, value = name.partition("=")
        if equals:
            found.append(_point(rows, name, setting, value, as_asked=False))
    for setting in dict.fromkeys(each.setting for each in found if each):
        found.append(_point(rows, "lsa", setting, _base_value(rows, setting), as_asked=True))
    return found


def _base_value(rows: CellRows, setting: str) -> str:
    """Value of a setting in the method as asked for, as its rows tell."""
    config: dict[str, Any] = next(iter(rows.rows("lsa")["config"]), {})
    if setting == "policy":
        return f"{'pages' if config.get('mode') == 'pages' else 'threshold'}, {config.get('refresh')}"
    return str(config.get(setting, RAW if setting == "kv" else "as asked"))


def _point(rows: CellRows, name: str, setting: str, value: str, *, as_asked: bool) -> Point | None:
    paired = rows.difference(name)
    accuracy, dense = rows.accuracy(name), rows.accuracy("dense")
    if paired is None or accuracy is None or dense is None:
        return None
    return Point(
        setting, value, as_asked, rows.plan.methods[name], rows.plan.lengths_tokens[0],
        rows.share(name, accounting="all"), paired, accuracy.mean, dense.mean,
    )  # fmt: skip


def setup_table(loaded: Loaded) -> Table:
    """Return a row for each value of each setting."""
    data = pd.DataFrame([_record(point) for point in setup_points(loaded)], columns=_COLUMNS).astype(
        {"length_tokens": "Int64", "n": "Int64", "lost": "Int64", "won": "Int64"}
    )
    text = pd.DataFrame([_text(row) for row in records(data)])
    caption = (
        f"What each setting of {loaded.plan.lsa} does on {loaded.plan.model}, one changed at a time; `*` is the method "
        "as asked for. Differences to dense are paired on the same prompts, with 95 % intervals; `-, +` counts pairs "
        "lost and won. The share is the ledger's bytes over dense's for the same prompt (KV, metadata and index keys), "
        "mean over prompts."
    )
    notes = () if len(data) else ("Nothing was measured yet.",)
    return Table("setup", "Dependence on the setup", caption, data, text, notes)


def _record(point: Point) -> dict[str, object]:
    share, difference = point.share, point.paired.difference
    return {
        "setting": point.setting, "value": point.value, "as_asked": point.as_asked, "method_label": point.label,
        "length_tokens": point.length_tokens, "n": point.paired.n_pairs, "share": None if share is None else share.mean,
        "share_low": None if share is None else share.low, "share_high": None if share is None else share.high,
        "accuracy": point.accuracy, "dense_accuracy": point.dense_accuracy, "difference": difference.mean,
        "difference_low": difference.low, "difference_high": difference.high, "lost": point.paired.lost,
        "won": point.paired.won,
    }  # fmt: skip


def _text(row: dict[str, Any]) -> dict[str, str]:
    value = length_text(int(row["value"])) if row["setting"] == "length" else row["value"]
    return {
        "setting": row["setting"],
        "value": f"{value} *" if row["as_asked"] else value,
        "length": length_text(row["length_tokens"]),
        "n": str(row["n"]),
        "share (%)": "not seen" if row["share"] is None
        else with_interval(row["share"], row["share_low"], row["share_high"]),
        "accuracy (%)": f"{100 * row['accuracy']:.1f}",
        "dense (%)": f"{100 * row['dense_accuracy']:.1f}",
        "minus dense (points)": with_interval(
            row["difference"], row["difference_low"], row["difference_high"], text=points
        ),
        "-, +": f"{row['lost']}, {row['won']}",
    }  # fmt: skip


def setup_figures(loaded: Loaded) -> list[ReportFigure]:
    """Return a figure for each setting with two values or more."""
    every = setup_points(loaded)
    found = []
    for setting in WORDS:
        mine = [point for point in every if point.setting == setting]
        if len(mine) > 1:
            found.append(_figure(loaded, setting, mine))
    return found


def _figure(loaded: Loaded, setting: str, mine: Sequence[Point]) -> ReportFigure:
    name, title = f"setup_{setting}", f"lsa by {setting.replace('_', ' ')}"
    counts = sorted({point.paired.n_pairs for point in mine})
    n_text = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    run = next(iter(loaded.runs.values()))
    lengths = ", ".join(length_text(each) for each in sorted({point.length_tokens for point in mine}))
    long_names = setting in NAMED and max(map(len, (point.value for point in mine))) > LONGEST_UPRIGHT
    with theme(name):
        figure, (left, right) = panels(
            2, columns=2, width_in=3.4, height_in=2.5, margins=Margins(bottom=1.15 if long_names else 0.6), title=title,
            subtitle=f"{loaded.plan.model} on {device_of(run.info)}, {lengths} tokens, {n_text} prompts a point, 95 % "
            "intervals",
            note="Ringed: the method as asked for." if any(point.as_asked for point in mine) else "",
        )  # fmt: skip
        _panel(left, mine, [point.paired.difference for point in mine], "minus dense (points)", COLORS[0])
        left.axhline(0, color=FAINT, linewidth=0.9, zorder=1)
        shares = [point.share or Interval(float("nan"), None, None, 0, "none") for point in mine]
        _panel(right, mine, shares, "bytes over dense's (%)", COLORS[1])
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xlabel("" if long_names else WORDS[setting])
    data = pd.DataFrame([_record(point) for point in mine], columns=_COLUMNS)
    return ReportFigure(name, title, sentences(mine, n_text=n_text, lengths=lengths), figure, data)


def _panel(axes: Axes, mine: Sequence[Point], values: Sequence[Interval], label: str, color: str) -> None:
    places = list(range(len(mine)))
    if mine[0].setting not in NAMED:
        axes.plot(places, [100 * value.mean for value in values], color=color, linewidth=1.0, alpha=0.5, zorder=2)
    for place, point, value in zip(places, mine, values, strict=True):
        if value.low is not None and value.high is not None:
            axes.plot([place, place], [100 * value.low, 100 * value.high], color=color, linewidth=1.4, zorder=3)
        edge, edge_points = (TEXT, 1.4) if point.as_asked else ("white", 0.6)
        axes.plot(
            [place], [100 * value.mean], marker="o", color=color, markersize=5.5, zorder=4, mec=edge, mew=edge_points
        )
    names = [length_text(int(point.value)) if point.setting == "length" else point.value for point in mine]
    turned = max(map(len, names)) > LONGEST_UPRIGHT
    axes.set_xticks(places, names, rotation=30 if turned else 0, ha="right" if turned else "center")
    axes.set_xlim(-0.4, len(mine) - 0.6)
    axes.set_ylabel(label)
    axes.grid(axis="x", visible=False)


def sentences(mine: Sequence[Point], *, n_text: str, lengths: str) -> str:
    """Return three sentences on a setting: what was changed, what it does to the bytes, what to the answers."""
    first = f"{WORDS[mine[0].setting]}: {len(mine)} values at {lengths} tokens, {n_text} prompts a point."
    shares = [(point.share.mean, point.value) for point in mine if point.share is not None]
    second = "Bytes are not seen."
    if shares:
        (low, at_low), (high, at_high) = min(shares), max(shares)
        second = f"Bytes over dense's go from {100 * low:.1f} % at {at_low} to {100 * high:.1f} % at {at_high}."
    clear = [
        f"{point.value} ({points(point.paired.difference.mean)} points)"
        for point in mine
        if point.paired.p_value < 0.05 and point.paired.pairs_for_6_discordant is None
    ]
    third = (
        f"Answers differ from dense's by more than chance (5 %, each test alone) at {', '.join(clear)}."
        if clear
        else "At no value can the answers be told from dense's by so many prompts."
    )
    return f"{first} {second} {third}"
