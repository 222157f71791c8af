"""Kills the process that it is in at one of its steps: before or after something of a folder changes, or in a write.

Steps are what the kernel is asked for: opening a file to write, writing, syncing, renaming, removing, making a folder.
Between two of them nothing outside the process changes, so that a kill there finds what a kill at a step finds.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
NEVER = 10**9


class Fuse:
    """Counts steps; the process is gone at number ``at``.

    Args:
        folder: steps outside of it are none.
    """

    def __init__(self, folder: Path, *, at: int = NEVER) -> None:
        self.n_steps = 0
        self._at, self._folder = at, str(folder.resolve())

    def light(self) -> None:
        """Begin to count, in this process, to its end."""
        sys.addaudithook(self._hook)
        self._write, self._sync = os.write, os.fsync
        os.write, os.fsync = self._torn_write, self._counted_sync  # type: ignore[assignment]

    def _step(self) -> None:
        self.n_steps += 1
        if self.n_steps == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if self._is_mine(path) and (flags & (os.O_WRONLY | os.O_RDWR) or (mode and set(mode) & set("wax+"))):
                self._step()
        elif event in _CHANGES and self._is_mine(arguments[0]):
            self._step()

    def _is_mine(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        text = os.fsdecode(path)
        return not os.path.isabs(text) or text.startswith(self._folder)

    def _torn_write(self, fd: int, data: Any) -> int:
        """Write, with a step before it, one in its midst and one after."""
        if not os.readlink(f"/proc/self/fd/{fd}").startswith(self._folder):
            return self._write(fd, data)
        self._step()
        if self.n_steps + 1 == self._at:
            self._write(fd, memoryview(data)[: len(data) // 2])
        self._step()
        n_bytes = self._write(fd, data)
        self._step()
        return n_bytes

    def _counted_sync(self, fd: int) -> None:
        self._step()
        self._sync(fd)
