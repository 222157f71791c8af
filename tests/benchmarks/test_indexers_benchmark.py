"""New indexers of the reference model: which documents, by when, and how the tests fixed in advance are judged."""

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from synthetic_rows import KINDS, make_rows

import kvscope
from kvscope.errors import UsageError
from kvscope.methods.lsa.indexer_files import indexer_folder, load_indexer, read_indexer_config
from kvscope.results.store import RunStore

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHIPPED = str(indexer_folder("reference"))


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import indexers_data

    return indexers_data


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import indexers_gate

    return indexers_gate


# -- documents


def test_no_document_serves_two_ends(documents: ModuleType, gate: ModuleType) -> None:
    units = documents.units_of(documents.GROUPS)
    assert len({unit.folder for unit in units}) == len(units)
    seeds: dict[str, set[int]] = {}
    for unit in units:
        seeds.setdefault(unit.group.role, set()).add(unit.seed)
    evaluation = seeds.pop(documents.EVALUATION)
    assert max(evaluation) < 1000 <= min(min(each) for each in seeds.values())
    assert sum(map(len, seeds.values())) == len(set().union(*seeds.values())), "roles share no seed"
    assert not {cell.seed for cell in gate.PLAN.cells} & evaluation
    assert len({cell.seed for cell in gate.PLAN.cells}) == len(gate.PLAN.cells)


def test_a_time_limit_leaves_the_mix(documents: ModuleType) -> None:
    """Of half the units every group has half, give or take one."""
    units = documents.units_of(documents.GROUPS)
    half = Counter(unit.group for unit in units[: len(units) // 2])
    assert all(abs(half[group] - group.units / 2) <= 1 for group in documents.GROUPS)


def test_what_is_begun_too_late_is_not_made(documents: ModuleType, tmp_path: Path) -> None:
    unit = documents.units_of(documents.tiny_groups())[0]
    assert documents._make(unit, str(tmp_path), "reference", "cpu", time.time()) is None
    assert list(tmp_path.iterdir()) == []
    assert documents.made(tmp_path, documents.LSA) == []


def test_units_are_asked_for_with_what_their_role_needs(documents: ModuleType) -> None:
    configs = {unit.group.role: unit.config("reference", device="cpu") for unit in documents.units_of(documents.GROUPS)}
    assert configs[documents.DSA].layers is None
    assert configs[documents.DSA].token_samples == 1024
    assert configs[documents.LSA].layers == documents.RETRIEVAL_LAYERS
    assert {config.answers for config in configs.values()} == {"own"}
    assert all(config.shard_documents == config.samples * len(config.tasks) for config in configs.values())


def test_time_is_shared_out_to_the_steps_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import indexers
    from steps import deadlines_s

    thought = indexers.STEP_MINUTES
    assert deadlines_s(["collect", "train", "calibrate"], 8.0, now_s=100.0, thought_minutes=thought) == {
        "collect": 340.0, "train": 490.0, "calibrate": 580.0,
    }  # fmt: skip
    assert deadlines_s(["train"], 1.0, now_s=0.0, thought_minutes=thought) == {"train": 60.0}


def test_an_indexer_is_taken_over_for_other_weights(
    documents: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import indexers

    class Made:
        def __init__(self, folder: Path) -> None:
            was = read_indexer_config(indexer_folder("reference"))
            self.info = replace(was, model="reference", model_revision="sha256:other")

    monkeypatch.setattr(indexers, "Collection", Made)
    start = indexers.adopted("reference", tmp_path, tmp_path / "start")
    config, was = read_indexer_config(start), read_indexer_config(indexer_folder("reference"))
    assert (config.model_revision, config.kept_fraction) == ("sha256:other", None)
    assert config.trained["start"]["trained"] == json.loads(json.dumps(dict(was.trained)))
    mine, theirs = load_indexer(start).state_dict(), load_indexer(indexer_folder("reference")).state_dict()
    assert all(bool((mine[name] == theirs[name]).all()) for name in theirs)


# -- the tests fixed in advance


def test_the_plan_is_what_the_issue_asks(gate: ModuleType) -> None:
    prompts = {cell.name: cell.prompts for cell in gate.PLAN.cells}
    for test in gate.PLAN.tests:
        assert sum(prompts[name] for name in test.cells) >= test.least_pairs
    near, far, dilution = gate.PLAN.tests
    assert (near.kind, near.margin_points, near.most_percent, near.least_pairs) == ("non-inferior", 1.0, 13.5, 3000)
    assert (far.kind, far.margin_points, far.most_percent, far.least_pairs) == ("lower bound", 3.0, 9.0, 300)
    assert (dilution.kind, dilution.method) == ("difference", "msa")


def test_some_tests_need_some_cells(gate: ModuleType) -> None:
    some = gate.asking(gate.PLAN, ("B", "C"))
    assert [test.name for test in some.tests] == ["B", "C"]
    assert [cell.name for cell in some.cells] == ["far-256k", "far-512k"]
    assert gate.asking(gate.PLAN, ("A", "B", "C")) == gate.PLAN
    with pytest.raises(UsageError, match="no test 'D': A, B, C"):
        gate.asking(gate.PLAN, ("A", "D"))


def test_a_rehearsal_asks_training_seeds_and_passes_nothing(gate: ModuleType, tmp_path: Path) -> None:
    specs = ("lsa", "lsa:least_fraction=0.07,cap_fraction=0.1")
    some = gate.asking(gate.PLAN, ("B", "C"))
    plan = gate.rehearsed(some, specs, seed=7000, cells=("far-256k",), samples=9)
    (cell,) = plan.cells
    assert (cell.name, cell.tasks, cell.lengths_tokens) == ("far-256k", gate.FAR_TASKS, (262_144,))
    assert (cell.seed, cell.samples, cell.methods) == (7000, 9, ("dense", *specs))
    labels = [test.method for test in plan.tests]
    assert labels == ["lsa", "lsa:cap_fraction=0.1,least_fraction=0.07"]
    assert {(test.name, test.kind, test.most_percent) for test in plan.tests} == {("B rehearsed", "difference", None)}
    asked = gate.command(cell, tmp_path, model="reference", lsa="lsa", device="cpu", jobs=1)
    assert [asked[i + 1] for i, part in enumerate(asked) if part == "-m" and i > 1] == ["dense", *specs]
    whole = gate.rehearsed(some, ("lsa",), seed=1000, cells=(), samples=None)
    assert [(each.seed, each.samples) for each in whole.cells] == [(1000, 54), (1001, 27)]
    for changes, message in (
        ({"seed": 330}, "seed 330 is evaluation's"),
        ({"cells": ("near",)}, "no cell 'near' of these tests: far-256k, far-512k"),
    ):
        with pytest.raises(UsageError, match=message):
            gate.rehearsed(some, ("lsa",), **{"seed": 7000, "cells": (), "samples": None, **changes})
    with pytest.raises(UsageError, match="none of these tests asks lsa"):
        gate.rehearsed(gate.asking(gate.PLAN, ("C",)), ("lsa",), seed=7000, cells=(), samples=None)


def test_a_plan_is_fixed_once(gate: ModuleType, tmp_path: Path) -> None:
    record = gate.plan_record(gate.PLAN, model="reference", lsa=f"lsa:indexer={SHIPPED}")
    assert record["model_revision"] == read_indexer_config(indexer_folder("reference")).model_revision
    gate.fix_plan(tmp_path / "gate", record)
    gate.fix_plan(tmp_path / "gate", record)
    assert json.loads((tmp_path / "gate" / "plan.json").read_text(encoding="utf-8")) == record
    with pytest.raises(UsageError, match=r"fixes another plan \(indexer differ\)"):
        gate.fix_plan(tmp_path / "gate", {**record, "indexer": "0" * 12})
    (tmp_path / "late" / "near").mkdir(parents=True)
    (tmp_path / "late" / "near" / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="holds rows and no plan"):
        gate.fix_plan(tmp_path / "late", record)


def run_of(folder: Path, lengths: tuple[int, ...], *, n_lost: int, share: float) -> "kvscope.Run":
    """Forty prompts a length; dense has all, lsa loses some of each, at a share of dense's bytes."""
    lsa = next(label for label, kind in KINDS.items() if kind.name == "lsa")
    rows, _, info = make_rows(
        ["dense", lsa], tasks=("vt", "niah_multikey_2"), lengths=lengths, samples=20, footprint_lengths=()
    )
    with RunStore.create(folder, info) as store:
        store.begin()
        for row in rows:
            is_lost = row.method == "lsa" and row.task == "vt" and row.sample < n_lost
            changes = {"score": 0.0 if is_lost else 1.0, "metadata_bytes": 0, "context_id": None}
            if row.method == "lsa":
                changes["resident_kv_bytes"] = int(share * row.dense_kv_bytes)
            store.append_sample(row.model_copy(update=changes))
    return kvscope.load_run(folder)


def test_answers_are_judged_by_what_was_fixed(gate: ModuleType, tmp_path: Path) -> None:
    near = run_of(tmp_path / "near", (16384, 32768), n_lost=0, share=0.13)
    far = run_of(tmp_path / "far", (262144,), n_lost=2, share=0.08)
    farther = run_of(tmp_path / "farther", (524288,), n_lost=4, share=0.06)
    runs = {"near": near, "far": far, "farther": farther}

    def judged(cells: tuple[str, ...], kind: str, margin: float, most: float | None, least: int) -> dict[str, object]:
        return gate.judged(gate.Test("T", cells, "lsa", kind, margin, most, least), runs)

    same = judged(("near",), "non-inferior", 10.0, 13.5, 80)
    assert (same["n"], same["points"], same["lost"], same["won"], same["passed"]) == (80, 0.0, 0, 0, True)
    assert same["bytes_percent"] == pytest.approx(13.0, abs=0.01)
    assert judged(("near",), "non-inferior", 10.0, 12.9, 80)["passed"] is False, "too many bytes"
    assert judged(("near",), "non-inferior", 10.0, 13.5, 81)["passed"] is False, "too few pairs"

    both = judged(("far", "farther"), "lower bound", 20.0, 9.0, 80)
    assert (both["n"], both["points"], both["lost"], both["won"]) == (80, -7.5, 6, 0)
    assert both["bytes_percent"] == pytest.approx(7.0, abs=0.01)
    low, high = both["interval_95_points"]
    assert -20 < low < -7.5 < high < 0
    assert both["passed"] is True
    assert judged(("far", "farther"), "lower bound", 10.0, 9.0, 80)["passed"] is False
    assert both["within"]["vt"]["points"] == -15.0
    assert both["within"]["niah_multikey_2"]["points"] == 0.0
    assert set(both["within"]) == {"262144 tokens", "524288 tokens", "vt", "niah_multikey_2"}

    free = judged(("farther",), "difference", 1.0, None, 1)
    assert free["passed"] is None
    assert free["interval_holds_plus_0.6"] is (free["interval_95_points"][1] >= 0.6)
    assert gate.sentence(both).endswith("n 80, 6 lost, 0 won, 7.00 % of the bytes (at most 9 %): passed")
