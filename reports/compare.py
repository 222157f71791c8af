"""Runs against a first one: accuracy paired on their prompts, bytes and times cell by cell, and what was set otherwise.

A is the run given first, B, C ... the others; each is compared with A alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kvscope.errors import UsageError
from kvscope.reports.cells import NOT_SEEN
from kvscope.reports.trust import time_doubts
from kvscope.results.comparisons import Comparison, compare_tables
from kvscope.results.continuing import differing_values
from kvscope.results.frames import Run, records
from kvscope.results.joining import Gap, Joined, MethodPair, join, renumbered
from kvscope.results.run_schema import RunInfo

LEDGER = ("resident_kv_bytes", "metadata_bytes", "host_kv_bytes", "dense_kv_bytes")
TIMES = ("tpot_s", "tpot_p10_s", "tpot_p90_s", "ttft_s")
SIDES = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that is not the same in both runs: `area` is `asked`, `version`, `environment` or `settings`."""

    area: str
    key: str
    a: str
    b: str


@dataclass(frozen=True, kw_only=True)
class LoneCell:
    """A footprint cell without its like in the other run: the status of each, `not there` where it has none."""

    methods: MethodPair
    length_tokens: int
    a: str
    b: str

    @property
    def lost(self) -> bool:
        """Whether A measured it and B tried in vain."""
        return self.a == "ok" and self.b != "not there"


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """One run against the first.

    Attributes:
        letter: what tables call the run: B, C and so on.
        first, other: their folders.
        pairs: labels of the methods that stand against each other, A's first.
        accuracy: B minus A in every scope, on the prompts that both answered; `method_label` is `pair_text` of a pair.
        same_answers: of each pair, how many answers are the same text, and how many there are.
        cells: bytes and times of a pair at a length, one mapping each (see `_cell`).
        lone_cells: footprint cells that are not compared.
        gaps: prompts that are in no comparison.
        left_out: labels of each run that are compared with nothing.
        differences: what was asked, set and installed otherwise.
        notes: what else is not compared.
    """

    letter: str
    first: Path
    other: Path
    pairs: tuple[MethodPair, ...]
    accuracy: tuple[Comparison, ...]
    same_answers: tuple[tuple[int, int], ...]
    cells: tuple[dict[str, Any], ...]
    lone_cells: tuple[LoneCell, ...]
    gaps: tuple[Gap, ...]
    left_out: tuple[tuple[str, ...], tuple[str, ...]]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def pair_text(pair: MethodPair) -> str:
    """Return what tables call two methods: their label, or B's and then A's."""
    return pair[1] if pair[0] == pair[1] else f"{pair[1]} (A: {pair[0]})"


def compare_runs(runs: Sequence[Run], pair: MethodPair | None = None) -> list[RunComparison]:
    """Compare every run with the first.

    Args:
        runs: two or more, as `legible` gives them.
        pair: methods to compare, (first's label, other's label); None: see `joining.method_pairs`.

    Raises:
        UsageError: fewer than two runs, more than 26, one given twice, or two that have nothing in common.
    """
    if not 2 <= len(runs) <= 26:
        raise UsageError(f"kvscope compare takes 2 to 26 folders of runs, and {len(runs)} were given.")
    first = runs[0]
    for run in runs[1:]:
        if run.folder.resolve() == first.folder.resolve():
            raise UsageError(f"{run.folder} is given twice: there is nothing to compare.")
    return [_compared(first, run, chr(ord("A") + place), pair) for place, run in enumerate(runs) if place]


def _compared(first: Run, other: Run, letter: str, asked: MethodPair | None) -> RunComparison:
    joined = join(first, other, asked)
    cells, lone_cells = _cells(first, other, joined)
    notes = []
    n_pairs = sum(map(len, joined.tables))
    changed = renumbered(first, other)
    if not n_pairs and not cells:
        why = f"; {changed} of the same task, length and number have another text" if changed else ""
        raise UsageError(
            f"{first.folder} and {other.folder} have no answered prompt and no footprint cell in common{why}: compare "
            "runs of the same tasks, lengths and seed."
        )
    if changed:
        notes.append(
            f"{changed} prompts of the same task, length and number have another text in B: another seed, tokenizer, "
            "data file or version of the task."
        )
    searches = [
        name for name in ("max_context", "throughput") if len(getattr(first, name)) or len(getattr(other, name))
    ]
    if searches:
        notes.append(f"Rows of {' and '.join(searches)} are not compared.")
    if first.info.served or other.info.served:
        notes.append(f"Bytes of answers are not compared: {NOT_SEEN}.")
    tables = {pair_text(pair): table for pair, table in zip(joined.pairs, joined.tables, strict=True)}
    every = pd.concat(joined.tables)
    return RunComparison(
        letter=letter,
        first=first.folder,
        other=other.folder,
        pairs=joined.pairs,
        accuracy=tuple(
            compare_tables(
                tables,
                baselines={pair_text(pair): pair[0] for pair in joined.pairs},
                lengths=sorted(every["length_tokens"].unique()),
                tasks=every["task"].unique().tolist(),
            )
        ),
        same_answers=tuple((int(table["same_answer"].sum()), len(table)) for table in joined.tables),
        cells=tuple(cells),
        lone_cells=tuple(lone_cells),
        gaps=joined.gaps,
        left_out=joined.left_out,
        differences=tuple(_differences(first, other, joined)),
        notes=tuple(notes),
    )


def _cells(first: Run, other: Run, joined: Joined) -> tuple[list[dict[str, Any]], list[LoneCell]]:
    """Return bytes and times by pair and length, and which footprint cells have no partner."""
    found, lone = [], []
    for pair, table in zip(joined.pairs, joined.tables, strict=True):
        rows = [_footprints(run, label) for run, label in zip((first, other), pair, strict=True)]
        for length in sorted({*rows[0], *rows[1], *table["length_tokens"].tolist()}):
            a, b = (each.get(length) for each in rows)
            if a is not None and b is not None and a["status"] == b["status"] == "ok":
                found.append(_cell(pair, length, "footprint", a, b))
                continue
            if a is not None or b is not None:
                states = [row["status"] if row else "not there" for row in (a, b)]
                lone.append(LoneCell(methods=pair, length_tokens=length, a=states[0], b=states[1]))
            matched = table[table["length_tokens"] == length]
            if len(matched) and not (first.info.served or other.info.served):
                a, b = (_means(run, matched[name]) for run, name in ((first, "row_baseline"), (other, "row_method")))
                found.append(_cell(pair, length, "answers", a, b))
    return found, lone


def _footprints(run: Run, label: str) -> dict[int, dict[str, Any]]:
    """Length -> the footprint row of a method."""
    return {row["length_tokens"]: row for row in records(run.footprint[run.footprint["method_label"] == label])}


def _means(run: Run, places: "pd.Series[int]") -> dict[str, Any]:
    """Mean bytes of some answers; an answer's times are shared with others and are none of a footprint's."""
    rows = run.samples.loc[places.to_numpy(), list(LEDGER)].astype("float64")
    return {name: float(rows[name].mean()) for name in LEDGER}


def _cell(pair: MethodPair, length: int, source: str, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Return bytes and times of both, each with `_a` or `_b` behind its name.

    `source` is `footprint`, or `answers` where there is no such cell in both: then bytes are means over the prompts
    that both answered, and there are no times.
    """
    cell: dict[str, Any] = {"baseline": pair[0], "method": pair[1], "length_tokens": length, "source": source}
    for side, row in zip(SIDES, (a, b), strict=True):
        cell[f"held_bytes_{side}"] = row["resident_kv_bytes"] + row["metadata_bytes"]
        cell[f"dense_kv_bytes_{side}"] = row["dense_kv_bytes"]
        cell[f"host_kv_bytes_{side}"] = row["host_kv_bytes"]
        cell[f"kv_nvml_bytes_{side}"] = row.get("kv_nvml_bytes")
        cell |= {f"{name}_{side}": row.get(name) for name in TIMES}
        cell[f"time_doubts_{side}"] = time_doubts(row)
    steps = [(row.get("step_backend") or "eager").split(":")[0] for row in (a, b)]
    cell["steps_differ"] = f"steps were {steps[0]} in A and {steps[1]} in B" if steps[0] != steps[1] else ""
    return cell


def _differences(first: Run, other: Run, joined: Joined) -> list[Difference]:
    """Return what was asked, set and installed otherwise."""
    a, b = first.info, other.info
    areas: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "asked": ({"model": a.model, **a.identity}, {"model": b.model, **b.identity}),
        "version": (_version(a), _version(b)),
        "environment": (a.environment, b.environment),
    }
    found = [
        Difference(area=area, key=key, a=old, b=new)
        for area, (left, right) in areas.items()
        for key, old, new in differing_values(left, right)
    ]
    for label in (pair[0] for pair in joined.pairs if pair[0] == pair[1]):
        left, right = _settings(first, label), _settings(other, label)
        shared = left.keys() & right.keys()
        values = differing_values({key: left[key] for key in shared}, {key: right[key] for key in shared})
        found += [Difference(area="settings", key=f"{label} {key}", a=old, b=new) for key, old, new in values]
    return found


def _version(info: RunInfo) -> dict[str, Any]:
    return {"kvscope": info.kvscope_version, "commit": info.commit, "dirty": info.dirty}


def _settings(run: Run, label: str) -> dict[str, Any]:
    """Settings of a method as used, by length."""
    frames = [
        frame.loc[frame["method_label"] == label, ["length_tokens", "config"]] for frame in (run.samples, run.footprint)
    ]
    return {
        str(row["length_tokens"]): row["config"]
        for frame in frames
        for row in records(frame.drop_duplicates("length_tokens"))
    }
