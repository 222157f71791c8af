"""Points, table and figures of kvscope reproduce setup, from invented rows."""

from pathlib import Path
from typing import Any

import pytest
from synthetic_rows import make_rows

from kvscope.reports.reproduction import reproduction_text
from kvscope.reports.setup_dependence import sentences, setup_figures, setup_points, setup_table
from kvscope.results.frames import make_run
from kvscope.results.reproduction import CellPlan, Loaded, Reproduction

METHODS = {
    "dense": "dense", "lsa": "quest", "tau=1": "recency", "tau=64": "random", "threshold=0.9": "moba",
    "kv=kivi2": "dsa", "kv=fp8": "msa",
}  # fmt: skip
LOST = {"quest": 1, "recency": 0, "random": 30, "moba": 3}
SHARE = {"quest": 0.2, "recency": 0.21, "random": 0.1, "moba": 0.05}


def cell(name: str, length: int, methods: dict[str, str], *, n: int = 40, **more: Any) -> CellPlan:
    return CellPlan(
        name=name, role="sweep", lengths_tokens=(length,), tasks=("niah_single_1", "vt"), samples=n, methods=methods,
        **more,
    )  # fmt: skip


def loaded(folder: Path) -> Loaded:
    cells = [
        cell("options", 2048, METHODS),
        cell("length-1k", 1024, {"dense": "dense", "lsa": "quest"}, n=20),
        cell("chunk-tokens", 2048, {}, left_out="there is no indexer of 256"),
    ]
    runs = {}
    for each in cells[:2]:
        samples, _, info = make_rows(
            list(each.methods.values()), tasks=each.tasks, lengths=each.lengths_tokens, samples=each.samples,
            footprint_lengths=(),
        )  # fmt: skip
        rows = []
        for row in samples:
            whole = row.dense_kv_bytes or 0
            held = round(whole * SHARE.get(row.method_label, 1.0))
            score = 0.0 if row.task == "vt" and row.sample < LOST.get(row.method_label, 0) else 1.0
            config = {"tau": 4, "threshold": 0.5, "mode": "threshold", "refresh": "sync", "chunk_tokens": 16}
            update = {"score": score, "resident_kv_bytes": held, "metadata_bytes": 0, "config": config}
            rows.append(row.model_copy(update={**update, "status": "ok", "reason": None, "context_id": None}))
        runs[each.name] = make_run(rows, [], info=info, folder=folder)
    plan = Reproduction(
        kvscope_version="0", started_utc="now", profile="setup", size="quick", model="reference", lsa="lsa",
        divisor=64, window_tokens=128, cells=tuple(cells),
    )  # fmt: skip
    return Loaded(plan, runs, folder)


def test_each_setting_has_its_values_and_the_method_as_asked_for(tmp_path: Path) -> None:
    points = setup_points(loaded(tmp_path))
    found = [(point.setting, point.value, point.as_asked, point.paired.n_pairs) for point in points]
    assert found == [
        ("threshold", "0.5", True, 80), ("threshold", "0.9", False, 80),
        ("tau", "1", False, 80), ("tau", "4", True, 80), ("tau", "64", False, 80),
        ("kv", "none", True, 80), ("kv", "fp8", False, 80), ("kv", "kivi2", False, 80),
        ("length", "1024", False, 40), ("length", "2048", True, 80),
        ("task", "niah_single_1", False, 40), ("task", "vt", False, 40),
    ]  # fmt: skip
    by_value = {(point.setting, point.value): point for point in points}
    assert by_value["tau", "64"].paired.lost == 30
    assert by_value["task", "vt"].paired.lost == 1
    share = by_value["threshold", "0.9"].share
    assert share is not None and share.mean == pytest.approx(0.05, abs=1e-3)  # noqa: PT018


def test_a_figure_a_setting_with_three_sentences(tmp_path: Path) -> None:
    figures = {figure.name: figure for figure in setup_figures(loaded(tmp_path))}
    assert list(figures) == ["setup_threshold", "setup_tau", "setup_kv", "setup_length", "setup_task"]
    tau = figures["setup_tau"]
    assert tau.caption == (
        "Tau (decode steps between refreshes): 3 values at 2K tokens, n = 80 prompts a point. Bytes over dense's go "
        "from 10.0 % at 64 to 21.0 % at 1. Answers differ from dense's by more than chance (5 %, each test alone) at "
        "64 (-37.5 points)."
    )
    assert list(tau.data["value"]) == ["1", "4", "64"]
    assert "At no value can the answers be told from dense's" in figures["setup_threshold"].caption
    assert sentences(setup_points(loaded(tmp_path))[:1], n_text="n = 1", lengths="2K").count(". ") == 2


def test_the_table_names_what_was_left_out(tmp_path: Path) -> None:
    made = loaded(tmp_path)
    table = setup_table(made)
    assert list(table.text["value"][:2]) == ["0.5 *", "0.9"]
    text = reproduction_text(made, width=100)
    assert "chunk-tokens was left out: there is no indexer of 256." in " ".join(text.split())
    assert "decide none" not in text, "no claim of the paper is decided here"
