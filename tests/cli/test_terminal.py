"""What is printed cannot steer a terminal, and a fault of our own is one sentence, a code and a file."""

import re
from pathlib import Path
from typing import Any

import pytest
from synthetic_rows import wide_rows

import kvscope
from kvscope import cli
from kvscope.harness.info.catalog import list_text
from kvscope.harness.passes import sweep
from kvscope.harness.passes.progress import PlainProgress, RichProgress
from kvscope.reports.summary import summary_text
from kvscope.results.frames import make_run
from kvscope.terminal import folded, grid, printable

HOSTILE = "a\x1b[2Jb\x9b31mc\u202ed\x07\r\x00\x7f\udc80"
HARMLESS = r"a\x1b[2Jb\x9b31mc\u202ed\x07\r\x00\x7f\udc80"


def test_control_characters_are_written_out() -> None:
    assert printable(HOSTILE) == HARMLESS
    assert printable("Größe\t1 KiB\n→ 100 % 漢字 🙂") == "Größe\t1 KiB\n→ 100 % 漢字 🙂"


def test_an_error_is_one_harmless_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli(["show", HOSTILE + "\nkvscope: all is well"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert HARMLESS in err.replace("\\\\", "\\")


def test_an_unknown_option_is_harmless_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli(["run", "--\x1b[31mred"]) == 2
    assert r"--\x1b[31mred" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [PlainProgress, RichProgress])
def test_progress_is_harmless(kind: type[PlainProgress], capsys: pytest.CaptureFixture[str]) -> None:
    with kind() as progress:
        progress.begin(cells=1, work_tokens=1)
        progress.begin_cell(f"cell {HOSTILE}", steps=1)
        progress.begin_step(HOSTILE, parts=1)
        progress.part(HOSTILE)
        progress.note(f"note {HOSTILE}")
        progress.end_step(work_tokens=1)
        progress.end_cell(f"score {HOSTILE}")
    err = capsys.readouterr().err.replace("\n", "")
    for word in ("cell", "note", "score"):
        assert f"{word} {HARMLESS}" in err
    assert "\x1b" not in err
    assert "\x9b" not in err


def test_everything_is_printed_in_one_place() -> None:
    """No file of the package writes to stdout or stderr past ``kvscope.terminal``."""
    root = Path(kvscope.__file__).parent
    folders = [path.resolve() for path in root.iterdir() if path.is_dir()]
    files = [*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    assert len(files) > 200
    writes = re.compile(r"typer\.echo|sys\.std(out|err)\.write|(?<![\w.])print\(")
    assert [path for path in files if writes.search(path.read_text("utf-8"))] == []


def test_a_wide_table_goes_on_below_and_no_word_is_broken() -> None:
    headers = ["task", *(f"column{number}" for number in range(8)), "why"]
    rows = [[f"niah_multikey_{row}", *(f"{row}.{number}" for number in range(8)), "a reason of many words " * 9]
            for row in (1, 2)]  # fmt: skip
    text = grid(rows, headers, aligned=["left", *["right"] * 8, "left"], width=80)
    assert max(map(len, text.splitlines())) <= 80
    for word in {*headers, *(word for row in rows for cell in row for word in cell.split())}:
        assert word in text.split()
    assert text.split().count("niah_multikey_1") == text.split().count("task") > 1
    assert len(grid(rows, headers, aligned=["left", *["right"] * 8, "left"]).splitlines()) == 4
    long = f"{'x' * 100} and more"
    assert grid([["a", long]], ["name", "text"], aligned=["left", "left"], width=40).split()[-3] == "x" * 100


def test_prose_is_folded_between_words() -> None:
    assert folded("niah_single_1, niah_multikey_2 of 80\nnext", 20) == "niah_single_1,\nniah_multikey_2 of\n80\nnext"
    assert folded("  niah_single_1   niah_multikey_2", 20) == "  niah_single_1\n  niah_multikey_2"
    assert folded("short   as it is  ", 20) == "short   as it is  "
    assert folded("a " * 100, None) == "a " * 100


def test_a_summary_fits_a_narrow_terminal() -> None:
    samples, footprints, info = wide_rows(samples=1)
    run = make_run(samples, footprints, info=info, folder=".")
    wide, narrow = summary_text(run), summary_text(run, width=80)
    assert max(map(len, wide.splitlines())) > 80 >= max(map(len, narrow.splitlines()))
    dashes = re.compile(r"-{3,}")
    assert {word for word in wide.split() if not dashes.fullmatch(word)} <= set(narrow.split())


def test_a_list_fits_a_narrow_terminal() -> None:
    for kind in ("methods", "tasks", "models"):
        wide, narrow = list_text(kind), list_text(kind, width=80)
        assert max(map(len, narrow.splitlines())) <= 80
        assert set(wide.split()) <= set(narrow.split())


def failing(*arguments: Any, **options: Any) -> Any:
    raise ZeroDivisionError("ours \x1b[31m")


def test_a_fault_of_our_own_is_a_sentence_a_code_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "run", failing)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.run_cli(["run", "--out", "x"]) == cli.EXIT_FAULT == 70
    err = capsys.readouterr().err
    assert err.startswith(r"kvscope: an error of kvscope's own (ZeroDivisionError: ours \x1b[31m): please report it")
    assert err.count("\n") == 1
    (file,) = tmp_path.iterdir()
    assert str(file) in err
    text = file.read_text()
    assert "Traceback" in text
    assert "in failing" in text
    assert "\x1b" not in text


def test_a_file_that_ends_too_soon_is_no_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module's bytecode, say, that a full disk cut: typer takes an EOFError for a terminal that was closed."""

    def cut(*arguments: Any, **options: Any) -> Any:
        raise EOFError("marshal data too short")

    monkeypatch.setattr(sweep, "run", cut)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.run_cli(["run", "--out", "x"]) == cli.EXIT_FAULT
    err = capsys.readouterr().err.lstrip("\n")
    assert err.startswith("kvscope: an error of kvscope's own (EOFError: marshal data too short): please report it")
    (file,) = tmp_path.iterdir()
    assert "in cut" in file.read_text()


def test_without_a_place_for_the_file_the_traceback_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "run", failing)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    assert cli.run_cli(["run", "--out", "x"]) == 70
    assert "Traceback" in capsys.readouterr().err
