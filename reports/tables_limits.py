"""Tables of limits: the longest context of each method, and the largest batch with its tokens a second."""

from typing import Any

import pandas as pd

from kvscope.reports.table_parts import Notes, Table
from kvscope.reports.trust import with_doubts
from kvscope.reports.units import ByteUnit, byte_unit, bytes_text, length_text, measured
from kvscope.results.comparisons import baseline_label
from kvscope.results.frames import Run, records

BOUNDS = {
    "device": "the GPU's memory",
    "device_budget": "the device budget",
    "host": "host memory (the mirror)",
    "model_maximum": "the model's maximum",
    "limit": "nothing: the search stopped here",
    "none_fits": "not even the shortest length fits",
    "failed": "a try failed",
    "max_batch": "where the search stopped",
}


def limit_tables(run: Run) -> list[Table]:
    """The tables of the searches that the run made; none in an ordinary run."""
    tables = []
    if len(run.max_context):
        tables.append(max_context_table(run))
    if len(run.throughput):
        tables.append(throughput_table(run))
    return tables


def max_context_table(run: Run) -> Table:
    """Longest context by method, what bounds it, and its ratio to dense."""
    dense = run.max_context[run.max_context["method_label"] == baseline_label(run.info)]["longest_tokens"]
    whole = int(dense.iloc[0]) if len(dense) and dense.iloc[0] else None
    data = run.max_context.copy()
    data["times_dense"] = data["longest_tokens"].astype("float64") / whole if whole else None
    notes = Notes()
    rows = [
        {
            "method": row["method_label"],
            "longest context (tokens)": f"{row['longest_tokens']:,}",
            "of dense": notes.mark("dense has no longest context in this run")
            if row["times_dense"] is None
            else f"{row['times_dense']:.2f}x",
            "next length tried that does not fit": "none"
            if row["shortest_failing_tokens"] is None
            else f"{row['shortest_failing_tokens']:,}",
            "bound by": BOUNDS[row["bound"]],
            "device bytes allowed": "the whole card"
            if row["gpu_budget_bytes"] is None
            else bytes_text(row["gpu_budget_bytes"]),
        }
        for row in records(data)
    ]
    caption = (
        "Longest context that was measured to fit, prompt and decode steps, by bisection: a fresh process a try, pages "
        "of random values instead of a prefill (prefill = synthetic). The device bytes allowed hold CUDA context and "
        "weights, too."
    )
    return Table("max_context", "Longest context by method", caption, data, pd.DataFrame(rows), notes.lines())


def throughput_table(run: Run) -> Table:
    """Largest batch and decode tokens a second by method and length."""
    data = with_doubts(run.throughput)
    data["held_bytes"] = data["resident_kv_bytes"] + data["metadata_bytes"]
    baseline = baseline_label(run.info)
    whole = {
        row["length_tokens"]: row["tokens_per_s"]
        for row in records(data)
        if row["method_label"] == baseline and row["tokens_per_s"] is not None
    }
    notes = Notes()
    unit = byte_unit(data["held_bytes"].dropna().tolist())
    rows = [_throughput_text(row, whole.get(row["length_tokens"]), unit, notes) for row in records(data)]
    if data["step_p10_s"].notna().any():
        for text, row in zip(rows, records(data), strict=True):
            text["step: mean, 10th to 90th percentile (ms)"] = _step_text(row, notes)
    caption = (
        "Decode throughput of the largest batch that fits: one forward of the model a step for the whole batch, "
        "attention sequence by sequence, refreshes of the resident set included. Pages of random values instead of a "
        "prefill (prefill = synthetic); the sequences of a method that recalls share one host mirror."
    )
    remarks = (*notes.lines(), *_eager_notes(data))
    return Table("throughput", "Largest batch and tokens per second", caption, data, pd.DataFrame(rows), remarks)


def _eager_notes(data: pd.DataFrame) -> tuple[str, ...]:
    """Why steps were eager, one remark a reason; and that both kinds do not compare, where there are both."""
    ok = data[data["status"] == "ok"]
    backends = ok["step_backend"].fillna("eager")
    reasons: dict[str, list[str]] = {}
    for label, backend in zip(ok["method_label"], backends, strict=True):
        kind, _, reason = backend.partition(": ")
        if kind == "eager" and reason:
            reasons.setdefault(reason, []).append(label)
    found = [f"Eager steps of {', '.join(dict.fromkeys(labels))}: {reason}." for reason, labels in reasons.items()]
    if (backends == "cuda graph").any() and not (backends == "cuda graph").all():
        found.append(
            "The launch of every kernel counts in an eager step: speeds of the two kinds do not compare methods."
        )
    return tuple(found)


def _step_text(row: dict[str, Any], notes: Notes) -> str:
    if row["step_s"] is None:
        return notes.mark(f"{row['status']}: {row['reason']}")
    mean = notes.doubted(measured(1000 * row["step_s"]), row["time_doubts"])
    if row["step_p10_s"] is None or row["step_p90_s"] is None:
        return mean
    return f"{mean}, {measured(1000 * row['step_p10_s'])} to {measured(1000 * row['step_p90_s'])}"


def _throughput_text(
    row: dict[str, Any], dense_tokens_per_s: float | None, unit: ByteUnit, notes: Notes
) -> dict[str, str]:
    why = f"{row['status']}: {row['reason']}"
    known = row["tokens_per_s"] is not None
    return {
        "method": row["method_label"],
        "length (tokens)": length_text(row["length_tokens"]),
        "largest batch": str(row["largest_batch"]) if known else notes.mark(why),
        "bound by": BOUNDS[row["batch_bound"]] if known else notes.mark(why),
        f"KV of the batch ({unit.name})": unit.text(row["held_bytes"])
        if row["held_bytes"] is not None
        else notes.mark(why if not known else "the row does not say"),
        "tokens/s": notes.doubted(measured(row["tokens_per_s"]), row["time_doubts"]) if known else notes.mark(why),
        "of dense": f"{row['tokens_per_s'] / dense_tokens_per_s:.2f}x"
        if known and dense_tokens_per_s
        else notes.mark(why if not known else "dense has no throughput at this length"),
        "tokens/s at batch 1": notes.doubted(measured(row["tokens_per_s_at_1"]), row["time_doubts"])
        if known and row["tokens_per_s_at_1"] is not None
        else notes.mark(why if not known else "not timed"),
        "of its floor": f"{100 * row['floor_s'] / row['step_s']:.0f} %"
        if known and row["floor_s"] is not None
        else notes.mark(why if not known else "the row does not say"),
        "steps": (row["step_backend"] or "eager").partition(":")[0] if known else notes.mark(why),
        "selection": row["selection"],
    }
