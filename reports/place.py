"""The report folder of a run, and the page over several: a new one replaces what the last one wrote, and nothing else.

A run folder may come from anywhere, and people put files of their own beside a report. So no link is followed, and only
files that a report's list of files (`.manifest.json`) names are removed.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.results.reading import parse_json, read_regular

FOLDERS = ("tables", "figures")
MANIFEST = ".manifest.json"
INDEX = "index.html"
_INDEX_MARK = b'<meta name="generator" content="kvscope index of runs">'
_MOST_INDEX_BYTES = 64 << 20
_BUILDING = ".building-"
_MOST_MANIFEST_BYTES = 1 << 20
# Whatever a list of files says, nothing of another shape is ever removed.
_OWN_FILE = re.compile(
    r"(report|samples_\d{1,4})\.html|figures/figures\.tex|"
    r"(tables|figures)/[a-z0-9_]{1,80}\.(csv|md|tex|parquet|png|svg|pdf)"
)
# What reports wrote before they kept a list.
_TABLES_BEFORE = (
    "stays_and_saves",
    "accuracy",
    "accuracy_by_type",
    "accuracy_by_depth",
    "footprint",
    "statistics",
    "max_context",
    "throughput",
)
_FIGURES_BEFORE = (
    "accuracy_against_memory",
    "accuracy_against_reads",
    "accuracy_by_length",
    "accuracy_by_task",
    "needle_heatmap",
    "depth_by_task",
    "memory_by_length",
    "tpot_by_length",
    "resident_over_steps",
)
BEFORE_LISTS = (
    "report.html",
    *(f"tables/{name}.{ending}" for name in _TABLES_BEFORE for ending in ("csv", "md", "tex", "parquet")),
    *(f"figures/{name}.{ending}" for name in _FIGURES_BEFORE for ending in ("png", "svg", "csv")),
)


@contextmanager
def report_place(target: Path) -> Iterator[Path]:
    """Make the report folder and give an empty folder in it to build the next report in; both are locked until the end.

    Whatever an interrupted report left is removed first; the building folder is removed at the end.

    Raises:
        UsageError: the folder or a folder in it is a link or a file, or another report is being written.
        EnvironmentProblem: the disk is full, a file grew over a limit, or the folder cannot be written.
    """
    with _told(target):
        _refuse_links(target)
        target.mkdir(exist_ok=True)
        lock = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _lock(lock, target)
            for left in target.glob(f"{_BUILDING}*"):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)
            aside = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=target))
            try:
                yield aside
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        finally:
            os.close(lock)


def put_in_place(aside: Path, target: Path, names: Sequence[str]) -> None:
    """Move the files `names` of a finished report from `aside` to `target`, then remove those of the last one.

    A kill in between leaves whole files of both, and a list that names them all.
    """
    before = _written_before(target)
    for name in names:
        if not _OWN_FILE.fullmatch(name):
            raise ValueError(f"{name!r} is no file of a report")
        if (target / name).is_dir() and not (target / name).is_symlink():
            raise UsageError(f"{target / name} is a folder, where the report writes a file. Move it away.")
    _list_files(aside, target, sorted({*before, *names}))
    for folder in FOLDERS:
        (target / folder).mkdir(exist_ok=True)
    for name in names:
        (aside / name).replace(target / name)
    for name in before - set(names):
        (target / name).unlink(missing_ok=True)
    _list_files(aside, target, sorted(names))


def put_index(folder: Path, text: str) -> Path:
    """Write the page over a folder of runs, in the place of the last one; return its path.

    Raises:
        UsageError: a link, or something else than such a page, has its name.
        EnvironmentProblem: the disk is full, or the folder cannot be written; the page before is kept.
    """
    path = folder / INDEX
    with _told(folder):
        if path.is_symlink():
            raise UsageError(f"{path} is a link: no page is written through one. Remove the link, or move it away.")
        before = read_regular(path, most_bytes=_MOST_INDEX_BYTES, mend="Move it away.")
        if before is not None and _INDEX_MARK not in before:
            raise UsageError(f"{path} is no index of runs that kvscope wrote. Move it away.")
        aside = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=folder))
        try:
            (aside / INDEX).write_text(text, encoding="utf-8")
            (aside / INDEX).replace(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return path


def _written_before(target: Path) -> set[str]:
    """Files there that an earlier report wrote."""
    path = target / MANIFEST
    data = read_regular(path, most_bytes=_MOST_MANIFEST_BYTES)
    named: set[str] = set(BEFORE_LISTS)
    if data is not None:
        try:
            named = {str(name) for name in parse_json(data)["files"]}
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is no list of a report's files. Remove it, and make the report again.") from None
    return {name for name in named if _OWN_FILE.fullmatch(name) and os.path.lexists(target / name)}


def _list_files(aside: Path, target: Path, names: Sequence[str]) -> None:
    partial = aside / MANIFEST
    partial.write_text(json.dumps({"files": names}, indent=1) + "\n", encoding="utf-8")
    partial.replace(target / MANIFEST)


def _refuse_links(target: Path) -> None:
    for path in (target, *(target / folder for folder in FOLDERS)):
        if path.is_symlink():
            raise UsageError(f"{path} is a link: no report is written through one. Remove the link, or move it away.")
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is in the way: a folder of the report folder's name is needed. Move it away.")


def _lock(fd: int, target: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"Another report is being written to {target}. Wait for it.") from None


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        why = error.strerror or " ".join(str(error).split()) or "no reason given"
        raise EnvironmentProblem(
            f"The report folder {target} cannot be written: {why}. Free some space or give write access, and make the "
            "report again; the one before is kept."
        ) from error
