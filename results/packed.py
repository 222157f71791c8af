"""A finished run in a few compressed files, for keeping in a repository: `run.json` and zstd Parquet, read only.

What a prompt's rows of several methods have in common is stored once, in `prompts.parquet`; `samples.parquet` refers to
it by (task, length_tokens, sample). Unpacked rows equal the rows packed. Several runs of one configuration pack as one:
see `results/merge.py`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from kvscope.errors import UsageError
from kvscope.results.columns import plain_kinds
from kvscope.results.limits import MOST_ROWS_FILE_BYTES
from kvscope.results.memory_rows import FootprintRow, MaxContextRow
from kvscope.results.plain_text import shortened
from kvscope.results.reading import cycles_left, parse_json, read_regular
from kvscope.results.rowfile import check_version, first_problem
from kvscope.results.run_schema import RunInfo
from kvscope.results.schema import SampleRow, ThroughputRow

PROMPTS_FILE = "prompts.parquet"
SAMPLES_FILE = "samples.parquet"
PROMPT_KEY = ("task", "length_tokens", "sample")
PROMPT_COLUMNS = ("question_type", "seed", "depth", "context_id", "prompt_sha256", "prompt_tokens", "targets")
_MEND = "Restore the folder from its source."
_ARROW = {bool: "bool", int: "int64", float: "float64", str: "string"}


@dataclass(kw_only=True)
class Rows:
    """All rows of a run."""

    samples: list[SampleRow] = field(default_factory=list)
    footprints: list[FootprintRow] = field(default_factory=list)
    max_contexts: list[MaxContextRow] = field(default_factory=list)
    throughputs: list[ThroughputRow] = field(default_factory=list)


_OTHER_FILES: dict[str, tuple[str, type[BaseModel]]] = {
    "footprint.parquet": ("footprints", FootprintRow),
    "max_context.parquet": ("max_contexts", MaxContextRow),
    "throughput.parquet": ("throughputs", ThroughputRow),
}


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed run."""
    return any(os.path.lexists(folder / name) for name in (SAMPLES_FILE, *_OTHER_FILES))


def write_packed(folder: Path, info: RunInfo, rows: Rows) -> None:
    """Write a packed run; files of an earlier one in the folder are replaced.

    Raises:
        ValueError: rows of one prompt disagree about it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")
    for name in (PROMPTS_FILE, SAMPLES_FILE, *_OTHER_FILES):
        (folder / name).unlink(missing_ok=True)
    if rows.samples:
        prompts: dict[tuple[Any, ...], dict[str, Any]] = {}
        values = []
        for row in rows.samples:
            dumped = row.model_dump(mode="json")
            prompt = {name: dumped.pop(name) for name in PROMPT_COLUMNS}
            key = tuple(dumped[name] for name in PROMPT_KEY)
            if prompts.setdefault(key, prompt) != prompt:
                raise ValueError(f"rows of prompt {key} disagree about it")
            values.append(dumped)
        keyed = [dict(zip(PROMPT_KEY, key, strict=True)) | prompt for key, prompt in prompts.items()]
        _write(folder / PROMPTS_FILE, keyed, SampleRow, [*PROMPT_KEY, *PROMPT_COLUMNS])
        names = [name for name in SampleRow.model_fields if name not in PROMPT_COLUMNS]
        _write(folder / SAMPLES_FILE, values, SampleRow, names)
    for name, (attribute, kind) in _OTHER_FILES.items():
        found = getattr(rows, attribute)
        if found:
            dumped_rows = [row.model_dump(mode="json") for row in found]
            _write(folder / name, dumped_rows, kind, list(kind.model_fields))


def read_packed(folder: Path) -> Rows:
    """Read the rows of a packed run.

    Raises:
        UsageError: a file is damaged or too large, lacks a column, or names a prompt that is not there.
    """
    with cycles_left():
        return _read_packed(folder)


def _read_packed(folder: Path) -> Rows:
    rows, path = Rows(), folder / SAMPLES_FILE
    values = _read(path, SampleRow, needed=PROMPT_KEY)
    if values is not None:
        prompts = _prompts(folder / PROMPTS_FILE)
        for value in values:
            key = tuple(value[name] for name in PROMPT_KEY)
            if key not in prompts:
                raise UsageError(f"{folder / PROMPTS_FILE} lacks prompt {key}. {_MEND}")
            rows.samples.append(_valid({**prompts[key], **value}, SampleRow, path))
    for name, (attribute, kind) in _OTHER_FILES.items():
        path = folder / name
        found = _read(path, kind)
        if found is not None:
            setattr(rows, attribute, [_valid(value, kind, path) for value in found])
    return rows


def _prompts(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    values = _read(path, SampleRow, needed=(*PROMPT_KEY, *PROMPT_COLUMNS))
    if values is None:
        raise UsageError(f"{path} is not there. {_MEND}")
    prompts: dict[tuple[Any, ...], dict[str, Any]] = {}
    for value in values:
        key = tuple(value[name] for name in PROMPT_KEY)
        if prompts.setdefault(key, value) is not value:
            raise UsageError(f"{path} holds prompt {key} twice. {_MEND}")
    return prompts


def _write(path: Path, values: list[dict[str, Any]], kind: type[BaseModel], names: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name in names:
        scalar = _scalar(kind, name)
        cells = [value[name] for value in values]
        if scalar is None:
            cells = [None if cell is None else json.dumps(cell, sort_keys=True) for cell in cells]
        columns[name] = pa.array(cells, type=pa.type_for_alias(_ARROW[scalar or str]))
    pq.write_table(pa.table(columns), path, compression="zstd", compression_level=19)


def _read(path: Path, kind: type[BaseModel], *, needed: Sequence[str] = ()) -> list[dict[str, Any]] | None:
    """Rows of a file as plain values, nested ones parsed; None where the file is not there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = read_regular(path, most_bytes=MOST_ROWS_FILE_BYTES)
    if data is None:
        return None
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        size_bytes = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        if size_bytes > MOST_ROWS_FILE_BYTES:
            raise UsageError(f"{path} unpacks to {size_bytes:,} bytes, at most {MOST_ROWS_FILE_BYTES:,} are read.")
        columns = [name for name in file.schema_arrow.names if name in kind.model_fields]
        unknown = sorted(set(file.schema_arrow.names) - set(columns))
        lacking = [name for name in needed if name not in columns]
        if unknown or lacking or len(set(columns)) < len(columns):
            what = f"lacks column {lacking[0]}" if lacking else f"has columns that no row has: {_listed(unknown)}"
            raise UsageError(f"{path} {what}. {_MEND}")
        values: list[dict[str, Any]] = file.read().to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read: {_one_line(error)}. {_MEND}") from error
    nested = [name for name in columns if _scalar(kind, name) is None]
    parsed: dict[str, Any] = {}  # rows of a method have the same settings
    for value in values:
        for name in nested:
            text = value[name]
            if isinstance(text, str) and text in parsed:
                value[name] = parsed[text]
            elif text is not None:
                value[name] = _parsed(text, name, path)
                if isinstance(text, str):
                    parsed[text] = value[name]
    return values


def _parsed(text: Any, name: str, path: Path) -> Any:
    try:
        return parse_json(text)
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{path} holds a {name} that is not valid: {_one_line(error)}. {_MEND}") from error


def _valid(value: dict[str, Any], kind: type[Any], path: Path) -> Any:
    check_version(value, str(path))
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise UsageError(f"{path} holds a row that is not valid: {first_problem(error)}. {_MEND}") from error


def _one_line(error: Exception) -> str:
    return shortened(" ".join(str(error).split()).rstrip("."), most=200)


def _listed(names: Sequence[str]) -> str:
    return shortened(", ".join(names), most=120)


def _scalar(kind: type[BaseModel], name: str) -> type | None:
    """Return the plain type of a field, None for one that is stored as JSON text."""
    kinds = plain_kinds(kind.model_fields[name].annotation)
    return next(iter(kinds)) if len(kinds) == 1 and kinds <= set(_ARROW) else None
