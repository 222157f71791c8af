"""LSA on the small DeepSeek-V4: documents, the plan that is fixed first, bytes in three accountings, and the table."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fresh
import pytest
from benchmark_scripts import load_script
from planted import planted_collection
from synthetic_rows import make_rows

import kvscope
from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.label_choice import LabelChoice
from kvscope.results.store import RunStore

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHIPPED = BENCHMARKS.parent / "methods" / "lsa" / "indexers"
STANDING_FOR = ["dense", "quest", "moba", "msa", "recency", "random"]
"""Methods of invented rows, in the order of the table's."""


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import v4_lsa_data

    return v4_lsa_data


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import v4_lsa_table

    return v4_lsa_table


def test_no_document_serves_two_ends(data: ModuleType, table: ModuleType) -> None:
    import indexers_data
    import indexers_gate

    units = indexers_data.units_of(data.GROUPS, data.EntryUnit)
    assert {type(unit) for unit in units} == {data.EntryUnit}
    assert len({unit.folder for unit in units}) == len(units)
    seeds: dict[str, set[int]] = {}
    for unit in units:
        seeds.setdefault(unit.group.role, set()).add(unit.seed)
    evaluation = seeds.pop(data.EVALUATION)
    assert max(evaluation) < 1000 <= min(map(min, seeds.values()))
    assert not seeds[data.LSA] & seeds[data.CALIBRATION]
    others = {unit.seed for unit in indexers_data.units_of(indexers_data.GROUPS)}
    assert not (seeds[data.LSA] | seeds[data.CALIBRATION]) & others
    mine = {table.SEED, table.PILOT_SEED}
    assert len(mine | evaluation | {cell.seed for cell in indexers_gate.PLAN.cells}) == 2 + len(evaluation) + 3
    config = units[0].config("reference-v4", device="cpu")
    assert (config.answers, config.layers, config.least_mass) == ("own", None, 0.001)


def test_the_default_plan_has_a_thousand_pairs(data: ModuleType, table: ModuleType) -> None:
    plan = table.Plan(tasks=data.ASKED, lengths_tokens=(4096, 8192, 16384, 32768), samples=36)
    assert plan.pairs == 1008 >= table.LEAST_PAIRS
    assert {"vt", "long_qa"} < set(plan.tasks)
    assert sum(task.startswith("niah_") for task in plan.tasks) == 5


def test_layers_are_those_that_attention_votes_for_most(data: ModuleType, tmp_path: Path) -> None:
    folder = planted_collection(tmp_path / "planted", documents=6, features="tokens")
    labels = LabelChoice(voters="layer", top_p=0.9, votes=1, least_mass=0.05)
    every, votes = data.indexed_layers("all", [folder], labels)
    best, _ = data.indexed_layers("1", [folder], labels)
    assert best == (max(votes, key=lambda layer: votes[layer]),)
    assert data.indexed_layers(",".join(map(str, every)), [folder], labels)[0] == every
    for asked in ("99", "three", ""):
        with pytest.raises(UsageError, match="--layers is"):
            data.indexed_layers(asked, [folder], labels)


DENSE = {"csa_kv": 6000, "indexer_keys": 3000, "hca_kv": 1000, "window": 500, "buffers": 100}


@dataclass
class Invented:
    """Answers a cell with invented rows: lsa loses some of vt, and holds a tenth of the entries."""

    lost: int
    missing: bool = False

    def note(self, text: str) -> None:
        assert text

    def answer(self, cell: Any, folder: Path) -> str | None:
        if self.missing:
            return f"the time was over in {cell.name}"
        rows, _, info = make_rows(STANDING_FOR, tasks=cell.tasks, lengths=cell.lengths_tokens, samples=cell.samples,
                                  footprint_lengths=())  # fmt: skip
        with RunStore.create(folder / cell.name, info) as store:
            store.begin()
            for row in rows:
                kinds, metadata_bytes = dict(DENSE), 0
                if row.method != "dense":
                    kinds |= {"csa_kv": 600, "indexer_keys": 300}
                    metadata_bytes = 400 if row.method in ("quest", "moba", "msa") else 0
                lost = row.method == "quest" and row.task == "vt" and row.sample < self.lost
                store.append_sample(
                    row.model_copy(
                        update={"score": 0.0 if lost or row.method == "random" else 1.0, "kv_bytes_by_kind": kinds,
                                "resident_kv_bytes": sum(kinds.values()), "metadata_bytes": metadata_bytes,
                                "dense_kv_bytes": sum(DENSE.values()), "context_id": None, "status": "ok"}
                    )
                )  # fmt: skip
        return None


def filled(table: ModuleType, folder: Path, run: Invented, shares: dict[int, float]) -> dict[str, Any]:
    plan = table.Plan(tasks=("vt", "niah_single_1"), lengths_tokens=tuple(shares), samples=40)
    indexers = {"ours": SHIPPED / "reference", "paper": SHIPPED / "reference-chunk64"}
    run_ = run
    run_.model = "reference"  # type: ignore[attr-defined]
    found: dict[str, Any] = table.fill(plan, folder, indexers=indexers, shares=shares, run=run_)
    return found


def test_rows_become_bytes_in_three_accountings_and_verdicts(table: ModuleType, tmp_path: Path) -> None:
    found = filled(table, tmp_path / "rows", Invented(lost=4), {1024: 0.3, 2048: 0.2})
    lsa = found["bytes"]["lsa_ours"]["all prompts"]
    assert [lsa[f"{kind}_bytes"] for kind in table.KINDS] == [600, 300, 1000, 500, 100]
    assert lsa["choosing_bytes"] == 400
    # Of 10,000 bytes of entries and keys 900 are resident; HCA has 1,000, and lsa keeps 400 to choose by.
    assert [lsa[f"{share}_percent"] for share in ("paper", "with_hca", "with_keys")] == [9.0, 19.0, 23.0]
    assert lsa["held_percent"] == pytest.approx(100 * 2900 / 10600, abs=0.01)
    assert found["bytes"]["recency"]["all prompts"]["with_keys_percent"] == 19.0
    assert found["bytes"]["dense"]["2048 tokens"]["held_percent"] == 100.0
    everything = found["accuracy"]["all prompts"]
    assert everything["lsa_ours"]["n"] == 160
    assert (everything["lsa_ours"]["lost"], everything["lsa_ours"]["won"]) == (8, 0)
    assert everything["lsa_ours"]["points"] == -5.0
    assert everything["lsa_paper"]["points"] == 0.0
    assert everything["random"]["difference"] == "worse"
    assert found["accuracy"]["vt"]["lsa_ours"]["points"] == -10.0
    claims = found["claims"]["lsa_ours"]
    assert (claims["paper_within_13.5"], claims["with_hca_within_13.5"]) == (True, False)
    assert (claims["falls"], claims["rises"], claims["interval_holds_plus_0.6"]) == (True, False, False)
    assert found["enough_pairs"] is False
    assert json.loads((tmp_path / "rows" / "plan.json").read_text(encoding="utf-8")) == found["plan"]
    assert found["plan"]["shares"] == {"1024": 0.3, "2048": 0.2}


def test_the_table_in_words_says_what_it_rests_on(table: ModuleType, tmp_path: Path) -> None:
    import v4_lsa_text

    found = filled(table, tmp_path / "rows", Invented(lost=4), {1024: 0.3, 2048: 0.2})
    text = v4_lsa_text.markdown(found)
    assert "160 pairs a method were planned before the first row" in text
    assert "**Fewer than 1,000 pairs: this decides nothing.**" in text
    assert "| lsa_ours | 160 | 95.0 | 100.0 | -5.00 [" in " ".join(text.split())
    assert "paper 9.0 % (holds), with_hca 19.0 % (does not)" in text
    assert "Accuracy falls." in text


def test_what_is_not_whole_goes_on_and_another_plan_is_refused(table: ModuleType, tmp_path: Path) -> None:
    assert "the time was over in 1k" in filled(
        table, tmp_path / "rows", Invented(lost=0, missing=True), {1024: 0.3}
    )["unfinished"]  # fmt: skip
    with pytest.raises(UsageError, match=r"fixes another plan \(shares differ\)"):
        filled(table, tmp_path / "rows", Invented(lost=0), {1024: 0.25})


def test_rows_without_bytes_by_kind_are_refused(table: ModuleType, tmp_path: Path) -> None:
    rows, _, info = make_rows(["dense", "recency"], tasks=("vt",), lengths=(1024,), samples=2, footprint_lengths=())
    with RunStore.create(tmp_path / "run", info) as store:
        store.begin()
        for row in rows:
            store.append_sample(row)
    samples = kvscope.load_run(tmp_path / "run").samples
    dense = samples[samples["method"] == "dense"]
    with pytest.raises(UsageError, match="give a model with compressed entries"):
        table.held_bytes(samples[samples["method"] == "recency"], dense)


@pytest.mark.parametrize(
    ("residency", "mean"),
    [(None, 1.0), ({"resident_tokens": [300, 100, 200]}, 1.0), ({"resident_tokens": [300, 100]}, 2.0),
     ({"resident_tokens": []}, 1.0)],
)  # fmt: skip
def test_a_choice_counts_by_its_mean_over_the_refreshes(table: ModuleType, residency: Any, mean: float) -> None:
    """Rows have bytes by kind behind the last step, when the last choice is resident."""
    assert table._mean_over_last(residency) == mean


def test_a_pilot_is_asked_for_before_the_table(table: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the step pilot comes first"):
        table.pilot_shares(tmp_path / "pilot.json")


@pytest.mark.slow
def test_every_step_runs_on_a_cpu_and_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script(monkeypatch, "v4_lsa")
    monkeypatch.setattr(script.table, "subprocess", SimpleNamespace(run=fresh.instead_of_run))
    monkeypatch.setattr(script.documents, "get_context", {"spawn": fresh.context}.__getitem__)
    monkeypatch.setattr(sys, "argv", ["v4_lsa.py", "--tiny", "--out", str(tmp_path)])
    script.main()
    found = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert set(found["accuracy"]["all prompts"]) == {"lsa_ours", "lsa_paper", "lsa_pages", "recency", "random"}
    assert sum(found["not_answered"].values()) == 0
    dense, lsa = (found["bytes"][name]["all prompts"] for name in ("dense", "lsa_ours"))
    assert (dense["with_hca_percent"], dense["held_percent"], dense["host_bytes"]) == (100.0, 100.0, 0)
    assert lsa["held_percent"] < 100
    assert lsa["host_bytes"] > 0
    assert "this decides nothing" in (tmp_path / "table.md").read_text(encoding="utf-8")
    capsys.readouterr()
    script.main()
    assert capsys.readouterr().out.count("done, see") == 5
