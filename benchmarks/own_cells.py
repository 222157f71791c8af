"""Two models' dense answers to the same prompts, cell by cell: what other weights of one tokenizer win and lose.

    kvscope run --model reference -m dense --task vt --task cwe --length 4k --samples 200 --no-footprint --out old
    kvscope run --model FOLDER -m dense --task vt --task cwe --length 4k --samples 200 --no-footprint --out new
    python benchmarks/own_cells.py old new [--out cells.json]

Prints a table of every (task, length): each model's accuracy, new minus old in points with its 95 % interval (paired),
and whether the loss is within what is allowed: 0.5 points to 128K, 2 beyond. It exits 1 where an estimate is not.
``kvscope compare old new`` has the same by length and by task. Prompts are paired by the hash of their text.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from measure import ended

import kvscope
from kvscope.errors import UsageError
from kvscope.results.comparisons import compare_tables
from kvscope.results.joining import join
from kvscope.units import format_length

NEAR_TOKENS = 131_072
ALLOWED_NEAR_POINTS, ALLOWED_FAR_POINTS = 0.5, 2.0
"""Most that a cell may lose up to ``NEAR_TOKENS``, and beyond."""


def allowed_points(length_tokens: int) -> float:
    """Return the most points that a cell of a length may lose."""
    return ALLOWED_NEAR_POINTS if length_tokens <= NEAR_TOKENS else ALLOWED_FAR_POINTS


def compare(old: "kvscope.Run", new: "kvscope.Run", *, method: str = "dense") -> dict[str, Any]:
    """Return every cell of two runs of one method as plain values, and what is in no cell.

    Raises:
        UsageError: a run lacks the method, or no prompt is in both.
    """
    joined = join(old, new, (method, method))
    (table,) = joined.tables
    if not len(table):
        raise UsageError(f"No prompt was answered by {method} in both runs: run the same tasks, lengths and seed.")
    groups = [(key, part) for key, part in table.groupby(["length_tokens", "task"], sort=True)]
    cells = [_cell(task, [length], part) for (length, task), part in groups]
    near = table["length_tokens"] <= NEAR_TOKENS
    pools = [
        _cell("all", sorted(set(part["length_tokens"])), part) for part in (table[near], table[~near]) if len(part)
    ]
    return {
        "old": {"model": old.info.model, "identity": old.info.identity},
        "new": {"model": new.info.model, "identity": new.info.identity},
        "environment": new.info.environment,
        "method": method,
        "cells": cells,
        "pooled": pools,
        "left_out": [{"why": gap.why, "task": gap.task, "length_tokens": gap.length_tokens, "n": gap.n}
                     for gap in joined.gaps],
    }  # fmt: skip


def _cell(task: str, lengths_tokens: Sequence[int], table: pd.DataFrame) -> dict[str, Any]:
    allowed = allowed_points(max(lengths_tokens))
    (found,) = compare_tables({"new": table}, baselines={"new": "old"}, lengths=[], tasks=[], margin=allowed / 100)
    paired = found.paired
    change = paired.difference
    return {
        "task": task,
        "lengths_tokens": [int(length) for length in lengths_tokens],
        "n": paired.n_pairs,
        "old_percent": round(100 * found.baseline_mean, 2),
        "new_percent": round(100 * found.method_mean, 2),
        "points": round(100 * change.mean, 2),
        "interval_95_points": [None if end is None else round(100 * end, 2) for end in (change.low, change.high)],
        "lost": paired.lost,
        "won": paired.won,
        "allowed_points": allowed,
        "within": bool(100 * change.mean >= -allowed),
        "noninferiority": paired.noninferiority.verdict,
    }


def lines(found: dict[str, Any]) -> Iterable[str]:
    """Yield the lines of a Markdown table."""
    yield "| task | length | n | old | new | new - old, points | lost / won | allowed | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for cell in [*found["cells"], *found["pooled"]]:
        lengths = "-".join(dict.fromkeys(format_length(cell["lengths_tokens"][at]) for at in (0, -1)))
        low, high = cell["interval_95_points"]
        interval = "" if low is None else f" [{low:+.1f}, {high:+.1f}]"
        texts = [
            cell["task"],
            lengths,
            str(cell["n"]),
            f"{cell['old_percent']:.1f}",
            f"{cell['new_percent']:.1f}",
            f"{cell['points']:+.1f}{interval}",
            f"{cell['lost']} / {cell['won']}",
            f"-{cell['allowed_points']:g}",
            "within" if cell["within"] else "**below**",
        ]
        yield f"| {' | '.join(texts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--method", default="dense")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    found = compare(kvscope.load_run(options.old), kvscope.load_run(options.new), method=options.method)
    print("\n".join(lines(found)))
    for gap in found["left_out"]:
        print(f"left out: {gap['n']} prompts of {gap['task']} at {format_length(gap['length_tokens'])}: {gap['why']}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(int(not all(cell["within"] for cell in found["cells"])))


if __name__ == "__main__":
    sys.exit(ended(main))
