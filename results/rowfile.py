"""Reading and appending JSON lines that survive being killed: one write a row, a torn last line recognised."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.results.limits import MOST_LINE_BYTES, MOST_ROWS_FILE_BYTES
from kvscope.results.memory_rows import FootprintRow, MaxContextRow
from kvscope.results.plain_text import shortened
from kvscope.results.quick import quick_row
from kvscope.results.reading import parse_json, read_regular
from kvscope.results.schema import SCHEMA_VERSION, SampleRow, ThroughputRow

RowT = TypeVar("RowT", bound=SampleRow | FootprintRow | MaxContextRow | ThroughputRow)


def open_for_append(path: Path) -> int:
    """Open (or start) a row file; the descriptor is not inherited by child processes."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        sync_folder(path.parent)
    except OSError as error:
        raise EnvironmentProblem(f"Could not open {path} for writing: {error.strerror}.") from error
    return fd


def append_lines(fd: int, texts: Iterable[str], *, path: Path, sync: bool = True) -> None:
    """Put texts and newlines into a file with one write, and on disk. Where that write fails nothing of it stays.

    Args:
        sync: wait for the disk. Without it they outlive this process, and a power cut only if ``sync_lines`` follows.

    Raises:
        EnvironmentProblem: the disk is full or broken.
    """
    data = b"".join(text.encode() + b"\n" for text in texts)
    try:
        before = os.fstat(fd).st_size
        try:
            written = os.write(fd, data)
            if written != len(data):
                raise OSError(f"only {written} of {len(data)} bytes fitted")
        except OSError:
            os.ftruncate(fd, before)
            raise
        if sync:
            os.fsync(fd)
    except OSError as error:
        raise _not_written(path, error) from error


def sync_lines(fd: int, *, path: Path) -> None:
    """Wait until what was appended is on disk.

    Raises:
        EnvironmentProblem: the disk is full or broken.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"Could not write a row to {path}: {error}. Free some space (or mend the disk) and run the same command "
        "again: finished rows are kept."
    )


def sync_folder(folder: Path) -> None:
    """Make a new or renamed file of `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_rows(path: Path, kind: type[RowT], *, messages: list[str], mend: bool) -> dict[Any, RowT]:
    """Rows by key, the later of two rows of a cell. A torn last line is left out; with `mend` it is cut off the file.

    Raises:
        UsageError: no regular file, or one that is too large; a line that is no row, too long, or of another version; a
            second row of a cell whose first is a result.
    """
    rows: dict[Any, RowT] = {}
    lines_of: dict[Any, int] = {}
    for number, row in each_row(path, kind, messages=messages, mend=mend):
        if not put(rows, row):
            raise second_result(path, number, row.key, first=lines_of[row.key])
        lines_of[row.key] = number
    return rows


def each_row(path: Path, kind: type[RowT], *, messages: list[str], mend: bool) -> Iterator[tuple[int, RowT]]:
    """Give every row of a file with the number of its line, from 1: each line but a torn last one is a row.

    Nothing is kept of a row that was given. Otherwise like `read_rows`, which looks for second rows of a cell, too.
    """
    data = read_regular(path, most_bytes=MOST_ROWS_FILE_BYTES)
    if data is None:
        return
    start = 0
    number = 0
    while start < len(data):
        number += 1
        end = data.find(b"\n", start)
        line = data[start:] if end < 0 else data[start:end]
        after = len(data) if end < 0 else end + 1
        if len(line) > MOST_LINE_BYTES:
            raise UsageError(f"{path}, line {number} has {len(line):,} bytes, at most {MOST_LINE_BYTES:,} are read.")
        row = quick_row(line, kind) if end >= 0 else None
        if row is None:
            parsed, fault = _parse(line)
            if end < 0 or (parsed is None and after == len(data)):
                _drop_tail(path, start, number, messages=messages, mend=mend)
                break
            row = _row(parsed, fault, kind, path=path, number=number)
        yield number, row
        start = after


def second_result(path: Path, number: int, key: Any, *, first: int) -> UsageError:
    """Return what is raised where a line holds a cell whose result stands in an earlier one."""
    return UsageError(f"{path}, line {number} holds the same cell as line {first}: {key}. Delete one of them.")


def put(rows: dict[Any, RowT], row: RowT) -> bool:
    """Add a row that was read; the later of two rows of a cell counts. False where the earlier one is a result."""
    earlier = rows.get(row.key)
    if earlier is not None and earlier.is_result:
        return False
    rows[row.key] = row
    return True


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object of a line, or None and why it is none."""
    try:
        value = parse_json(line)
    except ValueError as error:
        return None, f"not a JSON object: {error}"
    return (value, "") if isinstance(value, dict) else (None, "not a JSON object")


def _row(parsed: dict[str, Any] | None, fault: str, kind: type[RowT], *, path: Path, number: int) -> RowT:
    mend = "Delete that line and run the same command again: the cell is measured anew"
    if parsed is None:
        raise UsageError(f"{path}, line {number} is corrupt ({fault}). {mend}.")
    check_version(parsed, f"{path}, line {number}")
    try:
        return cast("RowT", kind.model_validate(parsed))
    except ValidationError as error:
        raise UsageError(f"{path}, line {number} is not a valid row: {first_problem(error)}. {mend}.") from error


def _drop_tail(path: Path, start: int, number: int, *, messages: list[str], mend: bool) -> None:
    what = f"{path}, line {number}: the last line was cut short by an interruption"
    if not mend:
        messages.append(f"{what} (or is being written); it is left out.")
        return
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, start)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise UsageError(f"{what} and cannot be removed: {error.strerror}.") from error
    messages.append(f"{what}; it was dropped, and its cell is measured again.")


def check_version(data: Any, where: str) -> None:
    """Raise UsageError when `data` was written by a later schema than this one."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise UsageError(
            f"{where} has schema version {shortened(str(version), most=20)}, this kvscope knows version "
            f"{SCHEMA_VERSION}. Upgrade kvscope."
        )


def first_problem(error: ValidationError) -> str:
    """The first thing pydantic objects to, in a clause."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = shortened(".".join(str(part) for part in first["loc"]), most=120)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")  # pydantic's own words
    more = error.error_count() - 1
    return f"{place + ': ' if place else ''}{shortened(message, most=300)}" + (
        f" (and {more} more problems)" if more else ""
    )
