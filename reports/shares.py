"""What methods asked for a share of dense's bytes came to: accuracy, bytes held and read, and time, one row a cell."""

from typing import Any

import pandas as pd

from kvscope.methods.options import READ_SHARE_OPTION, SHARE_OPTION
from kvscope.reports.cells import NOT_SEEN, pooled_answers, pooled_cells
from kvscope.reports.trust import with_doubts
from kvscope.results.comparisons import baseline_label
from kvscope.results.frames import Run, records
from kvscope.results.share import prompt_shares

ASKED_OF = {SHARE_OPTION: "held", READ_SHARE_OPTION: "read"}
"""Option -> what its share is of."""
_CELL = ["method_label", "length_tokens"]
_SCORES = ["n", "accuracy", "ci_low", "ci_high", "difference_to_dense", "difference_low", "difference_high"]
_TIMES = ["tpot_s", "tpot_p10_s", "tpot_p90_s", "step_backend", "time_doubts"]
SHARE_COLUMNS = [
    "length_tokens",
    "method_label",
    "setting",
    "asked_of",
    "asked_share",
    "held_of_dense",
    "read_of_dense",
    *_SCORES,
    "difference_note",
    *_TIMES,
    "reason",
]


def without_share(label: str) -> tuple[str, str | None, float | None]:
    """Return (a label without its share, what that is of, the share); None without one.

    A method's own option of that name is left where it holds no share.
    """
    name, _, tail = label.partition(":")
    kept, of, share = [], None, None
    for item in filter(None, tail.split(",")):
        key, _, value = item.partition("=")
        if key in ASKED_OF and (found := _share(value)) is not None:
            of, share = ASKED_OF[key], found
        else:
            kept.append(item)
    return f"{name}:{','.join(kept)}" if kept else name, of, share


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 < share <= 1 else None


def asks_for_shares(run: Run) -> bool:
    """Whether any method of a run was asked for a share of dense's bytes."""
    return any(without_share(method.label)[1] for method in run.info.methods)


def share_cells(run: Run, cells: pd.DataFrame) -> pd.DataFrame:
    """Every (length, method) of the accuracy pass: shares of dense's bytes, scores, and the time measured alone.

    Bytes are the ledger's means over the pooled prompts, of dense's for the same prompts. Times are those of the
    footprint pass, a process for each: steps of the accuracy pass are shared. ``reason`` says why scores are missing.

    Args:
        cells: of ``accuracy_cells(run)``.
    """
    answers = pooled_answers(run)
    held = prompt_shares(answers).rename("held_of_dense")
    reads = answers["bytes_read_per_step"].astype("float64").rename("read")
    means = pd.concat([answers[_CELL], held, reads], axis=1).groupby(_CELL).mean().reset_index()
    shares = {(row["method_label"], row["length_tokens"]): row for row in records(means)}
    dense_label = baseline_label(run.info)
    timed = {
        (row["method_label"], row["length_tokens"]): {key: row[key] for key in _TIMES}
        for row in records(with_doubts(run.footprint))
        if row["status"] == "ok"
    }
    found = []
    for score in records(pooled_cells(run, cells)):
        label, length = score["method_label"], score["length_tokens"]
        setting, of, share = without_share(label)
        row: dict[str, Any] = {"length_tokens": length, "method_label": label, "setting": setting, "asked_of": of}
        row |= {"asked_share": share, "difference_note": score["note"], **{key: score[key] for key in _SCORES}}
        row["reason"] = score["reason"] or (NOT_SEEN if run.info.served else "")
        mine, dense = shares.get((label, length)), shares.get((dense_label, length))
        if mine is not None:
            row["held_of_dense"] = mine["held_of_dense"]
            row["read_of_dense"] = None if dense is None else mine["read"] / dense["read"]
        row |= timed.get((label, length), {})
        found.append(row)
    frame = pd.DataFrame(found, columns=SHARE_COLUMNS)
    # By length, by what was asked for, then the more accurate: within a group bytes are alike.
    order = {None: 0, "held": 1, "read": 2}
    place = frame["asked_of"].map(lambda of: order[None if pd.isna(of) else of])
    return (
        frame.assign(_place=place)
        .sort_values(["length_tokens", "_place", "asked_share", "accuracy"], ascending=[True, True, True, False],
                     kind="stable", na_position="first")
        .drop(columns="_place")
        .reset_index(drop=True)
    )  # fmt: skip
