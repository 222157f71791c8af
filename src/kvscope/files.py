"""Files that commands write: a disk that is full, or a place that cannot be written, is one sentence."""

import csv
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from kvscope.errors import EnvironmentProblem, KvscopeError, UsageError


def make_folder(folder: Path) -> None:
    """Make a folder to write to, and those above it, where they are not there.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"The folder {folder} cannot be made: {error.strerror}. Give --out a place you can write."
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file, or the folder, of whatever cannot be written in the block.

    Raises:
        EnvironmentProblem: the disk is full, files may not be so large, or the place cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise EnvironmentProblem(
            f"'{path}' could not be written ({first_line(error)}); make room, then run the same command again."
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a place to write a file to, which then appears as ``path``: whole or not at all.

    Raises:
        EnvironmentProblem: it could not be written, as on a full disk; nothing is left of it.
    """
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    except EnvironmentProblem:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


class TextFile:
    """A UTF-8 text file that is written as it comes: what ``write`` took is the file's, whatever happens next.

    A ``csv.writer`` takes it. Nothing is buffered, so that nothing is left to write when it is closed.
    """

    def __init__(self, path: Path, *, append: bool = False) -> None:
        """Open a file, empty or at its end.

        Raises:
            UsageError: it cannot be opened.
        """
        self._path = path
        try:
            self._file = path.open("ab" if append else "wb", buffering=0)
        except OSError as error:
            raise UsageError(f"'{path}' cannot be written: {error.strerror}. Give --out another place.") from error

    def write(self, text: str) -> int:
        """Write text; return its characters.

        Raises:
            EnvironmentProblem: it did not fit.
        """
        left = memoryview(text.encode())
        with writing(self._path):
            while left:
                left = left[self._file.write(left) :]
        return len(text)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def csv_file(path: Path, columns: Sequence[str]) -> "Iterator[csv.DictWriter[str]]":
    """Write a CSV file row by row: what was written is the file's, whatever happens next.

    Of a command that fails before its first row no file is left: it would be in the way of the same command, mended.

    Raises:
        UsageError: it cannot be opened.
        EnvironmentProblem: a row did not fit.
    """
    header_bytes = 0
    try:
        with TextFile(path) as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            header_bytes = path.stat().st_size
            yield writer
    except KvscopeError:
        with suppress(OSError):
            if header_bytes == path.stat().st_size:
                path.unlink()
        raise


def disk_is_full(error: BaseException) -> bool:
    """Whether an error is that a disk, or what a user may have of it, is full, or a file may not be so large."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, cut to what a sentence holds."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
