"""Rows as a pandas frame, a block of rows at a time: what was read of a row is dropped once its columns are filled."""

import logging
from collections.abc import Iterable, Sequence
from itertools import islice, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel

from kvscope.results.columns import plain_kinds
from kvscope.results.reading import cycles_left
from kvscope.results.rowfile import RowT, each_row, second_result

_BLOCK_ROWS = 4096
_log = logging.getLogger(__name__)


def read_frame(path: Path, kind: type[RowT], *, messages: list[str]) -> pd.DataFrame:
    """Read a file of rows as a frame; what was left out is logged and added to `messages`.

    Of two rows of a cell the later counts, in the earlier one's place.

    Raises:
        UsageError: see `rowfile.read_rows`.
    """
    lines_of: dict[Any, int] = {}
    unmeasured: set[Any] = set()
    said: list[str] = []

    def rows() -> Iterable[RowT]:
        for number, row in each_row(path, kind, messages=said, mend=False):
            key = row.key
            if key in lines_of and key not in unmeasured:
                raise second_result(path, number, key, first=lines_of[key])
            lines_of[key] = number
            (unmeasured.discard if row.is_result else unmeasured.add)(key)
            yield row

    frame = frame_of(rows(), kind)
    for message in said:
        _log.warning(message)
    messages += said
    if len(lines_of) == len(frame):
        return frame
    return frame.take([number - 1 for number in lines_of.values()]).reset_index(drop=True)


def frame_of(rows: Iterable[BaseModel], kind: type[BaseModel]) -> pd.DataFrame:
    """Make a frame of rows of one kind: a column a field, in the schema's order and of the type of `_dtype`."""
    dtypes = {name: _dtype(field.annotation) for name, field in kind.model_fields.items()}
    values_of = itemgetter(*dtypes)
    values = (values_of(row.__dict__) for row in rows)
    blocks: list[list[Any]] = []
    with cycles_left():
        while len(block := list(islice(values, _BLOCK_ROWS))) or not blocks:
            columns = zip(*block, strict=True) if block else repeat(())
            blocks.append([_column(column, dtype) for column, dtype in zip(columns, dtypes.values(), strict=False)])
        joined = [_joined(parts) for parts in zip(*blocks, strict=True)]
    return pd.DataFrame(dict(zip(dtypes, joined, strict=True)))


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return type(parts[0])._concat_same_type(parts)


def _column(values: Sequence[Any], dtype: str) -> Any:
    if dtype == "object":
        plain = [value.model_dump() if isinstance(value, BaseModel) else value for value in values]
        column = np.empty(len(plain), dtype=object)
        column[:] = plain
        return column
    if dtype == "float64":
        return np.array(values, dtype=np.float64)
    if dtype == "Int64" and None not in values:
        return pd.arrays.IntegerArray(np.array(values, dtype=np.int64), np.zeros(len(values), dtype=bool))
    return pd.array(values, dtype=dtype)  # type: ignore[call-overload]


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
