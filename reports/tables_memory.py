"""Tables of bytes and times: the footprint of every cell, and what each method keeps and saves."""

from typing import Any

import pandas as pd

from kvscope.reports.cells import NOT_SEEN, footprint_cells, pooled_answers, step_note
from kvscope.reports.table_parts import Notes, Table, excluded_notes
from kvscope.reports.trust import time_doubts
from kvscope.reports.units import (
    ByteUnit,
    byte_unit,
    length_text,
    measured,
    milliseconds,
    percent,
    points,
    with_interval,
)
from kvscope.results.comparisons import baseline_label
from kvscope.results.frames import Run, records
from kvscope.results.memory_rows import NVML_COLUMNS
from kvscope.results.run_schema import MethodInfo


def footprint_table(run: Run) -> Table:
    """Bytes and times by method and length, one row a footprint cell."""
    cells = footprint_cells(run)
    unit = byte_unit(cells["dense_kv_bytes"].dropna().tolist() + cells["predicted_bytes"].dropna().tolist())
    nvml = bool(cells[list(NVML_COLUMNS)].notna().any(axis=None))
    notes = Notes()
    # Rows of real prefills and trained or free choices say so by having no label.
    labels = bool((cells["prefill"] == "synthetic").any() or (cells["selection"] == "synthetic").any())
    rows = [_footprint_text(row, unit, nvml=nvml, labels=labels, notes=notes) for row in records(cells)]
    extra = []
    if len(cells) and not nvml:
        reasons = list(dict.fromkeys(cells["nvml_reason"].dropna())) or ["no cell has run to its end"]
        extra.append(f"No NVML columns: not measured ({'; '.join(reasons)}). All bytes are the ledger's.")
    if step_note(run):
        extra.append(step_note(run))
    caption = (
        "One fresh process per row. Resident KV, metadata and host bytes are the ledger's (exact sizes of live "
        "tensors, mean over decode steps); read a step: the bytes of keys, values and metadata that one decode step "
        "reads, counted. NVML is the driver's reading of the process. TTFT: time to first token; TPOT: median time per "
        "output token, batch 1, with the steps' 10th and 90th percentile where they were recorded; "
        "after a synthetic prefill TTFT holds no prefill. Torch peaks, host memory and FLOPs "
        "are in the CSV."
    )
    text = pd.DataFrame(rows) if rows else pd.DataFrame(columns=["method", "length (tokens)", "status"])
    return Table("footprint", "Footprint by method and length", caption, cells, text, (*notes.lines(), *extra))


def _footprint_text(row: dict[str, Any], unit: ByteUnit, *, nvml: bool, labels: bool, notes: Notes) -> dict[str, str]:
    why = None if row["status"] == "ok" else f"{row['status']}: {row['reason']}"

    def amount(column: str, reason: str | None) -> str:
        value = row[column]
        return unit.text(value) if value is not None else notes.mark(why or reason or "no reason given")

    share = (
        row["held_bytes"] / row["dense_kv_bytes"] if row["held_bytes"] is not None and row["dense_kv_bytes"] else None
    )
    text = {
        "method": row["method_label"],
        "length (tokens)": length_text(row["length_tokens"]),
        "status": row["status"],
        f"resident KV ({unit.name})": amount("resident_kv_bytes", None),
        f"metadata ({unit.name})": amount("metadata_bytes", None),
        "of dense (%)": percent(share) if share is not None else notes.mark(why or "no dense size"),
        f"read a step ({unit.name})": amount("bytes_read_per_step", None),
        f"host KV ({unit.name})": amount("host_kv_bytes", None),
        f"predicted ({unit.name})": unit.text(row["predicted_bytes"])
        if row["predicted_bytes"] is not None
        else notes.mark("no prediction"),
    }
    if nvml:
        text |= {
            f"KV by NVML ({unit.name})": amount("kv_nvml_bytes", row["nvml_reason"]),
            f"prefill peak NVML ({unit.name})": amount("prefill_peak_nvml_bytes", row["nvml_reason"]),
            f"decode peak NVML ({unit.name})": amount("decode_peak_nvml_bytes", row["nvml_reason"]),
        }
    text |= {
        "TTFT (s)": notes.mark(why or "no time")
        if row["ttft_s"] is None
        else notes.doubted(measured(row["ttft_s"]), row["time_doubts"]),
        "TPOT (ms)": notes.mark(why or "no time") if row["tpot_s"] is None else _tpot_text(row, notes),
        "verdict": row["verdict"] or "not run yet",
    }
    if labels:
        text |= {"prefill": row["prefill"] or "not run yet", "selection": row["selection"] or "not run yet"}
    return text


def _tpot_text(row: dict[str, Any], notes: Notes) -> str:
    return notes.doubted(milliseconds(row["tpot_s"], row["tpot_p10_s"], row["tpot_p90_s"]), row["time_doubts"])


READ_COLUMNS = ("bytes_read_per_step", "attention_flops_per_step")
ANSWER_COLUMNS = [
    "method_label", "length_tokens", "resident_kv_bytes", "metadata_bytes", "dense_kv_bytes", "host_kv_bytes",
    *READ_COLUMNS,
]  # fmt: skip
FOOTPRINT_COLUMNS = (
    "kv_nvml_bytes",
    "host_kv_bytes",
    "tpot_s",
    "tpot_p10_s",
    "tpot_p90_s",
    "verdict",
    *READ_COLUMNS,
)
DIFFERENCE_COLUMNS = ("difference_to_dense", "difference_low", "difference_high")
STAYS_COLUMNS = [
    "method_label",
    "stays",
    "saves",
    "saving_kind",
    "length_tokens",
    "held_bytes",
    "held_of_dense",
    "bytes_from",
    "bytes_read_per_step",
    "read_of_dense",
    "attention_flops_per_step",
    "kv_nvml_bytes",
    "host_kv_bytes",
    "tpot_s",
    "tpot_p10_s",
    "tpot_p90_s",
    "time_doubts",
    "verdict",
    "accuracy",
    "ci_low",
    "ci_high",
    "n",
    "difference_to_dense",
    "difference_low",
    "difference_high",
    "difference_note",
    "not_measured",
    "source",
]


def stays_table(run: Run, cells: pd.DataFrame) -> Table:
    """What stays on the GPU and what that saves, one row a method, with bytes, time and accuracy of one setting.

    All measured columns belong to the longest length at which any method was measured, so that no row joins the bytes
    of one setting with the accuracy of another.
    """
    timed, scored = (frame.loc[frame["status"] == "ok", "length_tokens"] for frame in (run.footprint, run.samples))
    lengths = timed if len(timed) else scored
    length = int(lengths.max()) if len(lengths) else None
    data = stays_data(run, cells, length)
    unit = byte_unit(data["held_bytes"].tolist())
    notes = Notes()
    nvml = bool(data["kv_nvml_bytes"].notna().any())
    text = pd.DataFrame([_stays_text(row, unit, nvml=nvml, notes=notes) for row in records(data)])
    where = "nothing measured yet" if length is None else f"measured at {length_text(length)} tokens"
    caption = (
        f"What each method keeps on the GPU and what that saves; {where}: bytes, time and accuracy of one setting. "
        "Bytes are the ledger's, keys, values and metadata; 100 % is what dense holds, or reads in one decode step, at "
        "the same length. Accuracy is pooled over tasks, with its 95 % interval; minus dense: the paired difference on "
        "the prompts both answered. TPOT: median time per output token, with the steps' 10th and 90th percentile "
        "where they were recorded. Verdict: whether NVML confirms the claimed saving."
    )
    if not nvml and len(timed):
        reasons = run.footprint.loc[timed.index, "nvml_reason"].dropna()
        caption += f" NVML was not measured: {', '.join(dict.fromkeys(reasons))}."
    lines = (*notes.lines(), *excluded_notes(run.info))
    return Table("stays_and_saves", "What stays, what it saves", caption, data, text, lines)


def stays_data(run: Run, cells: pd.DataFrame, length: int | None) -> pd.DataFrame:
    """One row a method with the bytes, times and accuracy of one length."""
    pooled = cells[cells["task"] == cells["task"].iloc[0]] if len(cells) else cells
    # Of many columns each costs as much as a row: rows of other lengths, and columns not asked for, are left out once.
    footprints, scores = (_by_method(frame[frame["length_tokens"] == length]) for frame in (run.footprint, pooled))
    answers = pooled_answers(run)[ANSWER_COLUMNS]
    answers = answers[answers["length_tokens"] == length]
    rows = [
        _stays_cell(run, method, length, footprints=footprints, answers=answers, scores=scores.get(method.label))
        for method in run.info.methods
    ]
    return pd.DataFrame(rows, columns=STAYS_COLUMNS).astype(
        {"length_tokens": "Int64", "kv_nvml_bytes": "Int64", "host_kv_bytes": "Int64", "n": "Int64"}
    )


def _by_method(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    return {row["method_label"]: row for row in records(rows)}


def _stays_cell(
    run: Run,
    method: MethodInfo,
    length: int | None,
    *,
    footprints: dict[str, dict[str, Any]],
    answers: pd.DataFrame,
    scores: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return one row; what it is given is of that length alone."""
    cell: dict[str, Any] = {
        "method_label": method.label,
        "stays": method.stays,
        "saves": method.saves,
        "saving_kind": method.saving_kind,
        "source": method.source,
        "length_tokens": length,
        "n": 0,
    }
    reasons: list[str] = []
    baseline = baseline_label(run.info)
    found = footprints.get(method.label)
    ok = answers[answers["method_label"] == method.label]
    if found is not None and found["status"] == "ok":
        held = found["resident_kv_bytes"] + found["metadata_bytes"]
        dense = footprints.get(baseline or "")
        dense_reads = dense["bytes_read_per_step"] if dense is not None and dense["status"] == "ok" else None
        cell |= {
            "held_bytes": held,
            "held_of_dense": _share(held, found["dense_kv_bytes"]),
            "read_of_dense": _share(found["bytes_read_per_step"], dense_reads),
            "bytes_from": "footprint",
        }
        cell |= {key: found[key] for key in FOOTPRINT_COLUMNS}
        cell["time_doubts"] = time_doubts(found)
        if found["kv_nvml_bytes"] is None:
            reasons.append(f"NVML: {found['nvml_reason']}")
    elif found is not None:
        reasons.append(f"{found['status']}: {found['reason']}")
    else:
        planned = length is not None and run.info.asks_footprint(method.label, length)
        absent = NOT_SEEN if run.info.served else "no footprint cell was asked for at this length"
        reasons.append("the footprint was not run yet" if planned else absent)
        if len(ok):
            held = float((ok["resident_kv_bytes"] + ok["metadata_bytes"]).mean())
            cell |= {"held_bytes": held, "held_of_dense": _share(held, float(ok["dense_kv_bytes"].mean()))}
            cell |= {"bytes_from": "samples", "host_kv_bytes": round(float(ok["host_kv_bytes"].mean()))}
            cell |= {key: float(ok[key].mean()) for key in READ_COLUMNS}
            cell |= {"read_of_dense": _share(cell["bytes_read_per_step"], _mean_reads(answers, baseline))}
    if scores is not None:
        cell |= {key: scores[key] for key in ("accuracy", "ci_low", "ci_high", "n", *DIFFERENCE_COLUMNS)}
        cell["difference_note"] = scores["note"]
        if scores["accuracy"] is None:
            reasons.append(f"accuracy: {scores['reason'] or 'no prompt was asked for'}")
    return {**cell, "not_measured": "; ".join(reasons)}


def _mean_reads(answers: pd.DataFrame, label: str | None) -> float | None:
    """Mean bytes a step of dense reads; None where dense was not measured."""
    dense = answers[answers["method_label"] == label]
    return float(dense["bytes_read_per_step"].mean()) if len(dense) else None


def _share(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def _stays_text(row: dict[str, Any], unit: ByteUnit, *, nvml: bool, notes: Notes) -> dict[str, str]:
    reasons = row["not_measured"].split("; ")

    def value(column: str, shown: str) -> str:
        if row[column] is not None:
            return shown
        named = {"kv_nvml_bytes": "NVML: ", "accuracy": "accuracy: "}.get(column)
        fitting = [reason for reason in reasons if named and reason.startswith(named)] or reasons
        return notes.mark(fitting[0].removeprefix(named or "") or "no prompt was asked for")

    def amount(column: str) -> str:
        return value(column, unit.text(row[column] or 0))

    accuracy = "" if row["accuracy"] is None else with_interval(row["accuracy"], row["ci_low"], row["ci_high"])
    text = {
        "method": row["method_label"],
        f"resident ({unit.name})": amount("held_bytes"),
        "of dense (%)": value("held_of_dense", percent(row["held_of_dense"] or 0)),
        f"read a step ({unit.name})": amount("bytes_read_per_step"),
        "of dense's reads (%)": notes.mark("dense was not measured here")
        if row["read_of_dense"] is None and row["bytes_read_per_step"] is not None
        else value("read_of_dense", percent(row["read_of_dense"] or 0)),
    }
    if nvml:
        text[f"KV by NVML ({unit.name})"] = amount("kv_nvml_bytes")
    return text | {
        f"host ({unit.name})": amount("host_kv_bytes"),
        "TPOT (ms)": value("tpot_s", "") if row["tpot_s"] is None else _tpot_text(row, notes),
        "verdict": value("verdict", row["verdict"] or ""),
        "accuracy (%)": value("accuracy", f"{accuracy} n={row['n']}"),
        "minus dense (points)": notes.mark(row["difference_note"] or "no prompt was asked for")
        if row["difference_to_dense"] is None
        else with_interval(row["difference_to_dense"], row["difference_low"], row["difference_high"], text=points),
        "stays on the GPU": row["stays"],
        "saves": row["saves"],
        "source": row["source"],
    }
