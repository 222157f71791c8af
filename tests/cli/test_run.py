"""The whole way through the command line: run, resume, report, on a tiny model."""

import json
from pathlib import Path

import pytest
import stand_ins

from kvscope import cli
from kvscope.methods import registry
from kvscope.reports import build
from kvscope.results.columns import SURROUNDINGS_COLUMNS, TIME_COLUMNS


@pytest.fixture
def arguments(tiny_model: str, tmp_path: Path) -> list[str]:
    return [
        "--model", tiny_model, "-m", "dense", "-m", "recency:recency_tokens=128", "--task", "niah_single_1",
        "-l", "512", "-l", "1k", "-n", "2", "--max-new-tokens", "2", "--device", "cpu", "--out", str(tmp_path / "run"),
    ]  # fmt: skip


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that ask whether there is a report: its figures take longer than all the rest of a run."""
    monkeypatch.setattr(build, "all_figures", lambda run, cells: [])


def test_plan_runs_nothing(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert "recency:recency_tokens=128" in out
    assert "4 prompts, each prefilled once for 2 methods" in out
    assert not (tmp_path / "run").exists()


def test_a_plan_as_json_has_what_its_text_says(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli(["plan", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["methods"] == ["dense", "recency:recency_tokens=128"]
    assert (found["tasks"], found["lengths_tokens"], found["samples"]) == (["niah_single_1"], [512, 1024], 2)
    cells = {(cell["method_label"], cell["length_tokens"]): cell for cell in found["cells"]}
    assert len(cells) == 4
    dense, recency = (cells[label, 1024] for label in found["methods"])
    assert recency["predicted_kv_bytes"] < dense["predicted_kv_bytes"] == 1024 * found["kv_bytes_per_token"]
    assert [cell["length_tokens"] for cell in found["batch"]] == [512, 1024]
    assert found["config"]["max_new_tokens"] == 2


@pytest.mark.slow
def test_run_prints_tables_and_paths_and_the_same_command_resumes(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", *arguments, "--footprint-length", "512", "--set", "footprint_decode_tokens=4"]
    assert cli.run_cli(command) == 0
    out, err = capsys.readouterr()
    assert "recency:recency_tokens=128" in out
    report = tmp_path / "run" / "report" / "report.html"
    assert report.is_file()
    assert str(report) in out
    assert "[1/4] niah_single_1 512: dense 0.00" in err
    assert "footprint dense 512" in err
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()

    assert cli.run_cli(command) == 0
    out, err = capsys.readouterr()
    assert "All 10 rows are there already: nothing left to measure." in err
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before

    assert cli.run_cli(["report", str(tmp_path / "run")]) == 0
    assert str(report) in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures")
def test_failed_cells_end_with_one_and_a_line_each(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.METHODS, "failing", stand_ins.METHODS["failing"])
    assert cli.run_cli(["run", *arguments, "-m", "failing", "--no-footprint", "--quiet"]) == 1
    assert capsys.readouterr().err == "accuracy: failing: 4 failed: decode: RuntimeError: the page table is torn\n"


def measured(folder: Path) -> list[dict[str, object]]:
    """Rows without what differs from one time to the next: times, and what else the machine did then."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    unlike = TIME_COLUMNS | SURROUNDINGS_COLUMNS
    return [{key: value for key, value in row.items() if key not in unlike} for row in rows]


@pytest.mark.usefixtures("no_figures")
def test_no_report_leaves_rows_alone_and_the_report_can_follow(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", *arguments, "--no-footprint", "-q"]
    assert cli.run_cli([*command, "--no-report"]) == 0
    assert capsys.readouterr().out == f"rows     {tmp_path / 'run'}\n"
    assert not (tmp_path / "run" / "report").exists()
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()

    # It is no part of what a folder belongs to: the same command with a report finds every row.
    assert cli.run_cli(command) == 0
    assert (tmp_path / "run" / "report" / "report.html").is_file()
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before

    other = [*arguments[:-1], str(tmp_path / "other")]
    assert cli.run_cli(["run", *other, "--no-footprint", "-q", "--report"]) == 0
    assert measured(tmp_path / "other") == measured(tmp_path / "run")
    assert len(measured(tmp_path / "run")) == 8


def test_no_report_ends_with_one_for_failed_cells_and_two_for_bad_input(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.METHODS, "failing", stand_ins.METHODS["failing"])
    command = ["run", *arguments, "--no-footprint", "--no-report", "--quiet"]
    assert cli.run_cli([*command, "-m", "failing"]) == 1
    out, err = capsys.readouterr()
    assert out == f"rows     {tmp_path / 'run'}\n"
    assert err == "accuracy: failing: 4 failed: decode: RuntimeError: the page table is torn\n"
    assert cli.run_cli([*command, "-m", "nowhere"]) == 2
    assert cli.run_cli(["plan", *arguments, "--no-report"]) == 2, "a plan has no report to leave out"
