"""Every file of a run folder is input: one sentence for whatever is wrong with it, and no waiting."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_rows import demo_rows, single_rows

from kvscope.errors import UsageError
from kvscope.results import limits
from kvscope.results.frames import load_run
from kvscope.results.packed import Rows, write_packed
from kvscope.results.plain_text import shortened, visible
from kvscope.results.reading import parse_json
from kvscope.results.store import run_folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    samples, footprints, info = single_rows()
    (tmp_path / "run.json").write_text(info.model_dump_json())
    (tmp_path / "samples.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in samples))
    (tmp_path / "footprint.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in footprints))
    return tmp_path


def sentence(folder: Path) -> str:
    """What a user reads."""
    with pytest.raises(UsageError) as caught:
        load_run(folder)
    text = str(caught.value)
    assert len(text) < 1200
    assert "\n" not in text
    return text


def edited(path: Path, **updates: Any) -> None:
    """Change the first line's columns (or the whole file's, of run.json)."""
    first, *others = path.read_text().split("\n", 1)
    path.write_text("\n".join([json.dumps(json.loads(first) | updates), *others]))


@pytest.mark.parametrize("name", ["run.json", "samples.jsonl", "footprint.jsonl", "max_context.jsonl"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop", "dangling", "large"])
def test_regular_files_alone_are_read(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        path.touch()
        os.truncate(path, limits.MOST_ROWS_FILE_BYTES + 1)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "dangling": folder / "absent"}[kind])
    assert str(path) in sentence(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "levels of lists"),
        ('{"a":' * 100_000, "levels of lists"),
        ("[" * 70 + "]" * 70, "more than 64 levels"),
        ("NaN", "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("1e999", "too large"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("9" * 5000, "digits"),
        ("\x00", "Expecting value"),
    ],
)
def test_json_is_strict(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    with pytest.raises(ValueError, match=message):
        parse_json(text.encode())


def test_json_of_ordinary_depth_is_read() -> None:
    assert parse_json("[" * 60 + "]" * 60)
    assert parse_json(json.dumps([[i] for i in range(200)])) == [[i] for i in range(200)]


@pytest.mark.parametrize(
    "updates",
    [
        {"sample": 2**63},
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
        {"resident_kv_bytes": 2**53 + 1},
        {"length_tokens": -1},
        {"host_kv_bytes": -5},
        {"method_label": "x" * 20_000},
        {"task": "x" * 20_000},
        {"decode_s": 1e300},
        {"schema_version": 0},
        {"schema_version": 10**30},
        {"score": True, "output": "\ud800"},
        {"task": "unknown"},
        {"sample": 77},
        {"length_tokens": 999},
        {"method_label": "unknown"},
        {"method": "quest"},
        {"model": "another"},
        {"config": {"a": {"b": [[[[]]]] * 3}, "c": "\udc00"}},
        {"prompt_tokens": "many"},
    ],
)
def test_rows_that_nobody_asked_for_or_no_column_holds(folder: Path, updates: dict[str, Any]) -> None:
    edited(folder / "samples.jsonl", **updates)
    sentence(folder)


@pytest.mark.parametrize(
    "updates",
    [
        {"methods": []},
        {"methods": None},
        {"seed": 2**63},
        {"samples": 2**63},
        {"tasks": ["a", "a"]},
        {"tasks": [f"task {i}" for i in range(1001)]},
        {"lengths_tokens": list(range(1, 1002))},
        {"lengths_tokens": [2**63]},
        {"model": "m" * 20_000},
        {"model": "\ud800"},
        {"config": {"deep": json.loads("[" * 80 + "]" * 80)}},
        {"schema_version": 2},
        {"environment": []},
    ],
)
def test_run_files_out_of_bounds(folder: Path, updates: dict[str, Any]) -> None:
    edited(folder / "run.json", **updates)
    assert "run.json" in sentence(folder)


def test_refreshes_of_two_lengths_are_refused(folder: Path) -> None:
    record = {"tau": 4, "prompt_tokens": 9, "resident_tokens": [1, 2], "recalled_bytes": [0], "fallbacks": 0}
    edited(folder / "samples.jsonl", residency=record)
    assert "one entry a refresh" in sentence(folder)


def test_a_line_that_is_too_long_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvscope.results.rowfile.MOST_LINE_BYTES", 100)
    assert re.search(r"samples\.jsonl, line 1 has [\d,]+ bytes, at most 100", sentence(folder))


def test_seeds_of_64_bits_are_read(folder: Path) -> None:
    edited(folder / "samples.jsonl", seed=limits.MOST_SEED)
    edited(folder / "run.json", seed=limits.LEAST_SEED)
    run = load_run(folder)
    assert (run.samples["seed"].max(), run.info.seed) == (limits.MOST_SEED, limits.LEAST_SEED)


def repacked(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


@pytest.mark.parametrize("name", ["samples", "prompts", "footprint"])
@pytest.mark.parametrize("fault", ["without", "unknown", "twice", "cut", "text", "fifo", "absent"])
def test_packed_runs_are_input_too(tmp_path: Path, name: str, fault: str) -> None:
    samples, footprints, info = demo_rows()
    write_packed(tmp_path, info, Rows(samples=samples[:40], footprints=footprints))
    path = tmp_path / f"{name}.parquet"
    key = "sample" if name != "footprint" else "method_label"
    if fault == "without":
        repacked(path, lambda table: table.drop_columns([key]))
    elif fault == "unknown":
        repacked(path, lambda table: table.append_column("odd", [[1] * len(table)]))
    elif fault == "twice":
        repacked(path, lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif fault == "text":
        column = "targets" if name == "prompts" else "config"
        repacked(
            path, lambda table: table.set_column(table.column_names.index(column), column, [["[" * 9999] * len(table)])
        )
    elif fault == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif name == "prompts":
        path.unlink()
    else:
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    assert str(tmp_path) in sentence(tmp_path)


def test_runs_of_a_folder_are_found_though_one_is_a_loop(folder: Path) -> None:
    bad = folder / "runs/bad"
    bad.mkdir(parents=True)
    (bad / "run.json").symlink_to(bad / "run.json")
    good = folder / "runs/good"
    good.mkdir()
    (good / "run.json").write_bytes((folder / "run.json").read_bytes())
    assert run_folders(folder / "runs") == [bad, good]


def test_hidden_characters_are_written_out() -> None:
    assert visible("a\x1b[31m\x07\x9b\u202eb\n\ud800 é 模型") == r"a\x1b[31m\x07\x9b\u202eb\n\ud800 é 模型"
    assert shortened("abcdefghij", most=10) == "abcdefghij"
    assert shortened("abcdefghij" * 9, most=10) == "abcdef…hij"
