"""Paths that users give: refused in a sentence where the system would raise, each in its own way."""

import os
from pathlib import Path
from tempfile import TemporaryFile

from kvscope.errors import UsageError, shown

MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 4095
"""What file systems and systems take."""


def user_path(given: object, *, what: str = "path") -> Path:
    """Return a path as given, ``~`` and ``~user`` replaced.

    Args:
        what: what the path is of, as an error names it: ``--out``, ``the essay file``.

    Raises:
        UsageError: no text or path, empty, too long, with characters that no path has, or the home of nobody.
    """
    if not isinstance(given, str | os.PathLike):
        raise UsageError(f"{what} is {shown(given)}, expected a path.")
    text = os.fspath(given)
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{what} is {shown(text)}, expected a path.")
    try:
        name_bytes = max(len(part.encode()) for part in text.split("/"))
        path_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{what} is {shown(text)}, which is not UTF-8 text.") from None
    if "\0" in text:
        raise UsageError(f"{what} is {shown(text)}: no path holds a NUL character.")
    if name_bytes > MOST_NAME_BYTES or path_bytes > MOST_PATH_BYTES:
        raise UsageError(
            f"{what} is too long to be a path ({shown(text)}): a name in it may have {MOST_NAME_BYTES} bytes and all "
            f"of it {MOST_PATH_BYTES}."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"{what} is {shown(text)}: no such user has a home here.") from None


def no_folder(path: Path) -> str:
    """Return what is to be said of a path where no folder is, in words that follow it."""
    return "is a file, not a folder" if os.path.lexists(path) else "does not exist"


def cache_folder() -> Path:
    """Return where kvscope keeps what it can make again: below ``XDG_CACHE_HOME``, else ``~/.cache``."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~/.cache"))
    return folder / "kvscope"


def check_out(folder: Path) -> None:
    """Check that a folder is there or could be made, and can be written, without making it.

    A file without a name is made and gone at once: what one may write is not told by permissions alone (/proc, a disk
    that is mounted to be read).

    Raises:
        UsageError: it, or what it should lie in, is no folder or cannot be written.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        is_folder = there.is_dir()
    except OSError as error:
        raise UsageError(f"Folder {shown(str(folder))} cannot be made: {error.strerror}.") from None
    if is_folder:
        try:
            with TemporaryFile(dir=there):
                return
        except OSError as error:
            raise UsageError(
                f"Folder {shown(str(folder))} cannot be written: {error.strerror}. Give --out a place you can write."
            ) from None
    if there == folder:
        raise UsageError(f"{shown(str(folder))} is a file, not a folder. Give --out another one.")
    raise UsageError(
        f"Folder {shown(str(folder))} cannot be made: {shown(str(there))} is a file. Give --out another one."
    )


def check_out_file(path: Path) -> None:
    """Check that a file could be written, without writing it.

    Raises:
        UsageError: it is a folder, or the folder that it should lie in is none or cannot be written.
    """
    if path.is_dir():
        raise UsageError(f"{shown(str(path))} is a folder, not a file. Give --out another name.")
    if not path.parent.exists():
        raise UsageError(f"{shown(str(path))} cannot be written: there is no folder {shown(str(path.parent))}.")
    check_out(path.parent)
