"""What the recipe at equal bytes has measured: counted, packed by whole lengths, gone on from, and never lost."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_scripts import load_script
from synthetic_rows import KINDS, K, Kind, Rows, make_rows

from kvscope.errors import UsageError
from kvscope.results.frames import load_run
from kvscope.results.store import RunStore, read_info

TASKS, LENGTHS, SAMPLES = ("niah_single_1", "vt"), (4 * K, 16 * K), 3
KEPT = Kind("snapkv", "-", "-", "-", "freed", 0.4, finds=0.9, options=(("share", 0.25),))
VALUES: dict[str, Any] = {
    "model": "reference",
    "methods": ["dense", "recency", KEPT.label],
    "tasks": list(TASKS),
    "lengths_tokens": list(LENGTHS),
    "samples": SAMPLES,
    "footprint": False,
}
Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(monkeypatch, "equal_bytes")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    monkeypatch.setitem(KINDS, KEPT.label, KEPT)
    samples, footprints, info = make_rows(
        VALUES["methods"], tasks=TASKS, lengths=LENGTHS, samples=SAMPLES, footprint_lengths=(4 * K,)
    )
    identity = {**info.identity, "methods": VALUES["methods"], "footprint": False, "method_from": "last_token"}
    config = {**info.config, "device": "cpu", "jobs": 2}
    return samples, footprints, info.model_copy(update={"identity": identity, "config": config})


def measure(folder: Path, rows: Rows, *, lacking: Callable[[Any], bool] = lambda row: False) -> None:
    """Write the run folder of a run that ended before some rows."""
    with RunStore.create(folder, rows[2]) as store:
        store.begin()
        store.append_samples([row for row in rows[0] if not lacking(row)])


def long_and_late(row: Any) -> bool:
    """Of the longer length, the prompts in the middle: a run of many jobs leaves such gaps."""
    return bool(row.length_tokens == 16 * K and row.sample == 1)


def test_whole_lengths_are_packed_and_a_run_goes_on_from_them(script: ModuleType, rows: Rows, tmp_path: Path) -> None:
    first, second, packed = tmp_path / "first", tmp_path / "second", tmp_path / "equal-bytes"
    measure(first / "known", rows, lacking=long_and_late)
    assert not script.is_done("accuracy", VALUES, first)
    script.pack_all(first, packed, VALUES)
    assert read_info(packed).lengths_tokens == (4 * K,)
    assert "--device cpu --jobs 2" in (read_info(packed).parts[0].command or "")

    said: list[str] = []
    script.start_from(packed, second, tell=said.append)
    assert "begins with 18 answers" in said[0]
    assert not (second / "unknown").exists()
    there = [row for row in rows[0] if row.length_tokens == 4 * K]
    assert RunStore.open(second / "known").samples() == there
    # Only what is asked for counts: a length of its own is not done because others are.
    assert script.is_done("accuracy", {**VALUES, "lengths_tokens": [4 * K]}, second)
    assert not script.is_done("accuracy", {**VALUES, "lengths_tokens": [16 * K]}, second)
    assert not script.is_done("accuracy", {**VALUES, "samples": SAMPLES + 1}, second)

    # The run goes on as `kvscope run` does: the same folder takes the other length, and measures what lacks alone.
    with RunStore.create(second / "known", rows[2]) as store:
        left = [
            row for row in rows[0] if not store.has_sample((row.task, row.length_tokens, row.sample, row.method_label))
        ]
        assert {row.length_tokens for row in left} == {16 * K}
        store.append_samples(left)
    script.start_from(packed, second, tell=said.append)
    assert "goes on as it is" in said[1]
    assert script.is_done("accuracy", VALUES, second)
    script.pack_all(second, packed, VALUES)
    assert read_info(packed).lengths_tokens == LENGTHS
    assert len(load_run(packed).samples) == len(rows[0])


def test_times_are_packed_and_begun_from_as_well(script: ModuleType, rows: Rows, tmp_path: Path) -> None:
    measure(tmp_path / "known", rows)
    with RunStore.create(tmp_path / "known", rows[2]) as store:
        for row in rows[1]:
            store.append_footprint(row)
    asked = {**VALUES, "methods": ["dense", "recency"]}
    assert script.is_done("times", {**asked, "lengths_tokens": [4 * K]}, tmp_path)
    assert not script.is_done("times", asked, tmp_path)
    script.pack_all(tmp_path, tmp_path / "packed", VALUES)
    script.start_from(tmp_path / "packed", tmp_path / "next", tell=lambda text: None)
    assert RunStore.open(tmp_path / "next" / "known").footprints() == rows[1]
    (tmp_path / "next" / "known" / "footprint.jsonl").unlink()
    with pytest.raises(UsageError, match=r"holds 3 rows that .* lacks"):
        script.pack_all(tmp_path / "next", tmp_path / "packed", VALUES)


def test_the_result_has_whole_lengths_and_says_what_lacks(script: ModuleType, rows: Rows, tmp_path: Path) -> None:
    measure(tmp_path / "known", rows, lacking=long_and_late)
    result = script.result_of(script.found_runs([], tmp_path), VALUES)
    assert {cell["length_tokens"] for cell in result["cells"]} == {4 * K}
    assert {cell["n"] for cell in result["cells"]} == {len(TASKS) * SAMPLES}
    accuracy = [row for row in result["not_measured"] if row["step"] == "accuracy"]
    assert accuracy == [{"step": "accuracy", "length_tokens": 16 * K, "rows_asked": 18, "rows_there": 12}]
    assert {row["step"] for row in result["not_measured"]} == {"accuracy", "question", "times"}
    assert "question" not in result
    off = result["more_than_a_tenth_off"]
    assert [(row["method_label"], row["asked_of"]) for row in off] == [(KEPT.label, "held")]
    assert abs(off[0]["came_to"] - 0.25) > 0.025


def test_the_question_is_paired_where_both_are_whole(script: ModuleType, rows: Rows, tmp_path: Path) -> None:
    measure(tmp_path / "known", rows)
    samples, footprints, info = rows
    asked = script.checked(script.step_values("question", VALUES))
    labels = {str(spec.label) for spec in asked.methods}
    assert labels == set(VALUES["methods"])
    info = info.model_copy(update={"identity": {**info.identity, "method_from": "question"}})
    samples = [row.model_copy(update={"method_from": "question"}) for row in samples]
    measure(tmp_path / "unknown", (samples, footprints, info), lacking=long_and_late)
    script.pack_all(tmp_path, tmp_path / "packed", VALUES)
    folders = [tmp_path / "packed", tmp_path / "packed-question"]
    result = script.result_of(script.found_runs(folders, tmp_path / "none"), VALUES)
    assert {row["length_tokens"] for row in result["question"]} == {4 * K}
    assert {(row["step"], row["length_tokens"]) for row in result["not_measured"]} == {
        ("question", 16 * K), ("times", 4 * K), ("times", 16 * K),
    }  # fmt: skip
    script.start_from(folders[0], tmp_path / "next", tell=lambda text: None)
    assert read_info(tmp_path / "next" / "unknown").identity["method_from"] == "question"
    with pytest.raises(UsageError, match="both have the question known"):
        script.found_runs([folders[0], tmp_path / "known"], tmp_path)
    with pytest.raises(UsageError, match="has the question unknown"):
        script.found_runs([folders[1]], tmp_path)


def test_nothing_is_packed_without_a_whole_length_and_nothing_is_lost(
    script: ModuleType, rows: Rows, tmp_path: Path
) -> None:
    measure(tmp_path / "all" / "known", rows)
    measure(tmp_path / "some" / "known", rows, lacking=long_and_late)
    measure(tmp_path / "none" / "known", rows, lacking=lambda row: row.sample == 1)
    packed = tmp_path / "packed"
    with pytest.raises(UsageError, match="every row of no length"):
        script.pack_all(tmp_path / "none", packed, VALUES)
    assert not packed.exists()
    script.pack_all(tmp_path / "all", packed, VALUES)
    with pytest.raises(UsageError, match=r"holds 18 rows that .* lacks \(the first: dense, niah_single_1, 16384"):
        script.pack_all(tmp_path / "some", packed, VALUES)
    with pytest.raises(UsageError, match=r"no run that `equal_bytes\.py pack` wrote"):
        script.start_from(tmp_path / "all" / "known", tmp_path / "next", tell=lambda text: None)
    assert not (tmp_path / "next").exists()
