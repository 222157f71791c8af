"""Runs set against a first one: what is paired, what is named as left out, and the limits that end with code 1."""

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_rows import Rows, demo_rows, make_rows

from kvscope.cli import run_cli
from kvscope.results.store import RunStore

TASK = "niah_single_1"


def stored(folder: Path, rows: Rows) -> str:
    with RunStore.create(folder, rows[2]) as store:
        store.begin()
        for row in rows[0]:
            store.append_sample(row)
        for cell in rows[1]:
            store.append_footprint(cell)
    return str(folder)


def small(*labels: str, samples: int = 8) -> Rows:
    return make_rows(list(labels), tasks=(TASK,), lengths=(2048,), samples=samples, footprint_lengths=(2048,))


def values(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert run_cli(["compare", *arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def changed(rows: Rows, *, samples: dict[str, Any] | None = None, cells: dict[str, Any] | None = None) -> Rows:
    """The rows of dense and recency, those of recency with other values."""
    new = [row.model_copy(update=samples or {}) if row.method == "recency" else row for row in rows[0]]
    new_cells = [cell.model_copy(update=cells or {}) if cell.method == "recency" else cell for cell in rows[1]]
    return new, new_cells, rows[2]


def test_the_same_methods_are_paired_on_the_same_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = demo_rows()
    worse = [row.model_copy(update={"score": 0.0}) if row.method == "dense" else row for row in rows[0]]
    info = rows[2].model_copy(update={"kvscope_version": "0.9.0"})
    cells = [
        cell.model_copy(update={"config": {**cell.config, "new": 1}}) if cell.method == "random" else cell
        for cell in rows[1]
    ]
    a, b = stored(tmp_path / "a", rows), stored(tmp_path / "b", (worse, cells, info))
    (found,) = values(capsys, a, b)["comparisons"]
    pooled = {row["method_label"]: row for row in found["accuracy"] if row["scope"] == "all prompts"}
    right = sum(row.score or 0 for row in rows[0] if row.method == "dense")
    assert pooled["dense"]["paired"]["n_pairs"] == 40
    assert pooled["dense"]["paired"]["difference"]["mean"] == pytest.approx(-right / 40)
    assert (pooled["dense"]["paired"]["lost"], pooled["dense"]["verdict"]) == (right, "worse")
    assert pooled["recency"]["paired"]["difference"]["mean"] == 0
    assert found["unmatched_prompts"] == []
    assert {(pair["n_same_answers"], pair["n_answers"]) for pair in found["methods"]} == {(40, 40)}
    differences = [tuple(each.values()) for each in found["differences"]]
    assert differences == [
        ("version", "kvscope", '"0.1.0"', '"0.9.0"'),
        ("settings", "random 2048.new", "-", "1"),
        ("settings", "random 8192.new", "-", "1"),
    ]
    sources = {(cell["length_tokens"], cell["source"]) for cell in found["cells"]}
    assert sources == {(1024, "answers"), (2048, "footprint"), (4096, "answers"), (8192, "footprint")}


def test_two_methods_of_two_folders_are_set_against_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = stored(tmp_path / "a", small("dense", "quest")), stored(tmp_path / "b", small("dense", "recency"))
    (found,) = values(capsys, a, b)["comparisons"]
    assert [(pair["baseline"], pair["method"]) for pair in found["methods"]] == [
        ("dense", "dense"),
        ("quest", "recency"),
    ]
    assert [row["paired"]["lost"] for row in found["accuracy"]] == [0, 8]
    (found,) = values(capsys, a, b, "--pair", "dense", "recency")["comparisons"]
    assert found["methods"] == [{"baseline": "dense", "method": "recency", "n_answers": 8, "n_same_answers": 0}]
    assert found["methods_left_out"] == {"A": ["quest"], "B": ["dense"]}


def test_several_methods_of_ones_own_are_named_as_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = stored(tmp_path / "a", small("dense", "quest"))
    b = stored(tmp_path / "b", small("dense", "recency", "random"))
    assert run_cli(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "Methods of A that are compared with nothing: quest (see --pair)." in out
    assert "Methods of B that are compared with nothing: recency, random (see --pair)." in out


def test_prompts_without_a_partner_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = small("dense", "recency")
    failed = {"status": "oom", "reason": "memory", "score": None, "output": None}
    others = [
        row.model_copy(update={"prompt_sha256": "0" * 63 + str(row.sample)} if row.sample < 2 else {})
        for row in rows[0]
    ]
    others = [row.model_copy(update=failed) if row.sample == 4 and row.method == "recency" else row for row in others]
    a, b = stored(tmp_path / "a", rows), stored(tmp_path / "b", (others, rows[1], rows[2]))
    (found,) = values(capsys, a, b)["comparisons"]
    gaps = {(gap["methods"][0], gap["why"]): gap["n"] for gap in found["unmatched_prompts"]}
    assert gaps == {
        ("dense", "only in A"): 2, ("dense", "only in B"): 2,
        ("recency", "only in A"): 2, ("recency", "only in B"): 2, ("recency", "no answer in B (oom)"): 1,
    }  # fmt: skip
    assert "2 prompts of the same task, length and number have another text" in found["notes"][0]
    assert [row["paired"]["n_pairs"] for row in found["accuracy"]] == [6, 5]
    assert run_cli(["compare", a, b, "--fail-if", "accuracy:-1pt"]) == 1
    out, err = capsys.readouterr()
    line = next(line for line in out.splitlines() if "no answer in B (oom)" in line)
    assert line.split() == ["1", TASK, "2K", "no", "answer", "in", "B", "(oom)", "recency"]
    assert err == "accuracy:-1pt is crossed by B: 1 prompts that A answered have no answer of recency\n"


def test_a_prompt_is_known_by_its_text_whatever_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = small("dense")
    turned = [row.model_copy(update={"sample": 7 - row.sample}) for row in rows[0]]
    a, b = stored(tmp_path / "a", rows), stored(tmp_path / "b", (turned, rows[1], rows[2]))
    (found,) = values(capsys, a, b)["comparisons"]
    assert found["accuracy"][0]["paired"]["n_pairs"] == 8
    assert found["unmatched_prompts"] == []


@pytest.mark.parametrize(
    ("limit", "samples", "cells", "words"),
    [
        ("accuracy:-1pt", {"score": 0.0}, {}, "accuracy of recency"),
        ("footprint:+5%", {}, {"metadata_bytes": 10**6}, "footprint of recency at 2K +"),
        ("host:+5%", {}, {"host_kv_bytes": 1}, "host of recency at 2K from nil"),
        ("tpot:+10%", {}, {"tpot_s": 5.0, "load_1min": 9.0, "cpu_cores": 2}, "not to be trusted: B: host load"),
        ("ttft:+0%", {}, {"ttft_s": 99.0}, "ttft of recency at 2K +"),
        ("tpot:+99%", {}, {"status": "oom", "reason": "x", "verdict": "not_measured"}, "was not measured (oom)"),
    ],
)  # fmt: skip
def test_a_crossed_limit_is_named_and_ends_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str, samples: Any, cells: Any, words: str
) -> None:
    rows = small("dense", "recency")
    rows = ([row.model_copy(update={"score": 1.0}) for row in rows[0]], rows[1], rows[2])
    a, b = stored(tmp_path / "a", rows), stored(tmp_path / "b", changed(rows, samples=samples, cells=cells))
    assert run_cli(["compare", a, b, "--fail-if", limit]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{limit} is crossed by B: ")
    assert words in line
    assert run_cli(["compare", b, a, "--fail-if", "accuracy:-1pt", "--fail-if", "footprint:+5%"]) == 0
    capsys.readouterr()
    assert values(capsys, a, b, "--fail-if", limit, code=1)["crossed"] == [line]


def test_a_change_of_just_the_limit_does_not_cross_it(tmp_path: Path) -> None:
    rows = small("dense", samples=100)
    rows = ([row.model_copy(update={"score": 1.0}) for row in rows[0]], rows[1], rows[2])
    lost = [row.model_copy(update={"score": float(row.sample != 5)}) for row in rows[0]]
    slower = [cell.model_copy(update={"tpot_s": 1.1 * cell.tpot_s}) for cell in rows[1] if cell.tpot_s]
    a, b = stored(tmp_path / "a", rows), stored(tmp_path / "b", (lost, slower, rows[2]))
    assert run_cli(["compare", a, b, "--fail-if", "accuracy:-1pt", "--fail-if", "tpot:+10%"]) == 0
    assert run_cli(["compare", a, b, "--fail-if", "accuracy:-0.9pt"]) == 1
    assert run_cli(["compare", a, b, "--fail-if", "tpot:+9.9%"]) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--fail-if", "acuracy:-1pt"), "Did you mean 'accuracy'?"),
        (("--fail-if", "accuracy:+1%"), "cannot read 'accuracy:+1%'"),
        (("--fail-if", "tpot:+x%"), "cannot read 'tpot:+x%'"),
        (("--pair", "dense", "nope"), "has no method 'nope'"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    a, b = stored(tmp_path / "a", small("dense")), stored(tmp_path / "b", small("dense"))
    assert run_cli(["compare", a, b, *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = stored(tmp_path / "a", small("dense"))
    rows = make_rows(["dense"], tasks=("vt",), lengths=(4096,), samples=2, footprint_lengths=())
    other = stored(tmp_path / "other", rows)
    apart = stored(tmp_path / "apart", small("quest", "recency"))
    for arguments, words in (
        ([a], "takes 2 to 26 folders"),
        ([a, a], "given twice"),
        ([a, str(tmp_path)], "holds no run"),
        ([a, other], "no answered prompt and no footprint cell in common"),
        ([a, apart], "no method in common (dense against quest, recency)"),
        ([a, other, "--pair", "dense", "dense"], "no answered prompt"),
    ):
        assert run_cli(["compare", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_a_limit_that_cannot_be_judged_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = small("dense")
    a, b = stored(tmp_path / "a", rows), stored(tmp_path / "b", (rows[0], [], rows[2]))
    assert run_cli(["compare", a, b, "--fail-if", "tpot:+10%"]) == 2
    assert "have no tpot in common" in capsys.readouterr().err
