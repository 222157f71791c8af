"""The numbers behind tables and figures, one row a cell, units in the column names."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from kvscope.reports.answers import NOWHERE, Answers, Contexts, Places, by_cell
from kvscope.reports.trust import with_doubts
from kvscope.results.comparisons import (
    SCORE_COLUMNS,
    Comparison,
    answered,
    baseline_label,
    compare_methods,
    paired_tables,
    pooled,
)
from kvscope.results.frames import Run, once, records
from kvscope.results.run_schema import RunInfo
from kvscope.results.statistics import paired_difference

ALL_TASKS = "all tasks"
NOT_SEEN = "the model runs in a server, whose cache is not seen"
"""Why a served model has no bytes and no times."""

ACCURACY_COLUMNS = [
    "task",
    "method_label",
    "length_tokens",
    "n",
    "n_not_measured",
    "n_missing",
    "n_excluded",
    "accuracy",
    "ci_low",
    "ci_high",
    "interval",
    "n_pairs",
    "difference_to_dense",
    "difference_low",
    "difference_high",
    "difference_interval",
    "reason",
    "note",
]


@once
def accuracy_cells(run: Run) -> pd.DataFrame:
    """Accuracy per task (and pooled over those of every length, `all tasks`), method and length, with 95 % intervals.

    Fractions in [0, 1]; differences are paired, method minus dense. Prompts without a score (out of memory, failed) are
    counted in `n_not_measured`, never scored as wrong; those of excluded question types in
    `n_excluded` alone. `reason` says why prompts lack a score, `note` why a row lacks a difference.
    """
    info = run.info
    tasks = [ALL_TASKS, *info.tasks] if len(info.tasks) > 1 else list(info.tasks)
    pool = pooled_tasks(info)
    baseline = baseline_label(info)
    samples = pooled(run.samples, info)[SCORE_COLUMNS]
    excluded = run.samples.loc[run.samples.index.difference(samples.index), SCORE_COLUMNS]
    answers, mine, left_out = Answers(samples), _by_cell(pool, samples), _by_cell(pool, excluded)
    cells: dict[tuple[str, str, int], dict[str, object]] = {}
    tables = _paired(run)
    for method in info.methods:
        table = tables.get(method.label, samples.iloc[:0])
        both = _by_cell(pool, table.assign(method_label=method.label))
        contexts = Contexts(table["context_id"])
        for task in tasks:
            for length in info.lengths_tokens:
                asked = pool if task == ALL_TASKS else (task,)
                expected = sum(info.expected_samples(each, length) for each in asked)
                place = (task, method.label, length)
                n_excluded = len(left_out.get(place, NOWHERE))
                cells[place] = _accuracy(answers, mine.get(place, NOWHERE), expected, n_excluded=n_excluded)
                cells[place] |= _difference(
                    table,
                    both.get(place, NOWHERE),
                    contexts,
                    is_baseline=method.label == baseline,
                    comparable=baseline is not None,
                )
                cells[place]["n_excluded"] = n_excluded
    ordered = [
        {"task": task, "method_label": method.label, "length_tokens": length, **cells[task, method.label, length]}
        for task in tasks
        for method in info.methods
        for length in info.lengths_tokens
    ]
    return pd.DataFrame(ordered, columns=ACCURACY_COLUMNS).astype({"n_pairs": "Int64"})


@once
def comparisons(run: Run) -> list[Comparison]:
    """Every method against dense, in every scope, at the default margin."""
    return compare_methods(run.samples, info=run.info, tables=_paired(run))


@once
def _paired(run: Run) -> dict[str, pd.DataFrame]:
    """Every other method's pairs with dense, by its label: what accuracies and comparisons are both worked out of."""
    return paired_tables(pooled(run.samples, run.info), run.info)


def pooled_cells(run: Run, cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of all tasks together, of the one task where there is one; none where nothing was scored."""
    tasks = run.info.tasks
    return cells[cells["task"] == (tasks[0] if len(tasks) == 1 else ALL_TASKS)]


def pooled_tasks(info: RunInfo) -> tuple[str, ...]:
    """Return the tasks that are pooled: those asked for at every length, so that lengths differ in length alone.

    In a run put together from parts a task may be at some lengths only. Where none is at every length, all are pooled.
    """
    pool = tuple(task for task in info.tasks if all(info.expected_samples(task, n) for n in info.lengths_tokens))
    return pool or info.tasks


@once
def pooled_answers(run: Run) -> pd.DataFrame:
    """Return the answered prompts behind pooled accuracies: bytes shown beside those are means over the same ones.

    Those of a server are left out: nobody knows their bytes.
    """
    rows = answered(pooled(run.samples, run.info))
    return rows[rows["task"].isin(pooled_tasks(run.info)) & rows["ledger_reason"].isna()]


def pool_notes(info: RunInfo) -> tuple[str, ...]:
    """Return the sentence that says which tasks are not pooled, where there are such."""
    pool = pooled_tasks(info)
    if any(not info.expected_samples(task, length) for task in pool for length in info.lengths_tokens):
        return ("No task was asked for at every length: pooled accuracies of two lengths are over different tasks.",)
    left = [task for task in info.tasks if task not in pool]
    if not left:
        return ()
    return (
        f"Pooled over the tasks of every length ({', '.join(pool)}); asked for at some lengths only, and in no pooled "
        f"accuracy: {', '.join(left)}.",
    )


def _by_cell(pool: tuple[str, ...], frame: pd.DataFrame) -> dict[tuple[str, str, int], Places]:
    """Places of rows by (task, method, length) and by (all tasks of the pool, method, length)."""
    found: dict[tuple[str, str, int], Places] = by_cell(frame, ["task", "method_label", "length_tokens"])
    inside = np.flatnonzero(frame["task"].isin(pool).to_numpy(dtype=bool))
    whole = by_cell(frame.iloc[inside], ["method_label", "length_tokens"])
    return found | {(ALL_TASKS, label, length): inside[places] for (label, length), places in whole.items()}


def _accuracy(answers: Answers, rows: Places, asked: int, *, n_excluded: int) -> dict[str, object]:
    expected = asked - n_excluded
    reasons = answers.failures(rows)
    if len(rows) < expected:
        reasons.append("not run yet")
    elif not asked:
        reasons.append("not asked for")
    elif not len(rows):
        reasons.append("every question type is excluded from pooled scores")
    cell = {"n_missing": max(0, expected - len(rows)), "reason": "; ".join(reasons)}
    return cell | answers.accuracy(rows)


def _difference(
    table: pd.DataFrame, common: Places, contexts: Contexts, *, is_baseline: bool, comparable: bool
) -> dict[str, object]:
    if not comparable:
        return {"note": "the run has no dense to compare with"}
    if is_baseline:
        return {"note": "is the baseline"}
    if not len(common):
        return {"note": "dense and this method answered no common prompt"}
    paired = paired_difference(
        table["score_method"].to_numpy(float)[common],
        table["score_baseline"].to_numpy(float)[common],
        clusters=contexts.clusters(common),
    )
    return {
        "note": "",
        "n_pairs": paired.n_pairs,
        "difference_to_dense": paired.difference.mean,
        "difference_low": paired.difference.low,
        "difference_high": paired.difference.high,
        "difference_interval": paired.difference.kind,
    }


@dataclass(frozen=True)
class MemorySource:
    """Where the bytes of the memory figures come from: one source for all points, and the words that say so."""

    kind: Literal["nvml", "ledger"]
    axis: str
    caption: str


def memory_source(run: Run) -> MemorySource:
    """NVML when every measured footprint cell has it; else the ledger for all, with the reason in words."""
    ok = run.footprint[run.footprint["status"] == "ok"]
    unread = ok[ok["kv_nvml_bytes"].isna()]
    if len(ok) and not len(unread):
        return MemorySource(
            "nvml",
            "KV cache on the GPU (NVML)",
            "Bytes are NVML's reading of the process: decode peak minus the baseline without a KV cache.",
        )
    if not len(ok):
        why = "No footprint cell was measured"
    else:
        reasons = ", ".join(dict.fromkeys(str(reason) for reason in unread["nvml_reason"]))
        share = "" if len(unread) == len(ok) else f" in {len(unread)} of {len(ok)} cells"
        why = f"NVML was not measured{share}: {reasons}"
    return MemorySource(
        "ledger",
        "KV cache on the device (ledger, not NVML)",
        f"Bytes are the ledger's: exact sizes of the live cache tensors, metadata included. {why}.",
    )


def step_note(run: Run) -> str:
    """Say whose decode steps were no CUDA graph where others' were; empty where all ran alike, or it is not known."""
    timed = run.footprint[(run.footprint["status"] == "ok") & run.footprint["step_backend"].notna()]
    graph = timed["step_backend"] == "cuda graph"
    if not graph.any() or graph.all():
        return ""
    labels = ", ".join(dict.fromkeys(timed[~graph]["method_label"]))
    return (
        f"Steps were replays of a CUDA graph, but eager for {labels}: there the launch of every kernel counts, too, so "
        "times of the two kinds do not compare methods."
    )


def footprint_cells(run: Run) -> pd.DataFrame:
    """Every footprint cell asked for or present: the row's columns, and `held_bytes`, `predicted_bytes`, `time_doubts`.

    `held_bytes` is the ledger's total on the device: keys, values and metadata. `time_doubts` says why a time is not to
    be trusted, empty where nothing speaks against it. A cell that is still to come has status
    `missing` and a reason.
    """
    order = {method.label: place for place, method in enumerate(run.info.methods)}
    frame = run.footprint.copy()
    frame["held_bytes"] = frame["resident_kv_bytes"] + frame["metadata_bytes"]
    frame["predicted_bytes"] = frame["predicted_kv_bytes"] + frame["predicted_metadata_bytes"]
    there = set(zip(frame["method_label"], frame["length_tokens"], strict=True))
    absent = pd.DataFrame(
        [
            {
                "method_label": method.label,
                "method": method.name,
                "length_tokens": length,
                "status": "missing",
                "reason": "not run yet",
                "saving_kind": method.saving_kind,
            }
            for method in run.info.methods
            for length in run.info.footprint_lengths_tokens
            if (method.label, length) not in there and run.info.asks_footprint(method.label, length)
        ]
    )
    if len(absent):
        absent = absent.reindex(columns=frame.columns).astype(frame.dtypes.to_dict())
        frame = pd.concat([frame, absent], ignore_index=True) if len(frame) else absent
    planned = pd.Series(
        [_planned(run).get(key) for key in zip(frame["method_label"], frame["length_tokens"], strict=True)],
        index=frame.index,
        dtype="Int64",
    )
    frame["predicted_bytes"] = frame["predicted_bytes"].fillna(planned)
    place = frame["method_label"].map(lambda label: order.get(label, len(order)))
    return (
        with_doubts(frame)
        .assign(_place=place)
        .sort_values(["_place", "length_tokens"], kind="stable")
        .drop(columns="_place")
        .reset_index(drop=True)
    )


def predicted_cells(run: Run) -> pd.DataFrame:
    """Predicted device bytes per (method, length): the plan's, and where it is silent the footprint rows' own."""
    found: dict[tuple[str, int], int] = {}
    for row in records(footprint_cells(run)):
        if row["predicted_bytes"] is not None:
            found[row["method_label"], row["length_tokens"]] = row["predicted_bytes"]
    for cell in run.info.plan:
        if cell.predicted_kv_bytes is not None:
            found[cell.method_label, cell.length_tokens] = cell.predicted_kv_bytes + (
                cell.predicted_metadata_bytes or 0
            )
    rows = [(label, length, value) for (label, length), value in found.items()]
    frame = pd.DataFrame(rows, columns=["method_label", "length_tokens", "predicted_bytes"])
    return frame.sort_values(["method_label", "length_tokens"], ignore_index=True)


def answered_cells(run: Run) -> pd.DataFrame:
    """Device bytes per (method, length) by the ledger, mean over the pooled prompts that were answered."""
    rows = pooled_answers(run)
    held = (rows["resident_kv_bytes"] + rows["metadata_bytes"]).astype("float64").rename("answered_bytes")
    key = ["method_label", "length_tokens"]
    return pd.concat([rows[key], held], axis=1).groupby(key)["answered_bytes"].mean().reset_index()


def _planned(run: Run) -> dict[tuple[str, int], int]:
    return {
        (cell.method_label, cell.length_tokens): cell.predicted_kv_bytes + (cell.predicted_metadata_bytes or 0)
        for cell in run.info.plan
        if cell.predicted_kv_bytes is not None
    }
