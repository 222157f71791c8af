"""A run as two pandas frames: `samples` (accuracy pass) and `footprint` (memory and time)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from kvscope.paths import user_path
from kvscope.results.belonging import refuse_strangers
from kvscope.results.frame_making import frame_of, read_frame
from kvscope.results.memory_rows import FootprintRow, MaxContextRow
from kvscope.results.packed import is_packed
from kvscope.results.run_schema import RunInfo
from kvscope.results.schema import SampleRow, ThroughputRow
from kvscope.results.store import ROW_KINDS, RunStore, read_info

T = TypeVar("T")


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
    max_context: pd.DataFrame = field(default_factory=lambda: frame_of([], MaxContextRow))
    throughput: pd.DataFrame = field(default_factory=lambda: frame_of([], ThroughputRow))
    memo: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)
    """What was worked out of this run already: see `once`."""


def once(work_out: Callable[[Run], T]) -> Callable[[Run], T]:
    """Work a thing out of a run the first time it is asked for, and keep it with the run. It must not be changed."""

    @wraps(work_out)
    def kept(run: Run) -> T:
        name = f"{work_out.__module__}.{work_out.__qualname__}"
        if name not in run.memo:
            run.memo[name] = work_out(run)
        found: T = run.memo[name]
        return found

    return kept


def load_run(folder: str | Path) -> Run:
    """Read a run folder, also one that is still being written.

    Raises UsageError when the folder holds no run, a corrupt line, the same cell twice, or rows that its run.json did
    not ask for.
    """
    folder = user_path(folder, what="The run folder")
    info = read_info(folder)
    if is_packed(folder):
        rows = RunStore.open(folder).rows()
        run = make_run(
            rows.samples,
            rows.footprints,
            info=info,
            folder=folder,
            max_contexts=rows.max_contexts,
            throughputs=rows.throughputs,
        )
    else:
        messages: list[str] = []
        samples, footprint, max_context, throughput = (
            read_frame(folder / name, kind, messages=messages) for name, kind in ROW_KINDS.items()
        )
        run = Run(samples, footprint, info, folder, tuple(messages), max_context, throughput)
    refuse_strangers(run.samples, [run.footprint, run.throughput], run.max_context, info=info, folder=folder)
    return run


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
        samples=frame_of(samples, SampleRow),
        footprint=frame_of(footprints, FootprintRow),
        info=info,
        folder=Path(folder),
        messages=messages,
        max_context=frame_of(max_contexts, MaxContextRow),
        throughput=frame_of(throughputs, ThroughputRow),
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
