"""Append-only store of one run: a folder with `run.json` and a file of rows a kind: `samples.jsonl`,
`footprint.jsonl`, `max_context.jsonl`, `throughput.jsonl`.

A row is in its file, whole, before `append_*` returns: one `os.write` on an `O_APPEND` descriptor. Then `fsync`, which
samples wait for once in SAMPLE_SYNC_S seconds and at the end, other rows at once: a killed process loses nothing, a
power cut at most the samples since then. A process killed in the middle of that write leaves a last line that is cut
short; the next opening drops that line (and says so) and the cell is simply measured again. A cell that failed may have
a later row, which then counts. One writer at a time holds an exclusive `flock`; readers need none.
"""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.paths import no_folder
from kvscope.results.belonging import refuse_strangers
from kvscope.results.continuing import continued
from kvscope.results.folder_lock import LOCK_FILE, lock, make_writable
from kvscope.results.limits import MOST_RUN_FILE_BYTES
from kvscope.results.memory_rows import FootprintRow, MaxContextRow
from kvscope.results.packed import Rows, is_packed, read_packed
from kvscope.results.reading import parse_json, read_regular
from kvscope.results.row_table import RowTable, by_key
from kvscope.results.rowfile import RowT, check_version, first_problem, read_rows, sync_folder
from kvscope.results.run_schema import RunInfo
from kvscope.results.schema import SampleRow, ThroughputRow

RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"
FOOTPRINT_FILE = "footprint.jsonl"
MAX_CONTEXT_FILE = "max_context.jsonl"
THROUGHPUT_FILE = "throughput.jsonl"
ROW_KINDS: dict[str, type[SampleRow | FootprintRow | MaxContextRow | ThroughputRow]] = {
    SAMPLES_FILE: SampleRow,
    FOOTPRINT_FILE: FootprintRow,
    MAX_CONTEXT_FILE: MaxContextRow,
    THROUGHPUT_FILE: ThroughputRow,
}
ROW_FILES = tuple(ROW_KINDS)
SAMPLE_SYNC_S = 1.0
"""Seconds between two waits for the disk while samples are written; one may take as long as some rows on a GPU."""
REPRODUCE_FILE = "reproduce.json"
"""What `kvscope reproduce` writes into a folder of its own."""

SampleKey = tuple[str, int, int, str]

_log = logging.getLogger(__name__)


class RunStore:
    """One run folder. `create` writes (and locks); `open` only reads.

    Attributes:
        messages: what a user should hear about the opening (a torn last line that was dropped, what a folder of an
            earlier version cannot be compared by).
        sample_rows, footprint_rows, max_context_rows, throughput_rows: the rows of each kind.
    """

    def __init__(self, folder: Path, info: RunInfo, *, lock_fd: int | None, messages: Sequence[str] = ()) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self.info = info
        self.messages: list[str] = list(messages)
        self._lock_fd = lock_fd
        self._unwritten = lock_fd is not None
        self._is_new = False
        if is_packed(folder):
            if lock_fd is not None:
                raise UsageError(f"{folder} holds a packed run, which is only read. Give --out another folder.")
            packed = read_packed(folder)
            self.sample_rows = _table(folder, SAMPLES_FILE, packed.samples)
            self.footprint_rows = _table(folder, FOOTPRINT_FILE, packed.footprints)
            self.max_context_rows = _table(folder, MAX_CONTEXT_FILE, packed.max_contexts)
            self.throughput_rows = _table(folder, THROUGHPUT_FILE, packed.throughputs)
            return
        self.sample_rows = self._read(SAMPLES_FILE, SampleRow)
        self.footprint_rows = self._read(FOOTPRINT_FILE, FootprintRow)
        self.max_context_rows = self._read(MAX_CONTEXT_FILE, MaxContextRow)
        self.throughput_rows = self._read(THROUGHPUT_FILE, ThroughputRow)

    def _read(self, name: str, kind: type[RowT]) -> RowTable[RowT]:
        messages: list[str] = []
        path = self.folder / name
        rows = read_rows(path, kind, messages=messages, mend=self._lock_fd is not None)
        for message in messages:
            _log.warning(message)
        self.messages += messages
        return RowTable(path, rows, sync_every_s=SAMPLE_SYNC_S if kind is SampleRow else 0.0)

    @classmethod
    def create(
        cls, folder: str | Path, info: RunInfo, *, earlier_identity: Mapping[str, Any] | None = None
    ) -> "RunStore":
        """Open `folder` for writing: start it with `info`, or continue it when it already holds the same run.

        `run.json` is written by `begin`, or with the first row: a run that ends before has left none.

        Args:
            earlier_identity: the identity that versions to 0.2 would have given the run.

        Raises UsageError when the folder cannot be written, is being written by another process, or holds a run whose
        `identity` differs in what must be equal (the message names the keys that differ, with both values), or rows of
        another run: nothing could be read afterwards.
        """
        folder = Path(folder)
        is_new = not folder.exists()
        make_writable(folder)
        lock_fd = lock(folder)
        messages: list[str] = []
        try:
            if (folder / RUN_FILE).exists():
                info, messages = continued(folder, read_info(folder), info, earlier_identity=earlier_identity)
            else:
                _refuse_orphan_rows(folder)
            store = cls(folder, info, lock_fd=lock_fd, messages=messages)
            store._is_new = is_new
            measured: list[list[Any]] = [store.footprints(), store.throughputs()]
            refuse_strangers(store.samples(), measured, store.max_contexts(), info=info, folder=folder)
            return store
        except BaseException:
            os.close(lock_fd)
            raise

    @classmethod
    def open(cls, folder: str | Path) -> "RunStore":
        """Open a run for reading, also while another process still writes it. Nothing on disk is changed.

        Raises UsageError when the folder holds no run, or a file in it cannot be read.
        """
        folder = Path(folder)
        return cls(folder, read_info(folder), lock_fd=None)

    def begin(self) -> None:
        """Write `run.json`, unless it says the same already. Raises ValueError for a folder that is only read."""
        if self._lock_fd is None:
            raise ValueError(f"{self.folder} was opened for reading (or closed): no row can be written")
        if self._unwritten:
            _write_info(self.folder, self.info)
            self._unwritten = False

    def append_sample(self, row: SampleRow) -> None:
        """Put one sample row into its file. Raises ValueError for a cell that is done."""
        self.append_samples([row])

    def append_samples(self, rows: Sequence[SampleRow]) -> None:
        """Put sample rows into their file with one write. Raises ValueError for a cell that is done, or two of one."""
        self.begin()
        self.sample_rows.extend(rows)

    def append_footprint(self, row: FootprintRow) -> None:
        """Put one footprint row on disk. Raises ValueError for a cell that is done."""
        self.begin()
        self.footprint_rows.append(row)

    def append_max_context(self, row: MaxContextRow) -> None:
        """Put the longest context of a method on disk. Raises ValueError for a method that has one."""
        self.begin()
        self.max_context_rows.append(row)

    def max_contexts(self) -> list[MaxContextRow]:
        """The longest contexts found, in the order written."""
        return self.max_context_rows.values()

    def throughputs(self) -> list[ThroughputRow]:
        """All throughput rows, in the order written."""
        return self.throughput_rows.values()

    def samples(self) -> list[SampleRow]:
        """All sample rows, in the order written."""
        return self.sample_rows.values()

    def footprints(self) -> list[FootprintRow]:
        """All footprint rows, in the order written."""
        return self.footprint_rows.values()

    def has_sample(self, key: SampleKey) -> bool:
        """Whether (task, length_tokens, sample, method_label) is done, with whatever status."""
        return self.sample_rows.has(key)

    def rows(self) -> Rows:
        """Every row of the run."""
        return Rows(
            samples=self.samples(),
            footprints=self.footprints(),
            max_contexts=self.max_contexts(),
            throughputs=self.throughputs(),
        )

    def close(self) -> None:
        """Release the lock and the descriptors; a folder that was made for a run that never began goes. Safe twice."""
        try:
            with contextlib.ExitStack() as closing:
                for table in (self.sample_rows, self.footprint_rows, self.max_context_rows, self.throughput_rows):
                    closing.callback(table.close)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock_fd is not None:
            if self._is_new and self._unwritten:
                with contextlib.suppress(OSError):  # something else lies there by now
                    (self.folder / LOCK_FILE).unlink()
                    self.folder.rmdir()
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_info(folder: str | Path) -> RunInfo:
    """Read `run.json`. Raises UsageError when it is absent, corrupt or of a version this kvscope does not know."""
    folder = Path(folder)
    path = folder / RUN_FILE
    text = read_regular(path, most_bytes=MOST_RUN_FILE_BYTES) if folder.is_dir() else None
    if text is None:
        there = "holds no run (there is no run.json in it)" if folder.is_dir() else no_folder(folder)
        raise UsageError(f"{folder} {there}. Give the folder that `kvscope run --out` wrote.")
    try:
        data = parse_json(text)
    except ValueError as error:
        raise UsageError(
            f"{path} is corrupt: {error}. Restore it from a copy, or give --out another folder and run again."
        ) from error
    check_version(data, str(path))
    try:
        return RunInfo.model_validate_json(text)
    except ValidationError as error:
        raise UsageError(f"{path} is not a valid run file: {first_problem(error)}. Restore it from a copy.") from error


def run_folders(folder: str | Path) -> list[Path]:
    """Return the runs a folder stands for: itself, or those of its subfolders that hold one, by name.

    Raises:
        UsageError: there is none.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / RUN_FILE) and folder.is_dir():
        try:
            found = sorted(path for path in folder.iterdir() if os.path.lexists(path / RUN_FILE))
        except OSError as error:
            raise UsageError(f"{folder} cannot be read: {error.strerror}.") from error
        if found:
            return found
    read_info(folder)
    return [folder]


def _table(folder: Path, name: str, rows: list[RowT]) -> RowTable[RowT]:
    found, twice = by_key(rows)
    if twice is not None:
        raise UsageError(f"{folder} holds two rows of one cell: {twice}. Restore it from its source.")
    return RowTable(folder / name, found)


def _refuse_orphan_rows(folder: Path) -> None:
    if (folder / REPRODUCE_FILE).exists():
        raise UsageError(f"{folder} holds a reproduction, and its report: give --out another folder.")
    for name in ROW_FILES:
        if (folder / name).exists():
            raise UsageError(
                f"{folder} holds {name} but no {RUN_FILE}, so nobody can tell what these rows are. Restore {RUN_FILE}, "
                "or give --out another folder."
            )


def _write_info(folder: Path, info: RunInfo) -> None:
    """Write run.json so that it is either the old one or the new one, never half of one."""
    path = folder / RUN_FILE
    partial = folder / f"{RUN_FILE}.partial"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(info.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(folder)
    except OSError as error:
        raise EnvironmentProblem(f"Could not write {path}: {error}.") from error
