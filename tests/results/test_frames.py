"""A run as pandas frames: exact integers, nulls kept, columns even without rows."""

from pathlib import Path

import pandas as pd
from synthetic_rows import demo_rows, wide_rows

import kvscope
from kvscope.results.frames import load_run, make_run
from kvscope.results.memory_rows import FootprintRow
from kvscope.results.schema import SampleRow
from kvscope.results.store import RunStore


def test_load_run_gives_two_frames(tmp_path: Path) -> None:
    samples, footprints, info = demo_rows()
    with RunStore.create(tmp_path, info) as store:
        for row in samples:
            store.append_sample(row)
        for cell in footprints:
            store.append_footprint(cell)
    run = kvscope.load_run(tmp_path)
    assert list(run.samples.columns) == list(SampleRow.model_fields)
    assert list(run.footprint.columns) == list(FootprintRow.model_fields)
    assert (len(run.samples), len(run.footprint)) == (160, 8)
    assert run.samples["score"].dtype == "float64"
    assert run.samples["resident_kv_bytes"].dtype == "Int64"
    assert run.samples["noop"].dtype == "boolean"
    assert run.samples["targets"].iloc[0] == ("1000000",)
    assert run.samples["config"].iloc[0] == {"recency_tokens": 128}
    assert run.samples["resident_kv_bytes"].tolist() == [row.resident_kv_bytes for row in samples]
    assert run.footprint["kv_nvml_bytes"].isna().all()
    assert run.footprint["nvml_reason"].str.contains("no NVIDIA GPU").all()
    assert run.info == info


def test_frames_of_an_empty_run_have_their_columns_and_types(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, demo_rows()[2]) as store:
        store.begin()
    run = load_run(tmp_path)
    assert run.samples.empty
    assert run.samples["resident_kv_bytes"].dtype == "Int64"
    assert list(run.footprint.columns) == list(FootprintRow.model_fields)


def test_a_torn_line_is_reported(tmp_path: Path) -> None:
    samples, _, info = demo_rows()
    with RunStore.create(tmp_path, info) as store:
        store.append_sample(samples[0])
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(b'{"schema_ver')
    run = load_run(tmp_path)
    assert len(run.samples) == 1
    assert "cut short" in run.messages[0]


def test_rows_that_were_not_measured_stay_null() -> None:
    samples, footprints, info = wide_rows()
    run = make_run(samples, footprints, info=info, folder=".")
    failed = run.samples[run.samples["status"] == "oom"]
    assert len(failed) > 0
    assert failed["score"].isna().all()
    assert failed["resident_kv_bytes"].isna().all()
    assert bool(pd.notna(failed["reason"]).all())
