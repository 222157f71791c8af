"""The quick reading of a row gives what the strict one gives, or leaves the line to it."""

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_rows import make_rows, wide_rows

from kvscope.errors import UsageError
from kvscope.results.frames import load_run
from kvscope.results.memory_rows import FootprintRow
from kvscope.results.quick import quick_row
from kvscope.results.reading import parse_json
from kvscope.results.schema import ResidencyRecord, SampleRow
from kvscope.results.store import RunStore

RESIDENCY = ResidencyRecord(tau=4, prompt_tokens=9, resident_tokens=(4, 5), recalled_bytes=(0, 9), fallbacks=0)
NESTED = {"residency": RESIDENCY, "config": {"a": {"b": [{"c": 1.5}, "é"]}}, "kv_bytes_by_kind": {"k": 1}}
ROW = wide_rows(tasks=1, samples=1)[0][0].model_copy(update=NESTED)


def changed(old: str, new: str) -> bytes:
    text = ROW.model_dump_json()
    assert old in text
    return text.replace(old, new, 1).encode()


@pytest.mark.parametrize("rows", [wide_rows()[0][::7], [ROW]], ids=["synthetic", "nested"])
def test_ordinary_rows_are_read_quickly_and_alike(rows: list[SampleRow]) -> None:
    for row in rows:
        for text in (
            row.model_dump_json(),
            json.dumps(row.model_dump(mode="json")),
            row.model_dump_json(exclude_none=True),
        ):
            found = quick_row(text.encode(), SampleRow)
            assert found == row == SampleRow.model_validate(parse_json(text))


def test_rows_of_memory_are_read_quickly_and_alike() -> None:
    for row in wide_rows()[1]:
        assert quick_row(row.model_dump_json().encode(), FootprintRow) == row


@pytest.mark.parametrize(
    "line",
    [
        changed('"tau":4', '"tau":4,"tau":4'),
        changed('"c":1.5', '"c":1.5,"c":1.5'),
        changed('"noop":', '"noop" :false,"noop":'),
        changed('"noop":', '"noop"\t:false,"noop":'),
        changed('"c":1.5', '"c":1e999'),
        changed('"c":1.5', '"c":NaN'),
        changed('"c":1.5', '"c":[-Infinity]'),
        changed('"c":1.5', '"c":' + "9" * 5000),
        changed('"c":1.5', '"c":' + "[" * 63 + "]" * 63),
        changed('"c":1.5', '"c":01'),
        changed('"c":1.5', '"c":+1'),
        changed('"c":1.5', '"c":1.5,'),
        changed('"é"', '"\\ud800"'),
        changed('"é"', '"\x01"'),
        changed('"é"', '"é').replace(b"\xc3\xa9", b"\xff\xfe"),
        changed('"schema_version":1', '"schema_version":2'),
        changed('"status":"ok"', '"status":"oom"'),
        changed('"noop":', '"more":1,"noop":'),
        b"\xef\xbb\xbf" + changed('"tau":4', '"tau":5'),
        changed('"tau":4', '"tau":5') + b"x",
        b"",
        b"[]",
    ],
)
def test_what_the_strict_reading_refuses_is_left_to_it(line: bytes) -> None:
    assert quick_row(line, SampleRow) is None


@pytest.mark.parametrize("text", ['{"a": 1}', 'a ":" b', "tab\t: é \U0001f600", '" : "'])
def test_odd_texts_are_read_one_way_or_the_other(tmp_path: Path, text: str) -> None:
    samples, _, info = make_rows(["dense"], tasks=("t",), lengths=(4096,), samples=1, footprint_lengths=())
    row = samples[0].model_copy(update={"output": text})
    with RunStore.create(tmp_path, info) as store:
        store.append_sample(row)
    for ascii_only in (True, False):
        line = json.dumps(row.model_dump(mode="json"), ensure_ascii=ascii_only)
        (tmp_path / "samples.jsonl").write_text(line + "\n")
        assert load_run(tmp_path).samples["output"].tolist() == [text]


def folder_of(tmp_path: Path, *outcomes: dict[str, Any]) -> Path:
    samples, _, info = make_rows(["dense"], tasks=("t",), lengths=(4096,), samples=2, footprint_lengths=())
    failed = {"status": "failed", "reason": "torn", "score": None, "output": None}
    rows = [samples[0].model_dump(mode="json") | failed, samples[1].model_dump(mode="json")]
    rows += [samples[0].model_dump(mode="json") | outcome for outcome in outcomes]
    (tmp_path / "run.json").write_text(info.model_dump_json())
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_later_row_of_a_cell_counts_in_the_place_of_the_earlier(tmp_path: Path) -> None:
    frame = load_run(folder_of(tmp_path, {"output": "later"})).samples
    assert frame["sample"].tolist() == [0, 1]
    assert frame["status"].tolist() == ["ok", "ok"]
    assert frame["output"].iloc[0] == "later"
    assert frame.index.tolist() == [0, 1]


def test_a_second_result_of_a_cell_is_refused_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 4 holds the same cell as line 3"):
        load_run(folder_of(tmp_path, {}, {}))
