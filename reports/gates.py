"""Limits of a comparison (`kvscope compare --fail-if`): what may change by how much, and which limits are crossed.

A limit is judged on the estimate, never on an interval: the prompts of both runs are the same, so what they lost is
known, and a gate that waits for significance lets a small sample pass. The interval is printed beside it.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvscope.errors import UsageError, did_you_mean, shown
from kvscope.reports.compare import RunComparison, pair_text
from kvscope.reports.units import length_text, points, with_interval
from kvscope.results.comparisons import POOLED
from kvscope.results.joining import MethodPair
from kvscope.units import finite_number

#: Metric -> column of a comparison's cells; accuracy has its own rows.
COLUMNS: dict[str, str] = {
    "footprint": "held_bytes",
    "host": "host_kv_bytes",
    "tpot": "tpot_s",
    "ttft": "ttft_s",
}
METRICS = ("accuracy", *COLUMNS)
_LIMIT = re.compile(r"([a-z_]+):([+-])([^%a-z]+)(pt|%)")
_HOW = "write accuracy:-1pt, or footprint:+5% (or host, tpot, ttft)"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Limit:
    """`accuracy:-1pt` is ("accuracy", 0.01): a fall of more than a point; `tpot:+10%` a rise of more than a tenth."""

    text: str
    metric: str
    most: float
    """Most that is allowed: a fraction of accuracy's range, or of A's value."""


def parse_limit(text: str) -> Limit:
    """Read one limit.

    Raises:
        UsageError: an unknown metric, or another form.
    """
    metric = text.partition(":")[0]
    if metric not in METRICS:
        raise UsageError(f"--fail-if knows no limit {shown(metric)}.{did_you_mean(metric, METRICS)}")
    match = _LIMIT.fullmatch(text.strip())
    number = finite_number(match[3]) if match else None
    wanted = ("-", "pt") if metric == "accuracy" else ("+", "%")
    if match is None or number is None or number < 0 or (match[2], match[4]) != wanted:
        raise UsageError(f"--fail-if cannot read {shown(text)}: {_HOW}.")
    return Limit(text.strip(), metric, number / 100)


def crossed(limits: Sequence[Limit], found: Sequence[RunComparison]) -> list[str]:
    """Return one sentence a limit, run, pair and length that is over it.

    What A measured and B tried in vain crosses the limits that it would have been held to.

    Raises:
        UsageError: a limit that nothing of a run can be held to: it would pass unseen.
    """
    lines = []
    for limit in limits:
        for each in found:
            of_pairs = {pair: list(_changes(limit.metric, each, pair)) for pair in each.pairs}
            if not any(of_pairs.values()):
                raise UsageError(
                    f"--fail-if {limit.text} cannot be judged: {each.first} and {each.other} have no {limit.metric} in "
                    "common."
                )
            for pair, changes in of_pairs.items():
                over = [text for change, text in changes if change > limit.most + _ROUNDING]
                lost = list(_lost(limit.metric, each, pair))
                if not changes and not lost:
                    lost = [f"{limit.metric} of {pair_text(pair)} is not in both runs"]
                lines += [f"{limit.text} is crossed by {each.letter}: {text}" for text in (*over, *lost)]
    return lines


def _changes(metric: str, found: RunComparison, pair: MethodPair) -> Iterator[tuple[float, str]]:
    """Every change of a metric to the worse, as a fraction, with its sentence."""
    if metric == "accuracy":
        for row in found.accuracy:
            if row.scope == POOLED and row.method_label == pair_text(pair):
                whole = row.paired.difference
                text = with_interval(whole.mean, whole.low, whole.high, text=points)
                yield -whole.mean, f"accuracy of {row.method_label} {text} points (n = {whole.n})"
        return
    for cell in found.cells:
        old, new = (cell[f"{COLUMNS[metric]}_{side}"] for side in ("a", "b"))
        if (cell["baseline"], cell["method"]) != pair or old is None or new is None:
            continue
        change = change_of(old, new)
        where = f"{metric} of {pair_text(pair)} at {length_text(cell['length_tokens'])}"
        yield change, f"{where} {change_text(change)}{_doubt_text(metric, cell)}"


def _lost(metric: str, found: RunComparison, pair: MethodPair) -> Iterator[str]:
    """Sentences of what A measured and B tried in vain."""
    if metric == "accuracy":
        n = sum(gap.n for gap in found.gaps if gap.methods == pair and gap.lost)
        if n:
            yield f"{n} prompts that A answered have no answer of {pair_text(pair)}"
        return
    for cell in found.lone_cells:
        if cell.methods == pair and cell.lost:
            yield f"{metric} of {pair_text(pair)} at {length_text(cell.length_tokens)} was not measured ({cell.b})"


def change_of(old: float, new: float) -> float:
    """Return a change as a fraction of the old value; infinite where that is nil."""
    return new / old - 1 if old else (math.inf if new else 0.0)


def change_text(change: float) -> str:
    """Return `+5.2 %`."""
    return "from nil" if math.isinf(change) else f"{100 * change:+.1f} %"


def _doubt_text(metric: str, cell: dict[str, Any]) -> str:
    why = doubts(cell) if metric in ("tpot", "ttft") else ""
    return f" (time not to be trusted: {why})" if why else ""


def doubts(cell: dict[str, Any]) -> str:
    """Return why the times of a cell are not to be compared; empty where nothing speaks against it."""
    parts = [f"{side.upper()}: {cell[f'time_doubts_{side}']}" for side in ("a", "b") if cell[f"time_doubts_{side}"]]
    return "; ".join([*parts, *([cell["steps_differ"]] if cell["steps_differ"] else [])])
