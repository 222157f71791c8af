"""Claims from invented rows whose answers are known, and the report of a reproduction."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_rows import make_rows

from kvscope.harness.studies.reproduce.profiles import Asked, lsa_cells
from kvscope.methods.lsa import printed
from kvscope.reports.claims import Claim, claims_table
from kvscope.reports.claims_lsa import lsa_claims
from kvscope.reports.reproduction import reproduction_text, write_reproduction
from kvscope.results.claims import Range
from kvscope.results.frames import Run, make_run
from kvscope.results.reproduction import TABLE_1_ROLES, CellPlan, Loaded, Reproduction
from kvscope.results.share import prompt_shares

STANDS_FOR = {"dense": "dense", "lsa": "quest", "recency": "recency", "random": "random", "recency_equal": "moba"}
Change = Callable[[str, int], dict[str, Any]]


def scored(name: str, sample: int) -> dict[str, Any]:
    """lsa answers as dense does, the others nothing; lsa holds 13.5 %."""
    return {"score": 1.0 if name in ("dense", "lsa") else 0.0}


def invented(
    folder: Path, *, n: int = 40, change: Change = scored, held: float = 0.135, divisor: int = 1, left: int = 0
) -> Loaded:
    """The cells of the profile with rows of a kind each; the last ``left`` rows of the table have none."""
    asked = Asked(size="full", divisor=divisor)
    cells, runs = [], {}
    table = [cell for cell in lsa_cells(asked, most_tokens=2**20, has_gpu=False) if cell.role in TABLE_1_ROLES]
    for place, planned in enumerate(table):
        cell = planned.model_copy(
            update={"tasks": ("niah_single_1",), "samples": n, "seeds": (0,), "methods": STANDS_FOR, "lsa_share": held}
        )
        cells.append(cell)
        if place < len(table) - left:
            runs[cell.name] = rows_of(folder, cell, n=n, change=change, held=held)
    plan = Reproduction(
        kvscope_version="0", started_utc="2026-01-01", profile="lsa", size="full", model="reference", lsa="lsa",
        divisor=divisor, window_tokens=asked.window_tokens, cells=tuple(cells),
    )  # fmt: skip
    return Loaded(plan, runs, folder)


def rows_of(folder: Path, cell: CellPlan, *, n: int, change: Change, held: float) -> Run:
    samples, _, info = make_rows(
        list(STANDS_FOR.values()), tasks=cell.tasks, lengths=cell.lengths_tokens, samples=n, footprint_lengths=()
    )
    names = {label: name for name, label in STANDS_FOR.items()}
    rows = []
    for row in samples:
        update: dict[str, Any] = {"status": "ok", "reason": None, "context_id": None}
        name = names[row.method_label]
        update |= change(name, row.sample)
        if name != "dense":
            whole = row.dense_kv_bytes or 0
            update |= {"resident_kv_bytes": round(held * whole), "metadata_bytes": round(0.049 * whole)}
        rows.append(row.model_copy(update=update))
    return make_run(rows, [], info=info, folder=folder)


def by_key(loaded: Loaded) -> dict[str, Claim]:
    claims = lsa_claims(loaded)
    assert len({claim.key for claim in claims}) == len(claims)
    return {claim.key: claim for claim in claims}


@pytest.fixture(scope="module")
def claimed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Claim]:
    """Claims of rows as they are where nothing is said."""
    return by_key(invented(tmp_path_factory.mktemp("claimed")))


def test_every_claim_is_there_with_its_accounting_and_source(claimed: dict[str, Claim]) -> None:
    found = claimed
    assert set(found) == {
        "share_mean_of_ratios", "share_mean_of_ratios_hca", "share_mean_of_ratios_all", "share_ratio_of_means",
        "share_ratio_of_means_all", "share_at_493k", "share_at_493k_all", "share_at_500k", "share_at_500k_all",
        "share_at_512k", "share_at_512k_all", "gain", "noninferior", "recency_far_below", "random_far_below",
        "better_than_recency_equal", "mrcr_falls", "nothing_needed_accuracy", "nothing_needed_share",
        "training_memory", "throughput_256k", "throughput_512k", "throughput_1m", "flops_256k", "flops_512k",
        "flops_1m",
    }  # fmt: skip
    for key in (key for key in found if "share" in key):
        assert found[key].accounting != "-"
        assert found[key].source == "ledger; NVML not measured: not run yet"
    assert found["share_mean_of_ratios_hca"].verdict == "not measurable here"
    assert found["gain"].paper == 0.6
    assert found["share_mean_of_ratios_all"].paper == pytest.approx(18.0, abs=0.05)
    assert found["share_ratio_of_means"].paper == pytest.approx(10.7, abs=0.05)


def test_shares_that_are_the_papers_are_reproduced(claimed: dict[str, Claim], tmp_path: Path) -> None:
    found = claimed
    ours = found["share_mean_of_ratios"]
    assert (ours.ours, ours.verdict, ours.n) == (pytest.approx(13.5, abs=0.01), "reproduced", 9 * 40)
    assert found["share_mean_of_ratios_all"].ours == pytest.approx(18.4, abs=0.01)
    assert found["share_mean_of_ratios_all"].verdict == "reproduced"
    assert found["share_ratio_of_means"].ours == pytest.approx(13.5, abs=0.01), "the same at every length"
    assert found["share_ratio_of_means"].verdict == "not reproduced"
    assert found["share_at_512k"].verdict == "not reproduced"
    less = by_key(invented(tmp_path, held=0.04))
    assert less["share_at_512k"].verdict == less["share_at_512k_all"].verdict == "reproduced"
    assert less["share_mean_of_ratios"].verdict == "not reproduced"


def test_a_share_is_the_mean_of_its_prompts() -> None:
    rows = pd.DataFrame({"resident_kv_bytes": [10, 30], "metadata_bytes": [2, 2], "dense_kv_bytes": [100, 400]})
    assert prompt_shares(rows).tolist() == [0.12, 0.08]
    assert prompt_shares(rows, accounting="kv").tolist() == [0.10, 0.075]
    with pytest.raises(ValueError, match="no accounting 'hca'"):
        prompt_shares(rows, accounting="hca")


def test_few_prompts_without_a_difference_decide_no_gain(tmp_path: Path) -> None:
    found = by_key(invented(tmp_path, n=10))
    gain = found["gain"]
    assert (gain.ours, gain.discordant, gain.verdict) == (0.0, 0, "inconclusive")
    assert gain.low is not None and gain.low < -1  # noqa: PT018
    assert found["noninferior"].verdict == "inconclusive"
    assert found["recency_far_below"].verdict == "reproduced"
    assert found["better_than_recency_equal"].verdict == "reproduced"
    assert found["better_than_recency_equal"].paper is None


@pytest.mark.parametrize(("lost", "won", "verdict"), [(0, 40, "not reproduced"), (40, 0, "not reproduced")])
def test_a_large_gain_and_a_large_loss_are_not_the_claim(tmp_path: Path, lost: int, won: int, verdict: str) -> None:
    def change(name: str, sample: int) -> dict[str, Any]:
        right = sample >= lost if name == "lsa" else sample >= won
        return {"score": float(right) if name in ("lsa", "dense") else 0.0}

    gain = by_key(invented(tmp_path, n=100, change=change))["gain"]
    assert (gain.lost, gain.won, gain.verdict) == (9 * lost, 9 * won, verdict)
    assert gain.ours == pytest.approx(won - lost)


def test_graded_scores_of_which_few_differ_leave_it_open(tmp_path: Path) -> None:
    """One of 30 graded answers a row is a quarter worse: a bootstrap would say that the loss is below a point."""

    def change(name: str, sample: int) -> dict[str, Any]:
        return {"score": 0.5 if name == "dense" else 0.25 if name == "lsa" and sample == 0 else 0.5}

    found = by_key(invented(tmp_path, n=30, change=change))["noninferior"]
    assert found.ours == pytest.approx(-100 * 0.25 / 30)
    assert found.verdict == "inconclusive"
    assert found.low is not None and found.low < -3  # noqa: PT018
    same = by_key(invented(tmp_path, n=30, change=lambda name, sample: {"score": 0.5}))["gain"]
    assert same.low is not None and same.low < 0 < (same.high or 0)  # noqa: PT018


def test_an_unfinished_one_decides_nothing_and_says_why(tmp_path: Path) -> None:
    found = by_key(invented(tmp_path, left=1))
    for key in ("share_mean_of_ratios", "gain", "recency_far_below"):
        assert found[key].verdict == "inconclusive"
        assert found[key].why.startswith("unfinished: 8 of 9 rows")
    assert found["share_at_512k"].missing == "no row is measured"

    def failed(name: str, sample: int) -> dict[str, Any]:
        out = name == "lsa" and sample == 3
        return {"status": "oom", "reason": "full", "score": None, "output": None} if out else scored(name, sample)

    partly = by_key(invented(tmp_path, change=failed))["gain"]
    assert partly.verdict == "inconclusive"
    assert "39 of 40 prompts" in partly.why


def test_other_lengths_decide_nothing_and_every_table_says_so(tmp_path: Path) -> None:
    loaded = invented(tmp_path, n=6, divisor=64)
    assert {claim.verdict for claim in lsa_claims(loaded)} == {"not measurable here"}
    assert "(at these: reproduced)" in by_key(loaded)["share_mean_of_ratios"].why
    text = reproduction_text(loaded)
    assert text.count("Lengths are the paper's divided by 64") == 4, "three tables, and once below"


def test_the_report_has_every_row_of_the_table_and_nothing_of_strangers_as_markup(tmp_path: Path) -> None:
    loaded = invented(tmp_path, n=6, divisor=64)
    plan = loaded.plan.model_copy(update={"model": "<b>model</b>"})
    written = write_reproduction(Loaded(plan, loaded.runs, tmp_path))
    for path in written:
        if path.suffix in (".md", ".tex"):
            assert "divided by 64" in path.read_text(encoding="utf-8")
    table = pd.read_csv(tmp_path / "report" / "tables" / "table_1.csv")
    assert list(dict.fromkeys(table["row"])) == [
        row.label for row in sorted(printed.TABLE_1, key=lambda row: row.tokens)
    ]
    assert len(table) == 9 * len(STANDS_FOR)
    assert table.loc[table["method"] == "lsa", "paper_accuracy"].notna().all()
    page = next(path for path in written if path.suffix == ".html").read_text(encoding="utf-8")
    assert "<b>model</b>" not in page
    assert "&lt;b&gt;model" in page
    assert page.startswith("<!doctype html>")
    assert page.count("divided by 64") >= 4


def test_text_of_claims() -> None:
    plan = Reproduction(
        kvscope_version="0", started_utc="now", profile="lsa", size="full", model="m", lsa="lsa", divisor=1,
        window_tokens=1, cells=(),
    )  # fmt: skip
    claim = Claim(
        key="k", text="it gains", source="answers", paper=0.6, unit="points", asked=Range(low=0.1, high=1.1),
        ours=-0.001, low=-0.4, high=0.3, n=1200, lost=3, won=4,
    )  # fmt: skip
    table = claims_table([claim], plan)
    row = table.text.iloc[0]
    assert (row["ours"], row["95 % interval"], row["n"], row["-, +"]) == (
        "+0.0 points",
        "[-0.4, +0.3]",
        "1,200",
        "3, 4",
    )
    assert row["verdict"] == "inconclusive"
    assert table.data.iloc[0]["discordant"] == 7
