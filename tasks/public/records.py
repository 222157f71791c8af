"""Files of public benchmarks: a JSON list, an object a line, or Parquet; checked whole, the first fault named."""

import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kvscope.errors import UsageError, shown, shown_path
from kvscope.paths import user_path
from kvscope.results.reading import parse_json, read_regular
from kvscope.results.rowfile import first_problem
from kvscope.tasks.public.fetched import fetched_files

MOST_FILE_BYTES = 4 * 1024**3
_PARQUET, _PARQUET_BEGIN = ".parquet", b"PAR1"
_BOM = b"\xef\xbb\xbf"
_PACKED: Mapping[bytes, Callable[[BytesIO], Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open}
"""How files of gzip and xz begin, and what unpacks them."""


class Record(BaseModel):
    """One question as a benchmark's file has it; fields that nothing here needs are left out."""

    model_config = ConfigDict(extra="ignore", frozen=True, str_min_length=1)
    what: ClassVar[str] = "question"
    """What a file's records are, for errors."""

    @property
    def identity(self) -> str | None:
        """The benchmark's own name of the question; None where it has none."""
        return None


RecordT = TypeVar("RecordT", bound=Record)


def benchmark_records(
    name: str, data: str | None, kind: type[RecordT], *, wrapped: str | None = None
) -> tuple[tuple[RecordT, ...], str]:
    """Return (the questions of a benchmark in its order, the SHA-256 of its files).

    Args:
        name: registry name of the task.
        data: a file; None for what ``kvscope tasks fetch`` brought.
        kind: what each record must hold.
        wrapped: the name of the list of records where a file is one JSON object around it.

    Raises:
        UsageError: nothing was fetched, no such file, the first record that is wrong, by number, or a question that is
            there twice.
    """
    paths = fetched_files(name) if data is None else [user_path(data, what="data")]
    digest, found = hashlib.sha256(), list[RecordT]()
    for path in paths:
        read = read_regular(path, most_bytes=MOST_FILE_BYTES, mend=f"Give {name} a file with data=FILE.")
        if read is None:
            raise UsageError(f"There is no file {shown_path(path)}: give {name} one with data=FILE.")
        digest.update(read)
        found += _records(path, read, kind, wrapped)
    if not found:
        raise UsageError(f"{shown_path(paths[0])} holds no {kind.what}.")
    numbers = dict[str, int]()
    for number, each in enumerate(found, start=1):
        if each.identity is not None and (first := numbers.setdefault(each.identity, number)) != number:
            raise UsageError(
                f"Records {first} and {number} of {name} are one question, {shown(each.identity)}, which would count "
                "twice: give each once."
            )
    return tuple(found), digest.hexdigest()


def _records(path: Path, data: bytes, kind: type[RecordT], wrapped: str | None) -> Iterator[RecordT]:
    for number, values in enumerate(_values(path, data, wrapped), start=1):
        try:
            yield kind.model_validate(values)
        except ValidationError as error:
            raise UsageError(f"Record {number} of {shown_path(path)} is no {kind.what} of this benchmark: "
                             f"{first_problem(error)}.") from error  # fmt: skip


def _values(path: Path, data: bytes, wrapped: str | None) -> Sequence[Any]:
    data = _unpacked(path, data).removeprefix(_BOM)
    if path.suffix.lower() == _PARQUET or data.startswith(_PARQUET_BEGIN):
        return _parquet(path, data)
    if data.lstrip()[:1] == b"[" or wrapped is not None:
        try:
            listed = parse_json(data)
        except ValueError as error:
            raise UsageError(f"{shown_path(path)} is not JSON: {error}.") from error
        if wrapped is not None and isinstance(listed, dict):
            listed = listed.get(wrapped)
        if not isinstance(listed, list):
            raise UsageError(f"{shown_path(path)} has no list {wrapped!r} of records: give the data set's own file.")
        return listed
    rows = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line))
        except ValueError as error:
            raise UsageError(
                f"Line {number} of {shown_path(path)} is not JSON ({error}): expected a list, an object a line, or "
                "Parquet."
            ) from error
    return rows


def _unpacked(path: Path, data: bytes) -> bytes:
    """Return what a file holds, unpacked where it is compressed."""
    opened = next((opened for begin, opened in _PACKED.items() if data.startswith(begin)), None)
    if opened is None:
        return data
    try:
        with opened(BytesIO(data)) as file:
            whole = bytes(file.read(MOST_FILE_BYTES + 1))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UsageError(f"{shown_path(path)} is no whole compressed file ({error}): bring it here again.") from error
    if len(whole) > MOST_FILE_BYTES:
        raise UsageError(f"{shown_path(path)} unpacks to over {MOST_FILE_BYTES:,} bytes: give a smaller file.")
    return whole


def _parquet(path: Path, data: bytes) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{shown_path(path)} is no Parquet file that can be read: {shown(str(error))}.") from error
    return rows
