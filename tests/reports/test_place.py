"""Where a report is written: its own files are replaced, nobody else's are touched, and a full disk spoils nothing."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.reports.place import BEFORE_LISTS, MANIFEST, put_in_place, report_place

FIRST = ("report.html", "tables/accuracy.csv", "figures/memory_by_length.svg")
SECOND = ("report.html", "tables/accuracy.csv", "tables/throughput.md")


def write(target: Path, names: Sequence[str], *, text: str = "new") -> None:
    with report_place(target) as aside:
        for folder in ("tables", "figures"):
            (aside / folder).mkdir()
        for name in names:
            (aside / name).write_text(text)
        put_in_place(aside, target, names)


def files(target: Path) -> dict[str, str]:
    found = (path for path in target.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(target).as_posix(): path.read_text() for path in found}


def test_a_report_replaces_the_last_one_and_keeps_what_a_user_put_there(tmp_path: Path) -> None:
    target = tmp_path / "report"
    write(target, FIRST, text="old")
    mine = ("notes.md", "tables/mine.csv", "figures/talk.png")
    for name in mine:
        (target / name).write_text("mine")
    write(target, SECOND)
    assert files(target) == dict.fromkeys(SECOND, "new") | dict.fromkeys(mine, "mine")
    assert json.loads((target / MANIFEST).read_text()) == {"files": sorted(SECOND)}


def test_reports_from_before_the_list_are_replaced_by_known_names(tmp_path: Path) -> None:
    target = tmp_path / "report"
    for name in (*BEFORE_LISTS, "tables/mine.csv"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("old")
    write(target, SECOND)
    assert files(target) == dict.fromkeys(SECOND, "new") | {"tables/mine.csv": "old"}


@pytest.mark.parametrize("place", ["report", "report/tables", "report/figures"])
@pytest.mark.parametrize("there", ["folder", "nothing"])
def test_no_report_goes_through_a_link(tmp_path: Path, place: str, there: str) -> None:
    somebody = tmp_path / "somebody"
    if there == "folder":
        (somebody / "tables").mkdir(parents=True)
        (somebody / "tables/accuracy.csv").write_text("theirs")
    run = tmp_path / "run"
    (run / place).parent.mkdir(parents=True)
    (run / place).symlink_to(somebody)
    with pytest.raises(UsageError, match="is a link: no report is written through one"):
        write(run / "report", FIRST)
    assert not somebody.exists() or files(somebody) == {"tables/accuracy.csv": "theirs"}


def test_a_file_that_is_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.csv"
    theirs.write_text("theirs")
    target = tmp_path / "report"
    write(target, FIRST)
    (target / "tables/accuracy.csv").unlink()
    (target / "tables/accuracy.csv").symlink_to(theirs)
    write(target, SECOND)
    assert (theirs.read_text(), (target / "tables/accuracy.csv").read_text()) == ("theirs", "new")


def test_a_list_from_elsewhere_removes_nothing_of_another_shape(tmp_path: Path) -> None:
    target = tmp_path / "report"
    write(target, FIRST)
    outside = tmp_path / "precious.csv"
    outside.write_text("precious")
    named = ["../precious.csv", str(outside), "notes.md", "tables/../../precious.csv", ".", "tables", 7]
    (target / "notes.md").write_text("mine")
    (target / MANIFEST).write_text(json.dumps({"files": named}))
    write(target, SECOND)
    assert outside.read_text() == "precious"
    assert files(target)["notes.md"] == "mine"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "[" * 100_000, "\udcff"])
def test_a_damaged_list_is_named(tmp_path: Path, text: str) -> None:
    target = tmp_path / "report"
    write(target, FIRST)
    (target / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match="is no list of a report's files"):
        write(target, SECOND)


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "report"
    (target / ".building-killed/tables").mkdir(parents=True)
    (target / ".building-killed/tables/accuracy.csv").write_text("half")
    write(target, FIRST)
    assert sorted(path.name for path in target.iterdir()) == [MANIFEST, "figures", "report.html", "tables"]


def test_one_report_at_a_time(tmp_path: Path) -> None:
    with (
        report_place(tmp_path / "report"),
        pytest.raises(UsageError, match="Another report is being written"),
        report_place(tmp_path / "report"),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_disk_refuses_leaves_the_old_report(tmp_path: Path, code: int) -> None:
    target = tmp_path / "report"
    write(target, FIRST, text="old")

    def fail() -> None:
        with report_place(target) as aside:
            (aside / "report.html").write_text("half")
            raise OSError(code, os.strerror(code))

    with pytest.raises(EnvironmentProblem, match=f"cannot be written: {os.strerror(code)}") as caught:
        fail()
    assert caught.value.exit_code == 3
    assert files(target) == dict.fromkeys(FIRST, "old")


def test_a_folder_in_the_way_is_named_before_anything_moves(tmp_path: Path) -> None:
    target = tmp_path / "report"
    write(target, FIRST, text="old")
    (target / "tables/throughput.md").mkdir()
    with pytest.raises(UsageError, match=r"throughput\.md is a folder"):
        write(target, SECOND)
    assert files(target) == dict.fromkeys(FIRST, "old")
