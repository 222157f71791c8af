"""What a sweep prints while it runs: lines without a terminal, bars with one, nothing when silent."""

import sys

import pytest

from kvscope.harness.passes import progress as module
from kvscope.harness.passes.progress import PlainProgress, Progress, RichProgress, make_progress
from kvscope.units import format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.1 s"), (12.4, "12 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def drive(progress: Progress) -> None:
    with progress:
        progress.note("two rows are there already")
        progress.begin(cells=2, work_tokens=3000)
        progress.begin_cell("niah_single_1 1K", steps=2)
        for index in (1, 2):
            progress.begin_step(f"{index} of 2", parts=2)
            progress.part("prefill")
            progress.part("dense")
            progress.end_step(work_tokens=500)
        progress.end_cell("dense 1.00")
        progress.begin_cell("niah_single_1 2K", steps=1)
        progress.begin_step("1 of 1", parts=1)
        progress.part("[prefill]")
        progress.end_step(work_tokens=2000)
        progress.end_cell("dense 0.50")


def test_plain_lines_are_one_a_cell_with_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PLAIN_INTERVAL_S", float("inf"))
    drive(PlainProgress())
    out, err = capsys.readouterr()
    assert out == ""
    note, first, second = err.splitlines()
    assert note == "two rows are there already"
    assert first.startswith("[1/2] niah_single_1 1K: dense 1.00 (")
    assert "left)" in first
    assert second.startswith("[2/2] niah_single_1 2K: dense 0.50 (")
    assert "left" not in second


def test_less_than_a_tenth_says_nothing_of_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    progress = PlainProgress()
    progress.begin(cells=3, work_tokens=1000)
    for name, work_tokens in (("1K", 99), ("2K", 1), ("4K", 900)):
        progress.begin_cell(name, steps=1)
        progress.begin_step("1 of 1")
        progress.end_step(work_tokens=work_tokens)
        progress.end_cell("done")
    assert ["left" in line for line in capsys.readouterr().err.splitlines()] == [False, True, False]


def test_a_long_cell_speaks_in_between(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "PLAIN_INTERVAL_S", 0.0)
    drive(PlainProgress())
    assert "[1/2] niah_single_1 1K: prompt 1 of 2 done, about" in capsys.readouterr().err


def test_bars_reach_their_ends_and_print_the_cells(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RichProgress()
    drive(progress)
    sweep, cell, prompt = progress._bars.tasks
    assert (sweep.completed, sweep.total) == (3000, 3000)
    assert cell.finished
    assert prompt.finished
    err = capsys.readouterr().err
    assert "niah_single_1 1K: dense 1.00" in err
    assert "two rows are there already" in err


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    drive(make_progress(False))
    assert capsys.readouterr() == ("", "")


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_progress(), PlainProgress)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(make_progress(), RichProgress)
