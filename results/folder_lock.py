"""A folder that one process at a time writes to."""

import fcntl
import os
from pathlib import Path

from kvscope.errors import UsageError

LOCK_FILE = ".lock"


def make_writable(folder: Path) -> None:
    """Make a folder, where it is not there.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"{folder} is a file, not a folder. Give --out another place.") from None
    except OSError as error:
        raise UsageError(
            f"The folder {folder} cannot be made: {error.strerror}. Give --out a place you can write."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"The folder {folder} cannot be written. Give --out a place you can write.")


def lock(folder: Path) -> int:
    """Hold an exclusive lock of a folder, until the descriptor that is returned is closed.

    Raises:
        UsageError: another process holds it, or the file system has none.
    """
    path = folder / LOCK_FILE
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UsageError(
            f"The folder {folder} cannot be written: {error.strerror}. Give --out a place you can write."
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise UsageError(
            f"Another kvscope run (process {holder}) is writing to {folder}. Wait for it, or give --out another folder."
        ) from None
    except OSError as error:
        os.close(fd)
        raise UsageError(
            f"{folder} lies on a file system without locks ({error.strerror}). Give --out a local folder."
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
