"""The rows of one kind in a run folder: what is there, what may be measured again, and putting more on disk."""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic

from kvscope.results.rowfile import RowT, append_lines, open_for_append, put, sync_lines


class RowTable(Generic[RowT]):
    """Rows by key, in the order in which their cells were first written.

    A row that is no result (failed, out of memory, unsupported) can be reopened: its cell counts as missing until a new
    row is there. The file is only appended to; of two rows of one cell the later counts.
    """

    def __init__(self, path: Path, rows: dict[Any, RowT], *, sync_every_s: float = 0.0) -> None:
        """Take the rows that a file holds.

        Args:
            sync_every_s: seconds between two waits for the disk. Many small rows a second would wait for it more than
                they are worth: a killed process loses none either way, and a power cut those since the last wait.
        """
        self.path = path
        self._rows = rows
        self._sync_every_s = sync_every_s
        self._synced_s = -float("inf")
        self._unsynced = False
        self._reopened: set[Any] = set()
        self._fd: int | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def values(self) -> list[RowT]:
        """Return all rows."""
        return list(self._rows.values())

    def get(self, key: Any) -> RowT | None:
        """Return the row of a cell, also of one that was reopened."""
        return self._rows.get(key)

    def has(self, key: Any) -> bool:
        """Whether a cell is done, with whatever status."""
        return key in self._rows and key not in self._reopened

    def reopen(self, key: Any) -> None:
        """Let a cell be measured again. Its row stays until then.

        Raises:
            ValueError: it has no row, or its row is a result.
        """
        row = self._rows.get(key)
        if row is None or row.is_result:
            raise ValueError(f"{self.path.name} holds {'a result' if row else 'no row'} of {key}: it stays")
        self._reopened.add(key)

    def append(self, row: RowT) -> None:
        """Put a row into the file, whole, before this returns.

        Raises:
            ValueError: its cell is done.
            EnvironmentProblem: the disk is full or broken.
        """
        self.extend([row])

    def extend(self, rows: Sequence[RowT]) -> None:
        """Put rows into the file, whole, before this returns, with at most one wait for the disk for all of them.

        Raises:
            ValueError: a cell is done, or two are of one.
            EnvironmentProblem: the disk is full or broken.
        """
        seen: set[Any] = set()
        for row in rows:
            if self.has(row.key) or row.key in seen:
                raise ValueError(f"{self.path.name} already holds a row with key {row.key}")
            seen.add(row.key)
        if self._fd is None:
            self._fd = open_for_append(self.path)
        sync = time.monotonic() - self._synced_s >= self._sync_every_s
        self._unsynced = True  # first: whoever interrupts behind the write is owed the wait at the end
        append_lines(self._fd, (row.model_dump_json() for row in rows), path=self.path, sync=sync)
        if sync:
            self._unsynced, self._synced_s = False, time.monotonic()
        for row in rows:
            self._rows[row.key] = row
            self._reopened.discard(row.key)

    def close(self) -> None:
        """Wait for the disk where that is owed, and release the descriptor. Safe to call twice.

        Raises:
            EnvironmentProblem: the disk is full or broken.
        """
        fd, self._fd = self._fd, None
        unsynced, self._unsynced = self._unsynced, False
        if fd is not None:
            try:
                if unsynced:
                    sync_lines(fd, path=self.path)
            finally:
                os.close(fd)


def by_key(rows: Iterable[RowT]) -> tuple[dict[Any, RowT], Any]:
    """Return (rows by key, the key of the first row behind a result of the same cell; None without one)."""
    found: dict[Any, RowT] = {}
    for row in rows:
        if not put(found, row):
            return found, row.key
    return found, None
