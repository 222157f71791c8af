"""A run as two pandas frames: `samples` (accuracy pass) and `footprint` (memory and time)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel

from kvscope.paths import user_path
from kvscope.results.belonging import refuse_strangers
from kvscope.results.columns import plain_kinds
from kvscope.results.memory_rows import FootprintRow, MaxContextRow
from kvscope.results.run_schema import RunInfo
from kvscope.results.schema import SampleRow, ThroughputRow
from kvscope.results.store import RunStore


@dataclass(frozen=True)
class Run:
    """A loaded run folder, finished or not.

    `samples` and `footprint` hold one row per row on disk and one column per schema field, in schema order; a null is
    NaN in float columns and <NA> in integer, boolean and string columns. `max_context` and `throughput` hold the rows
    of the two searches (`--find-max`, `--throughput`). `messages` says what was left out on reading.
    """

    samples: pd.DataFrame
    footprint: pd.DataFrame
    info: RunInfo
    folder: Path
    messages: tuple[str, ...] = ()
    max_context: pd.DataFrame = field(default_factory=lambda: _frame([], MaxContextRow))
    throughput: pd.DataFrame = field(default_factory=lambda: _frame([], ThroughputRow))


def load_run(folder: str | Path) -> Run:
    """Read a run folder, also one that is still being written.

    Raises UsageError when the folder holds no run, a corrupt line, the same cell twice, or rows that its run.json did
    not ask for.
    """
    store = RunStore.open(user_path(folder, what="The run folder"))
    refuse_strangers(store.rows(), store.info, folder=store.folder)
    return make_run(
        store.samples(),
        store.footprints(),
        info=store.info,
        folder=store.folder,
        messages=tuple(store.messages),
        max_contexts=store.max_contexts(),
        throughputs=store.throughputs(),
    )


def make_run(
    samples: list[SampleRow],
    footprints: list[FootprintRow],
    *,
    info: RunInfo,
    folder: str | Path,
    messages: tuple[str, ...] = (),
    max_contexts: Sequence[MaxContextRow] = (),
    throughputs: Sequence[ThroughputRow] = (),
) -> Run:
    """Build a Run from rows already in memory."""
    return Run(
        samples=_frame(samples, SampleRow),
        footprint=_frame(footprints, FootprintRow),
        info=info,
        folder=Path(folder),
        messages=messages,
        max_context=_frame(max_contexts, MaxContextRow),
        throughput=_frame(throughputs, ThroughputRow),
    )


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dicts of Python's own values, every null as None."""
    names = [str(name) for name in frame.columns]
    columns = [[_plain(value) for value in column.tolist()] for _, column in frame.items()] if len(frame) else []
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if _is_null(value) else value


def _is_null(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _frame(rows: Sequence[BaseModel], kind: type[BaseModel]) -> pd.DataFrame:
    dumped = [row.model_dump() for row in rows]
    columns = {
        name: pd.Series([row[name] for row in dumped], dtype=_dtype(field.annotation))
        for name, field in kind.model_fields.items()
    }
    return pd.DataFrame(columns)


def _dtype(annotation: Any) -> str:
    """The column type that keeps integers exact and nulls apart from numbers."""
    kinds = plain_kinds(annotation)
    if kinds == {bool}:
        return "boolean"
    if kinds == {int}:
        return "Int64"
    if kinds == {float}:
        return "float64"
    if kinds == {str}:
        return "string"
    return "object"
