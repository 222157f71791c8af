"""Append-only store of one run: a folder with `run.json` and a file of rows a kind: `samples.jsonl`,
`footprint.jsonl`, `max_context.jsonl`, `throughput.jsonl`.

A row is on disk, whole, before `append_*` returns: one `os.write` on an `O_APPEND` descriptor, then `fsync`. A process
killed in the middle of that write leaves a last line that is cut short; the next opening drops that line (and says so)
and the cell is simply measured again. One writer at a time holds an exclusive `flock`; readers need none.
"""

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.results.limits import MOST_RUN_FILE_BYTES
from kvscope.results.packed import Rows, is_packed, read_packed
from kvscope.results.reading import parse_json, read_regular
from kvscope.results.rowfile import (
    RowT,
    append_line,
    check_version,
    first_problem,
    open_for_append,
    read_rows,
    sync_folder,
)
from kvscope.results.schema import FootprintRow, MaxContextRow, Resumption, RunInfo, SampleRow, ThroughputRow

RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"
FOOTPRINT_FILE = "footprint.jsonl"
MAX_CONTEXT_FILE = "max_context.jsonl"
THROUGHPUT_FILE = "throughput.jsonl"
ROW_FILES = (SAMPLES_FILE, FOOTPRINT_FILE, MAX_CONTEXT_FILE, THROUGHPUT_FILE)
LOCK_FILE = ".lock"

SampleKey = tuple[str, int, int, str]
FootprintKey = tuple[str, int]

_log = logging.getLogger(__name__)


class RunStore:
    """One run folder. `create` and `resume` write (and lock); `open` only reads.

    `messages` holds what a user should hear about the opening (a torn last line that was dropped).
    """

    def __init__(self, folder: Path, info: RunInfo, *, lock_fd: int | None) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self.info = info
        self.messages: list[str] = []
        self._lock_fd = lock_fd
        self._fds: dict[str, int] = {}
        writable = lock_fd is not None
        if is_packed(folder):
            self._take_packed(writable=writable)
            return
        self._samples = read_rows(folder / SAMPLES_FILE, SampleRow, messages=self.messages, mend=writable)
        self._footprints = read_rows(folder / FOOTPRINT_FILE, FootprintRow, messages=self.messages, mend=writable)
        self._max_contexts = read_rows(folder / MAX_CONTEXT_FILE, MaxContextRow, messages=self.messages, mend=writable)
        self._throughputs = read_rows(folder / THROUGHPUT_FILE, ThroughputRow, messages=self.messages, mend=writable)
        for message in self.messages:
            _log.warning(message)

    def _take_packed(self, *, writable: bool) -> None:
        if writable:
            raise UsageError(f"{self.folder} holds a packed run, which is only read. Give --out another folder.")
        rows = read_packed(self.folder)
        self._samples = _by_key(rows.samples, self.folder)
        self._footprints = _by_key(rows.footprints, self.folder)
        self._max_contexts = _by_key(rows.max_contexts, self.folder)
        self._throughputs = _by_key(rows.throughputs, self.folder)

    @classmethod
    def create(cls, folder: str | Path, info: RunInfo) -> "RunStore":
        """Open `folder` for writing: start it with `info`, or resume it when it already holds the same run.

        Raises UsageError when the folder cannot be written, is being written by another process, or holds a run whose
        `identity` differs (the message names the keys that differ, with both values).
        """
        folder = Path(folder)
        _make_folder(folder)
        lock_fd = _lock(folder)
        try:
            if (folder / RUN_FILE).exists():
                info = _resumed(folder, info)
            else:
                _refuse_orphan_rows(folder)
                _write_info(folder, info)
            return cls(folder, info, lock_fd=lock_fd)
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

    def append_sample(self, row: SampleRow) -> None:
        """Put one sample row on disk. Raises ValueError for a key that is already there."""
        self._append(SAMPLES_FILE, row.key, row.model_dump_json(), self._samples)
        self._samples[row.key] = row

    def append_footprint(self, row: FootprintRow) -> None:
        """Put one footprint row on disk. Raises ValueError for a key that is already there."""
        self._append(FOOTPRINT_FILE, row.key, row.model_dump_json(), self._footprints)
        self._footprints[row.key] = row

    def append_max_context(self, row: MaxContextRow) -> None:
        """Put the longest context of a method on disk. Raises ValueError for a method that has one."""
        self._append(MAX_CONTEXT_FILE, row.key, row.model_dump_json(), self._max_contexts)
        self._max_contexts[row.key] = row

    def append_throughput(self, row: ThroughputRow) -> None:
        """Put one throughput row on disk. Raises ValueError for a key that is already there."""
        self._append(THROUGHPUT_FILE, row.key, row.model_dump_json(), self._throughputs)
        self._throughputs[row.key] = row

    def max_contexts(self) -> list[MaxContextRow]:
        """The longest contexts found, in the order written."""
        return list(self._max_contexts.values())

    def throughputs(self) -> list[ThroughputRow]:
        """All throughput rows, in the order written."""
        return list(self._throughputs.values())

    def has_max_context(self, method_label: str) -> bool:
        """Whether a method's longest context is found."""
        return method_label in self._max_contexts

    def has_throughput(self, key: FootprintKey) -> bool:
        """Whether (method_label, length_tokens) is done, with whatever status."""
        return key in self._throughputs

    def samples(self) -> list[SampleRow]:
        """All sample rows, in the order written."""
        return list(self._samples.values())

    def footprints(self) -> list[FootprintRow]:
        """All footprint rows, in the order written."""
        return list(self._footprints.values())

    def has_sample(self, key: SampleKey) -> bool:
        """Whether (task, length_tokens, sample, method_label) is done, with whatever status."""
        return key in self._samples

    def has_footprint(self, key: FootprintKey) -> bool:
        """Whether (method_label, length_tokens) is done, with whatever status."""
        return key in self._footprints

    def rows(self) -> Rows:
        """Every row of the run."""
        return Rows(
            samples=self.samples(),
            footprints=self.footprints(),
            max_contexts=self.max_contexts(),
            throughputs=self.throughputs(),
        )

    def close(self) -> None:
        """Release the lock and the descriptors. Safe to call twice."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, name: str, key: tuple[Any, ...] | str, text: str, known: Mapping[Any, Any]) -> None:
        if self._lock_fd is None:
            raise ValueError(f"{self.folder} was opened for reading (or closed): no row can be written")
        if key in known:
            raise ValueError(f"{name} already holds a row with key {key}")
        path = self.folder / name
        if name not in self._fds:
            self._fds[name] = open_for_append(path)
        append_line(self._fds[name], text, path=path)


def read_info(folder: str | Path) -> RunInfo:
    """Read `run.json`. Raises UsageError when it is absent, corrupt or of a version this kvscope does not know."""
    folder = Path(folder)
    path = folder / RUN_FILE
    text = read_regular(path, most_bytes=MOST_RUN_FILE_BYTES) if folder.is_dir() else None
    if text is None:
        there = "holds no run (there is no run.json in it)" if folder.is_dir() else "does not exist"
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


def _by_key(rows: list[RowT], folder: Path) -> dict[Any, RowT]:
    found: dict[Any, RowT] = {}
    for row in rows:
        if found.setdefault(row.key, row) is not row:
            raise UsageError(f"{folder} holds two rows of one cell: {row.key}. Restore it from its source.")
    return found


def identity_differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Name every key whose value differs, with both values; nested keys are joined by dots."""
    left, right = _flatten(stored), _flatten(asked)
    lines = []
    for key in sorted(left.keys() | right.keys()):
        old, new = left.get(key, "(absent)"), right.get(key, "(absent)")
        if old != new:
            lines.append(f"{key} (there: {old}, asked: {new})")
    return lines


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping) and inner:
            flat.update(_flatten(inner, f"{name}."))
        else:
            flat[name] = json.dumps(inner, sort_keys=True)
    return flat


def _make_folder(folder: Path) -> None:
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


def _lock(folder: Path) -> int:
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


def _resumed(folder: Path, info: RunInfo) -> RunInfo:
    """The stored info, after checking that it describes the same run; a change of surroundings is noted in it."""
    stored = read_info(folder)
    asked = json.loads(info.model_dump_json(include={"identity"}))["identity"]
    differences = identity_differences(stored.identity, asked)
    if differences:
        raise UsageError(
            f"{folder} holds another configuration; it differs in: {'; '.join(differences)}. "
            "Give --out another folder, or ask for the same configuration to resume."
        )
    last = stored.resumptions[-1] if stored.resumptions else stored
    now = (info.kvscope_version, info.commit, info.dirty, info.environment)
    if now == (last.kvscope_version, last.commit, last.dirty, last.environment):
        return stored
    note = Resumption(
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        kvscope_version=info.kvscope_version,
        commit=info.commit,
        dirty=info.dirty,
        environment=info.environment,
    )
    updated = stored.model_copy(update={"resumptions": (*stored.resumptions, note)})
    _write_info(folder, updated)
    return updated


def _refuse_orphan_rows(folder: Path) -> None:
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
