"""Sample rows carry what the statistics rest on: another program redoes them from the JSON lines alone."""

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap
from statsmodels.stats.multitest import multipletests
from synthetic_rows import make_rows

from kvscope.reports.tables_accuracy import statistics_table
from kvscope.results.frames import make_run

METHODS = ["dense", "recency", "quest"]


def rows_with_contexts(folder: Path) -> tuple[list[dict[str, Any]], Any]:
    """Rows of one task whose contexts serve three questions each, as JSON lines, and the table made of them."""
    samples, footprints, info = make_rows(
        METHODS, tasks=("niah_single_1",), lengths=(2048,), samples=36, footprint_lengths=()
    )
    samples = [
        row.model_copy(update={"context_id": f"text {row.sample // 3}", "score": score(row.method, row.sample)})
        for row in samples
    ]
    lines = "".join(row.model_dump_json() + "\n" for row in samples)
    run = make_run(samples, footprints, info=info, folder=folder)
    return [json.loads(line) for line in lines.splitlines()], statistics_table(run).data


def score(method: str, sample: int) -> float:
    if method == "dense":
        return 1.0
    right = sample % 7 and sample - 1 if method == "recency" else sample // 3 % 2 or sample % 3
    return float(bool(right))


def redone(rows: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Nothing of kvscope: pairs by prompt, contexts' balances, all signs of them, and scipy's bootstrap."""
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    contexts = {}
    for row in rows:
        if row["status"] == "ok":
            scores[row["prompt_sha256"]][row["method_label"]] = row["score"]
            contexts[row["prompt_sha256"]] = row["context_id"]
    balances: dict[str, list[float]] = defaultdict(list)
    for prompt, by_method in scores.items():
        balances[contexts[prompt]].append(by_method[method] - by_method["dense"])
    sums = np.array([sum(values) for values in balances.values()])
    sizes = np.array([len(values) for values in balances.values()])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
    ends = bootstrap(
        (sums, sizes), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, method="percentile",
        confidence_level=0.95, n_resamples=9999,
    ).confidence_interval  # fmt: skip
    return {
        "difference": sums.sum() / sizes.sum(),
        "p_value": (np.abs(signs @ np.abs(sums)) >= abs(sums.sum())).mean(),
        "lost": sum(value < 0 for values in balances.values() for value in values),
        "lost_contexts": int((sums < 0).sum()),
        "ends": (ends.low, ends.high),
    }


def test_another_program_redoes_the_table(tmp_path: Path) -> None:
    rows, table = rows_with_contexts(tmp_path)
    table = table.set_index("method_label")
    for method in METHODS[1:]:
        mine, found = redone(rows, method), table.loc[method]
        assert found["n_contexts"] == 12
        assert found["difference"] == pytest.approx(mine["difference"])
        assert (found["lost"], found["lost_contexts"]) == (mine["lost"], mine["lost_contexts"])
        assert found["p_value"] == pytest.approx(mine["p_value"])
        assert found["interval"] == "bootstrap"
        # Twelve contexts: the widened ends lie a little outside of the plain percentiles.
        assert mine["ends"][0] - 0.03 <= found["difference_low"] <= mine["ends"][0] + 0.005
        assert mine["ends"][1] - 0.005 <= found["difference_high"] <= mine["ends"][1] + 0.03
    adjusted = multipletests(table["p_value"], method="holm")[1]
    assert table["p_holm"].tolist() == pytest.approx(adjusted.tolist())
