"""A finished run in a few compressed files, for keeping in a repository: `run.json` and zstd Parquet, read only.

What a prompt's rows of several methods have in common is stored once, in `prompts.parquet`; `samples.parquet` refers to
it by (task, length_tokens, sample). Unpacked rows equal the rows packed. Several runs of one configuration pack as one:
see `results/merge.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kvscope.errors import UsageError
from kvscope.results.columns import plain_kinds
from kvscope.results.schema import FootprintRow, MaxContextRow, RunInfo, SampleRow, ThroughputRow

PROMPTS_FILE = "prompts.parquet"
SAMPLES_FILE = "samples.parquet"
PROMPT_KEY = ("task", "length_tokens", "sample")
PROMPT_COLUMNS = ("question_type", "seed", "depth", "context_id", "prompt_sha256", "prompt_tokens", "targets")
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
    return any((folder / name).is_file() for name in (SAMPLES_FILE, *_OTHER_FILES))


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
        UsageError: a file is damaged, or a row refers to a prompt that is not there.
    """
    rows = Rows()
    if (folder / SAMPLES_FILE).is_file():
        prompts = {tuple(p[name] for name in PROMPT_KEY): p for p in _read(folder / PROMPTS_FILE, SampleRow)}
        for value in _read(folder / SAMPLES_FILE, SampleRow):
            key = tuple(value[name] for name in PROMPT_KEY)
            if key not in prompts:
                raise UsageError(f"{folder / PROMPTS_FILE} lacks prompt {key}. Restore the folder from its source.")
            rows.samples.append(_valid({**prompts[key], **value}, SampleRow, folder / SAMPLES_FILE))
    for name, (attribute, kind) in _OTHER_FILES.items():
        if (folder / name).is_file():
            found = [_valid(value, kind, folder / name) for value in _read(folder / name, kind)]
            setattr(rows, attribute, found)
    return rows


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


def _read(path: Path, kind: type[BaseModel]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        values: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} cannot be read: {error}. Restore it from its source.") from error
    nested = [name for name in kind.model_fields if _scalar(kind, name) is None]
    for value in values:
        for name in nested:
            if value.get(name) is not None:
                value[name] = json.loads(value[name])
    return values


def _valid(value: dict[str, Any], kind: type[Any], path: Path) -> Any:
    try:
        return kind.model_validate(value)
    except ValueError as error:
        raise UsageError(f"{path} holds a row that is not valid: {' '.join(str(error).split())[:300]}.") from error


def _scalar(kind: type[BaseModel], name: str) -> type | None:
    """Return the plain type of a field, None for one that is stored as JSON text."""
    kinds = plain_kinds(kind.model_fields[name].annotation)
    return next(iter(kinds)) if len(kinds) == 1 and kinds <= set(_ARROW) else None
