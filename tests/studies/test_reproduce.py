"""kvscope reproduce: what a profile asks for, budgets of equal bytes, and a small one measured to its claims."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.passes.facts import describe_model
from kvscope.harness.studies.reproduce import profiles, running
from kvscope.harness.studies.reproduce.budgets import equal_methods
from kvscope.harness.studies.reproduce.planning import make_reproduction, plan_text
from kvscope.harness.studies.reproduce.profiles import RULER_TASKS, Asked, lsa_cells, pilot_cells
from kvscope.methods.kv_format import FORMATS
from kvscope.methods.lsa import printed
from kvscope.methods.recency.method import Recency
from kvscope.methods.registry import create_method
from kvscope.reports import reproduction
from kvscope.results.reproduction import TABLE_1_ROLES, load_reproduction, read_reproduction

LANDMARK = "lsa:indexer=landmark"


def test_the_full_profile_is_table_1_with_the_numbers_fixed_before() -> None:
    cells = lsa_cells(Asked(size="full"), most_tokens=2**20, has_gpu=True)
    rows = {cell.paper_row: cell for cell in cells if cell.role in TABLE_1_ROLES}
    assert list(rows) == [row.label for row in sorted(printed.TABLE_1, key=lambda row: row.tokens)]
    for row in printed.TABLE_1:
        cell = rows[row.label]
        assert cell.lengths_tokens == (row.tokens,)
        least = 400 if row.tokens <= 128 * 1024 else 100
        assert least <= cell.prompts <= least + 4
        assert set(cell.methods) == {"dense", "lsa", "recency", "random"}
        assert {cell.methods[name] for name in ("lsa", "recency", "random")} == {
            f"{name}:recency_tokens=8192" for name in ("lsa", "recency", "random")
        }
        if cell.role == "ruler":
            assert cell.tasks == RULER_TASKS
        if cell.role == "longmemeval":
            assert cell.samples % len(profiles.MEMORY_TYPES) == 0, "types weigh alike"
    assert {cell.role for cell in cells} == {*TABLE_1_ROLES, "mrcr", "nothing_needed", "footprint", "throughput"}
    pilot_seeds = {seed for cell in pilot_cells(cells) for seed in cell.seeds}
    assert not pilot_seeds & {seed for cell in cells for seed in cell.seeds}, "budgets are sized on other prompts"


def test_what_cannot_be_measured_is_left_out_with_the_reason() -> None:
    cells = {cell.name: cell for cell in lsa_cells(Asked(size="full"), most_tokens=131072, has_gpu=False)}
    assert cells["ruler-128k"].left_out is None
    assert cells["ruler-256k"].left_out == "the model takes 131,072 tokens"
    assert cells["throughput"].left_out == "there is no GPU"


@pytest.mark.parametrize("share", [0.12, 0.3, 0.97])
def test_budgets_are_the_least_that_hold_lsas_share(tiny_model: str, share: float) -> None:
    facts = describe_model(tiny_model, device="cpu")
    n_tokens, window = 3000, 64
    dense = create_method("dense").predict(facts.shape, n_tokens).device_bytes
    found = equal_methods(
        ("recency", "random", "snapkv"), share=share, n_tokens=n_tokens, window_tokens=window, facts=facts
    )
    for name, label in found.items():
        assert name == f"{label.partition(':')[0]}_equal"
        method = create_method(label)
        assert method.predict(facts.shape, n_tokens).device_bytes >= share * dense
        fraction = method.config.budget_fraction
        below = label.replace(f"budget_fraction={fraction}", f"budget_fraction={round(fraction - 0.001, 3)}")
        try:
            less = create_method(below).predict(facts.shape, n_tokens).device_bytes
        except UsageError:
            continue  # a thousandth less is no budget at all
        assert less < share * dense


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of one task, and five prompts each."""
    rows = tuple(row for row in printed.TABLE_1 if row.label in ("RULER 64K", "RULER 128K"))
    monkeypatch.setattr(printed, "TABLE_1", rows)
    monkeypatch.setattr(profiles, "TABLE_2", ())
    monkeypatch.setitem(profiles.ROLE_TASKS, "ruler", ("niah_single_1",))
    monkeypatch.setattr(profiles, "QUICK_PROMPTS", 2)
    monkeypatch.setattr(profiles, "QUICK_PROMPTS_ASIDE", 1)
    monkeypatch.setitem(profiles.EQUAL_BYTES, "quick", ("recency",))


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are printed, and no report is drawn."""
    monkeypatch.setattr(reproduction, "write_reproduction", lambda loaded: [])


def words(model: str, out: Path, *more: str) -> list[str]:
    return ["reproduce", "lsa", "--model", model, "--lsa", LANDMARK, "--divisor", "128", "--out", str(out), "-q", *more]


def test_a_small_one_from_plan_to_claims(
    few: None, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert cli.run_cli(words(tiny_model, out, "--dry-run")) == 0
    assert not out.exists()
    planned = capsys.readouterr().out
    assert "recency at lsa's bytes" in planned
    assert "left out: there is no GPU" in planned

    measured: list[str] = []
    real = running.run_config

    def counting(config: Any, **options: Any) -> Any:
        measured.append(Path(options["out"]).parent.name)
        return real(config, **options)

    monkeypatch.setattr(running, "run_config", counting)
    code = cli.run_cli(words(tiny_model, out))
    text = capsys.readouterr().out
    assert code == 0, text
    assert measured == ["pilot-ruler", "ruler-64k", "ruler-128k", "mrcr"]
    plan = read_reproduction(out)
    assert plan is not None
    share = plan.cell("ruler-64k").lsa_share
    assert share is not None and 0.1 < share < 1  # noqa: PT018
    assert plan.cell("ruler-64k").methods["recency_equal"].startswith("recency:budget_fraction=")

    claims = pd.read_csv(out / "report" / "tables" / "claims.csv").set_index("key")
    assert set(claims["verdict"]) == {"not measurable here"}, "other lengths than the paper's decide nothing"
    assert claims.loc["share_mean_of_ratios_all", "n"] == 4
    assert claims.loc["share_mean_of_ratios_all", "ours"] == pytest.approx(
        100 * sum(cell.lsa_share for cell in plan.cells if cell.lsa_share) / 2, abs=10
    )
    for name in ("claims", "table_1", "prompts"):
        assert "divided by 128" in (out / "report" / "tables" / f"{name}.md").read_text()
    assert "divided by 128" in text
    assert (out / "report" / "report.html").read_text().count("<svg ") == 3

    measured.clear()
    assert cli.run_cli(words(tiny_model, out)) == 0
    assert measured == [], "the same again has nothing to do"
    again = capsys.readouterr().out
    assert again == text
    assert cli.run_cli(["reproduce", "claims", str(out)]) == 0
    assert capsys.readouterr().out == text

    assert cli.run_cli(words(tiny_model, out, "--divisor", "127")) == 2
    assert "holds another reproduction" in capsys.readouterr().err


def test_it_goes_on_where_it_stopped(
    few: None, no_files: None, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(printed, "TABLE_1", tuple(row for row in printed.TABLE_1 if row.label == "RULER 64K"))
    assert cli.run_cli(words(tiny_model, out, "--time-limit", "0.001")) == 1
    loaded = load_reproduction(out)
    assert loaded.runs == {}
    assert cli.run_cli(words(tiny_model, out)) == 0
    assert set(load_reproduction(out).runs) == {"ruler-64k", "mrcr"}


def test_what_failed_is_measured_again_and_decides_nothing(
    few: None,
    no_files: None,
    tiny_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(printed, "TABLE_1", tuple(row for row in printed.TABLE_1 if row.label == "RULER 64K"))
    real = Recency.open

    def full(self: Recency, prompt: Any, *arguments: Any, **options: Any) -> Any:
        if self.config.budget_fraction is not None:
            raise RuntimeError("the page is torn")
        return real(self, prompt, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Recency, "open", full)
        assert cli.run_cli(words(tiny_model, out)) == 1
    said = capsys.readouterr()
    assert "ruler-64k: " in said.err
    assert "the page is torn" in said.err
    assert "0 of 2 prompts of ruler-64k under recency_equal" in said.out
    assert not (out / "ruler-64k").exists()
    assert cli.run_cli(words(tiny_model, out)) == 0
    assert "Unfinished" not in capsys.readouterr().out
    assert (out / "ruler-64k" / "samples.parquet").exists()


def test_setup_leaves_out_what_cannot_be_changed_and_says_so(tiny_model: str) -> None:
    planned = make_reproduction(
        "setup", size="quick", model=tiny_model, lsa=LANDMARK, divisor=None, overrides={"device": "cpu"}
    )
    options = planned.plan.cell("options")
    assert "tau=16" in options.methods
    assert not any(name.startswith("threshold") for name in options.methods)
    left_out = {cell.name: cell.left_out or "" for cell in planned.plan.cells}
    assert "scores by no probability" in left_out["threshold"]
    assert left_out["length-4k"] == ""
    packed = {name: label for name, label in options.methods.items() if name.startswith("kv=")}
    assert packed == {f"kv={kv}": f"{LANDMARK},kv={kv}" for kv in FORMATS}, "the store as it is is lsa as asked for"
    assert "options" in plan_text(planned, width=80)


@pytest.mark.parametrize(("lsa", "values", "why"), [
    (f"{LANDMARK},kv=int4", ["none", "fp8", "int8", "kivi2"], ""),
    ("lsa:indexer=attention", [], "weighs the raw keys"),
])  # fmt: skip
def test_setup_changes_the_store_of_any_lsa(tiny_model: str, lsa: str, values: list[str], why: str) -> None:
    planned = make_reproduction(
        "setup", size="quick", model=tiny_model, lsa=lsa, divisor=None, overrides={"device": "cpu"}
    )
    methods = planned.plan.cell("options").methods
    assert [name for name in methods if name.startswith("kv=")] == [f"kv={value}" for value in values]
    left_out = {cell.name: cell.left_out for cell in planned.plan.cells}
    assert why in (left_out.get("kv") or "")


@pytest.mark.parametrize(("more", "sentence"), [
    (["--profile", "fast"], "There is no profile 'fast'. Known: full, quick."),
    (["--lsa", "dense"], "expected lsa with options"),
    (["--lsa", "lsa:recency_tokens=3"], "its window (recency_tokens) left out"),
    (["--model", "preset:llama-3.1-8b"], "random weights"),
    (["--divisor", "1"], "give a larger --divisor"),
    (["--divisor", "99999"], "--divisor 99,999 leaves nothing of the paper's 47,104 tokens: give a smaller one."),
    (["--jobs", "0"], "jobs in the options is 0, expected at least 1."),
    (["--out", ""], "--out is ''"),
    (["--time-limit", "soon"], "time_limit_s"),
])  # fmt: skip
def test_bad_input_is_one_sentence(
    tiny_model: str, tmp_path: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_cli(words(tiny_model, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert not (tmp_path / "out").exists()


def test_a_run_and_a_reproduction_have_folders_of_their_own(
    few: None, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    for planned in ([], ["--dry-run"]):
        assert cli.run_cli(words(tiny_model, tmp_path, *planned)) == 2
        assert "holds a run of its own" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    (tmp_path / "run.json").rename(tmp_path / "reproduce.json")
    run = ["run", "--model", tiny_model, "-m", "dense", "-t", "niah_single_1", "-l", "512", "-n", "1", "-q"]
    assert cli.run_cli([*run, "--out", str(tmp_path)]) == 2
    assert "holds a reproduction" in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


def test_a_damaged_plan_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, said in ((tmp_path, "holds no"), (tmp_path / "none", "does not exist"), (__file__, "is a file")):
        assert cli.run_cli(["reproduce", "claims", str(place)]) == 2
        assert said in capsys.readouterr().err
    for text, sentence in (("{", "is not JSON"), (json.dumps({"profile": "lsa"}), "is not valid")):
        (tmp_path / "reproduce.json").write_text(text)
        assert cli.run_cli(["reproduce", "claims", str(tmp_path)]) == 2
        assert sentence in capsys.readouterr().err
