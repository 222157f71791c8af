"""The numbers behind tables and figures: accuracy cells, the source of bytes, predictions, coverage."""

import numpy as np
import pytest
from synthetic_rows import CPU_NVML_REASON, H100, KINDS, K, demo_rows, footprint_row, make_rows, single_rows, wide_rows

from kvscope.reports.cells import ALL_TASKS, accuracy_cells, footprint_cells, memory_source, predicted_cells
from kvscope.reports.coverage import coverage
from kvscope.results.frames import Run, make_run
from kvscope.results.memory_rows import FootprintRow


def run_of(rows: tuple, *, samples: int | None = None, footprints: int | None = None) -> Run:
    return make_run(rows[0][:samples], rows[1][:footprints], info=rows[2], folder=".")


def test_accuracy_cells_are_the_plain_means() -> None:
    run = run_of(demo_rows())
    cells = accuracy_cells(run)
    assert len(cells) == 3 * 4 * 4
    for cell in cells.to_dict("records"):
        rows = run.samples[run.samples["method_label"] == cell["method_label"]]
        rows = rows[rows["length_tokens"] == cell["length_tokens"]]
        if cell["task"] != ALL_TASKS:
            rows = rows[rows["task"] == cell["task"]]
        assert cell["accuracy"] == pytest.approx(rows["score"].mean())
        assert cell["n"] == len(rows)
        assert cell["ci_low"] <= cell["accuracy"] <= cell["ci_high"]
        if cell["method_label"] != "dense":
            dense = run.samples[(run.samples["method_label"] == "dense")]
            keyed = rows.merge(dense, on=["task", "length_tokens", "sample"], suffixes=("", "_dense"))
            assert cell["difference_to_dense"] == pytest.approx((keyed["score"] - keyed["score_dense"]).mean())
            assert cell["n_pairs"] == len(rows)


def test_prompts_without_a_score_are_never_wrong_answers() -> None:
    run = run_of(wide_rows())
    cells = accuracy_cells(run).set_index(["task", "method_label", "length_tokens"])
    failed = cells.loc[(ALL_TASKS, "dense", 512 * K)]
    assert (failed["n"], failed["n_not_measured"]) == (0, 60)
    assert np.isnan(failed["accuracy"])
    assert failed["reason"].startswith("oom: CUDA out of memory")
    assert cells.loc[(ALL_TASKS, "recency", 512 * K)]["note"] == "dense and this method answered no common prompt"


def test_every_null_of_a_cell_has_its_words() -> None:
    for rows in (demo_rows(), wide_rows(tasks=1, samples=2), single_rows()):
        for count in (0, 3, None):
            cells = accuracy_cells(run_of(rows, samples=count))
            assert (cells.loc[cells["accuracy"].isna(), "reason"] != "").all()
            assert (cells.loc[cells["difference_to_dense"].isna(), "note"] != "").all()


def test_one_source_of_bytes_and_its_name() -> None:
    nvml = memory_source(run_of(wide_rows()))
    assert (nvml.kind, "NVML" in nvml.axis) == ("nvml", True)
    ledger = memory_source(run_of(demo_rows()))
    assert ledger.kind == "ledger"
    assert "not NVML" in ledger.axis
    assert CPU_NVML_REASON in ledger.caption
    none = memory_source(run_of(demo_rows(), footprints=0))
    assert "No footprint cell was measured" in none.caption


def test_one_unread_cell_turns_the_whole_figure_to_the_ledger() -> None:
    samples, footprints, info = wide_rows()
    blind = footprints[0].model_dump() | {
        "kv_nvml_bytes": None,
        "nvml_reason": "sampler died",
        "verdict": "not_measured",
    }
    source = memory_source(
        make_run(samples, [FootprintRow.model_validate(blind), *footprints[1:]], info=info, folder=".")
    )
    assert source.kind == "ledger"
    assert "not measured in 1 of" in source.caption
    assert "sampler died" in source.caption


def test_footprint_cells_add_what_is_missing() -> None:
    rows = demo_rows()
    cells = footprint_cells(run_of(rows, footprints=5))
    assert len(cells) == 8
    missing = cells[cells["status"] == "missing"]
    assert set(missing["reason"]) == {"not run yet"}
    assert list(cells["method_label"].drop_duplicates()) == ["dense", "sliding_window", "recency", "random"]
    assert missing["predicted_bytes"].notna().all()
    whole = footprint_cells(run_of(rows))
    assert (whole["held_bytes"] == whole["resident_kv_bytes"] + whole["metadata_bytes"]).all()


def test_predictions_come_from_the_plan_and_else_from_the_rows() -> None:
    rows = demo_rows()
    assert len(predicted_cells(run_of(rows, samples=0, footprints=0))) == 16
    planless = rows[2].model_copy(update={"plan": ()})
    found = predicted_cells(make_run([], rows[1], info=planless, folder="."))
    assert len(found) == 8
    row = footprint_row(KINDS["random"], length=8 * K)
    at = found[(found["method_label"] == "random") & (found["length_tokens"] == 8 * K)]
    assert at["predicted_bytes"].item() == row.predicted_kv_bytes


def test_coverage_of_a_complete_run() -> None:
    state = coverage(run_of(demo_rows()))
    assert state.complete
    assert state.sentences() == []
    assert (state.samples_expected, state.footprint_expected) == (160, 8)


def test_coverage_names_what_is_missing() -> None:
    (sentence,) = coverage(run_of(demo_rows(), samples=159, footprints=7)).sentences()
    assert sentence == (
        "Unfinished run: 159 of 160 sample rows and 7 of 8 footprint rows are there. Missing: 1 of 10 samples of "
        "random at 8K, the footprint of random at 8K."
    )


def test_coverage_names_failures_and_mismatches() -> None:
    rows = make_rows(
        ["dense", "recency"],
        machine=H100,
        tasks=("niah_single_1",),
        lengths=(512 * K,),
        samples=2,
        footprint_lengths=(512 * K,),
    )
    wrong = FootprintRow.model_validate(rows[1][1].model_dump() | {"verdict": "mismatch"})
    state = coverage(make_run(rows[0], [rows[1][0], wrong], info=rows[2], folder="."))
    assert state.complete
    sentences = state.sentences()
    assert sentences[0].startswith("Not measured: accuracy of dense at 512K (2 rows): oom (CUDA out of memory")
    assert sentences[1].startswith("Not measured: footprint of dense at 512K: oom")
    assert sentences[2] == "Mismatch: NVML does not confirm the saving of recency at 512K."
