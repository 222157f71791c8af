"""FlashMemory's Table 1 row for row: what the paper printed beside what was measured, and how many prompts it took."""

from typing import Any

import pandas as pd

from kvscope.methods.lsa import printed as paper
from kvscope.reports.claim_rows import CellRows, cell_rows
from kvscope.reports.table_parts import Table
from kvscope.reports.units import length_text, percent, points, with_interval
from kvscope.results.frames import records
from kvscope.results.reproduction import TABLE_1_ROLES, Loaded

PAPER_COLUMNS = ("dense", "lsa", "recency", "random")
ROLE_WORDS = {
    "ruler": "RULER",
    "longbench_v2": "long_qa, four-way choices, as LongBench-v2",
    "longmemeval": "long_qa, its other types, as LongMemEval",
    "mrcr": "long_qa_mrcr, as MRCR",
    "nothing_needed": "long_qa_no_context, as Table 2",
    "footprint": "memory by NVML",
    "throughput": "throughput",
    "sweep": "sweep",
}
_KEYS = [
    "row", "paper_tokens", "length_tokens", "what", "method", "method_label", "n", "accuracy", "ci_low", "ci_high",
    "difference_to_dense", "difference_low", "difference_high", "lost", "won", "share", "share_kv", "paper_accuracy",
    "paper_share",
]  # fmt: skip


def table_1(loaded: Loaded) -> Table:
    """Return one row a (row of the paper, method): accuracy, difference and share, with the paper's beside them."""
    data = pd.DataFrame(table_1_records(loaded), columns=_KEYS).astype(
        {"paper_tokens": "Int64", "length_tokens": "Int64", "n": "Int64", "lost": "Int64", "won": "Int64"}
    )
    text = pd.DataFrame([_text(row) for row in records(data)])
    plan = loaded.plan
    caption = (f"{plan.scale_sentence} " if plan.scaled else "") + (
        f"Rows of the paper's Table 1 on {plan.model}. lsa, recency and random keep the last {plan.window_tokens:,} "
        "tokens; methods `at lsa's bytes` were given lsa's share of bytes in a pilot of other prompts. Shares are the "
        "ledger's bytes over dense's for the same prompt, mean over prompts: KV, metadata and index keys; `KV alone` "
        "leaves out what the paper's printed figures leave out. Accuracy has its 95 % interval."
    )
    return Table("table_1", "Table 1, row for row", caption, data, text)


def table_1_records(loaded: Loaded) -> list[dict[str, Any]]:
    """Return the rows of the table as plain values, fractions in [0, 1]; None where nothing is measured."""
    if "table_1" not in loaded.memo:
        loaded.memo["table_1"] = _records(loaded)
    found: list[dict[str, Any]] = loaded.memo["table_1"]
    return found


def _records(loaded: Loaded) -> list[dict[str, Any]]:
    found = []
    printed = {row.label: row for row in paper.TABLE_1}
    for cell, run in loaded.of_role(*TABLE_1_ROLES):
        row = printed[str(cell.paper_row)]
        rows = None if run is None else cell_rows(loaded, cell, run)
        for name, label in cell.methods.items():
            values = {
                "row": row.label, "paper_tokens": row.tokens, "length_tokens": cell.lengths_tokens[0],
                "what": ROLE_WORDS[cell.role], "method": name, "method_label": label,
                "n": 0 if rows is None else rows.n(name),
            }  # fmt: skip
            if name in PAPER_COLUMNS:
                values["paper_accuracy"] = row.accuracies_percent[name] / 100
                values["paper_share"] = getattr(row, f"{name}_gb") / row.dense_gb
            if rows is not None:
                values |= _measured(rows, name)
            found.append(values)
    return found


def _measured(rows: CellRows, name: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    accuracy = rows.accuracy(name)
    if accuracy is not None:
        values |= {"accuracy": accuracy.mean, "ci_low": accuracy.low, "ci_high": accuracy.high}
    paired = None if name == "dense" else rows.difference(name)
    if paired is not None:
        values |= {
            "difference_to_dense": paired.difference.mean, "difference_low": paired.difference.low,
            "difference_high": paired.difference.high, "lost": paired.lost, "won": paired.won,
        }  # fmt: skip
    for key, accounting in (("share", "all"), ("share_kv", "kv")):
        share = rows.share(name, accounting=accounting)
        values[key] = None if share is None else share.mean
    return values


def method_words(name: str) -> str:
    """Return what a method of a reproduction is called."""
    return f"{name.removesuffix('_equal')} at lsa's bytes" if name.endswith("_equal") else name


def _text(row: dict[str, Any]) -> dict[str, str]:
    def share(value: float | None) -> str:
        return "-" if value is None else percent(value)

    return {
        "row": row["row"],
        "length": length_text(row["length_tokens"]),
        "method": method_words(row["method"]),
        "n": str(row["n"]),
        "accuracy (%)": "not run" if row["accuracy"] is None
        else with_interval(row["accuracy"], row["ci_low"], row["ci_high"]),
        "paper (%)": share(row["paper_accuracy"]),
        "minus dense (points)": "-" if row["difference_to_dense"] is None
        else with_interval(row["difference_to_dense"], row["difference_low"], row["difference_high"], text=points),
        "lost, won": "-" if row["lost"] is None else f"{row['lost']}, {row['won']}",
        "share (%)": share(row["share"]),
        "KV alone (%)": share(row["share_kv"]),
        "paper's share (%)": share(row["paper_share"]),
    }  # fmt: skip


def prompts_table(loaded: Loaded) -> Table:
    """Return how many prompts each cell was to have, fixed before, and how many there are."""
    data = []
    for cell in loaded.plan.cells:
        run = loaded.runs.get(cell.name)
        there = 0 if run is None or not cell.scored else len(run.samples.groupby(["task", "length_tokens", "sample"]))
        data.append(
            {
                "cell": cell.name, "what": ROLE_WORDS[cell.role],
                "lengths_tokens": ", ".join(map(length_text, cell.lengths_tokens)), "tasks": ", ".join(cell.tasks),
                "prompts": cell.prompts if cell.scored else 0, "prompts_there": there,
                "seeds": ", ".join(map(str, cell.seeds)), "left_out": cell.left_out or "",
            }
        )  # fmt: skip
    frame = pd.DataFrame(data)
    text = pd.DataFrame(
        [
            {
                "cell": row["cell"], "what": row["what"], "length": row["lengths_tokens"],
                "prompts": f"{row['prompts_there']} of {row['prompts']}" if row["prompts"] else "-",
                "seeds": row["seeds"], "left out": row["left_out"] or "-",
            }
            for row in data
        ]
    )  # fmt: skip
    caption = "Prompts of each cell, fixed before anything was measured. Tasks of a cell have as many prompts each."
    plan = loaded.plan
    if plan.scaled and plan.profile == "lsa":
        caption = f"{plan.scale_sentence} {caption}"
    return Table("prompts", "Cells and prompts", caption, frame, text)
