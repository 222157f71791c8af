"""What a run was asked for, what is there, and what could not be measured."""

from collections import Counter
from dataclasses import dataclass

import pandas as pd

from kvscope.reports.trust import with_doubts
from kvscope.reports.units import length_text
from kvscope.results.frames import Run, once, records
from kvscope.results.plain_text import shortened

_LISTED = 12


@dataclass(frozen=True)
class Coverage:
    """Rows expected against rows present, and the cells that ended without a measurement."""

    samples_expected: int
    samples_present: int
    footprint_expected: int
    footprint_present: int
    missing: tuple[str, ...]
    """One clause per (method, length) with rows still to come."""
    not_measured: tuple[str, ...]
    """One sentence per kind of failure: where, and why."""
    mismatches: tuple[str, ...]
    """Footprint cells whose claimed saving NVML does not confirm."""
    disturbed: tuple[str, ...] = ()
    """Cells whose times are not to be trusted, one clause a reason."""

    @property
    def complete(self) -> bool:
        """Whether every row asked for is there, measured or not."""
        return not self.missing

    def sentences(self) -> list[str]:
        """Everything a reader must know before trusting a table; empty for a complete run without failures."""
        lines = []
        if self.missing:
            rows = f"{self.samples_present} of {self.samples_expected} sample rows"
            if self.footprint_expected:
                rows += f" and {self.footprint_present} of {self.footprint_expected} footprint rows"
            lines.append(f"Unfinished run: {rows} are there. Missing: {_listed(self.missing)}.")
        lines += [f"Not measured: {text}." for text in self.not_measured]
        lines += [f"Mismatch: {text}." for text in self.mismatches]
        lines += [f"Times are not to be trusted: {text}." for text in self.disturbed]
        return lines


@once
def coverage(run: Run) -> Coverage:
    """Compare the run with what its run.json asks for."""
    info = run.info
    asked = {length: sum(info.expected_samples(task, length) for task in info.tasks) for length in info.lengths_tokens}
    present = run.samples.groupby(["method_label", "length_tokens"]).size().to_dict()
    measured = set(zip(run.footprint["method_label"], run.footprint["length_tokens"], strict=True))
    missing, n_footprints = [], 0
    for label in (method.label for method in info.methods):
        for length in info.lengths_tokens:
            lacking = asked[length] - present.get((label, length), 0)
            if lacking > 0:
                missing.append(f"{lacking} of {asked[length]} samples of {label} at {length_text(length)}")
        for length in info.footprint_lengths_tokens:
            if not info.asks_footprint(label, length):
                continue
            n_footprints += 1
            if (label, length) not in measured:
                missing.append(f"the footprint of {label} at {length_text(length)}")
    mismatched = run.footprint[run.footprint["verdict"] == "mismatch"]
    return Coverage(
        samples_expected=sum(asked.values()) * len(info.methods),
        samples_present=len(run.samples),
        footprint_expected=n_footprints,
        footprint_present=len(run.footprint),
        missing=tuple(missing),
        not_measured=(
            *_failures(run.samples, "accuracy"),
            # A search for the longest context looks for lengths that do not fit.
            *(() if info.config.get("find_max") is True else _failures(run.footprint, "footprint")),
            *_failures(run.throughput, "throughput"),
        ),
        mismatches=tuple(
            f"NVML does not confirm the saving of {row['method_label']} at {length_text(row['length_tokens'])}"
            + (f" ({row['verdict_reason']})" if row["verdict_reason"] else "")
            for row in records(mismatched)
        ),
        disturbed=(*_disturbed(run.footprint), *_disturbed(run.throughput)),
    )


def _disturbed(frame: pd.DataFrame) -> list[str]:
    places: dict[str, list[str]] = {}
    for row in records(with_doubts(frame)):
        if row["time_doubts"]:
            places.setdefault(row["time_doubts"], []).append(
                f"{row['method_label']} at {length_text(row['length_tokens'])}"
            )
    return [f"{doubts} ({_listed(tuple(where))})" for doubts, where in places.items()]


def _failures(frame: pd.DataFrame, what: str) -> list[str]:
    failed = frame[frame["status"] != "ok"]
    sentences = []
    kinds: dict[tuple[str, str], Counter[tuple[str, int]]] = {}
    for row in records(failed):
        cells = kinds.setdefault((row["status"], row["reason"]), Counter())
        cells[row["method_label"], row["length_tokens"]] += 1
    for (status, reason), cells in kinds.items():
        places = tuple(
            f"{label} at {length_text(length)}" + (f" ({count} rows)" if count > 1 else "")
            for (label, length), count in cells.items()
        )
        sentences.append(f"{what} of {_listed(places)}: {status} ({shortened(reason.rstrip('.'), most=400)})")
    return sentences


def _listed(texts: tuple[str, ...]) -> str:
    shown = ", ".join(texts[:_LISTED])
    return shown if len(texts) <= _LISTED else f"{shown} and {len(texts) - _LISTED} more"
