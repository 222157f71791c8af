"""What a column of a row model holds."""

import types
import typing
from typing import Any


def plain_kinds(annotation: Any) -> set[Any]:
    """Return the types an annotation stands for, None left out and literals by their type."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(annotation) if part is not type(None) for kind in plain_kinds(part)}
    if origin is typing.Annotated:
        return plain_kinds(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    return {origin or annotation}


def may_nest(annotation: Any) -> bool:
    """Return whether a value may hold JSON objects: of anything but plain values, and lists of those."""
    kinds = plain_kinds(annotation)
    if kinds == {tuple}:
        parts = (part for given in _alternatives(annotation) for part in typing.get_args(given))
        return any(may_nest(part) for part in parts if part is not ...)
    return not kinds <= {bool, int, float, str}


def _alternatives(annotation: Any) -> list[Any]:
    """What an annotation may be, None and constraints left out."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = (part for part in typing.get_args(annotation) if part is not type(None))
        return [each for part in parts for each in _alternatives(part)]
    return _alternatives(typing.get_args(annotation)[0]) if origin is typing.Annotated else [annotation]


TIME_COLUMNS = frozenset(
    {
        "prefill_s",
        "decode_s",
        "ttft_s",
        "scores_s",
        "tpot_s",
        "tpot_p10_s",
        "tpot_p90_s",
        "step_s",
        "step_p10_s",
        "step_p90_s",
        "tokens_per_s",
        "tokens_per_s_at_1",
        "floor_s",
        "copy_bytes_per_s",
        "bus_bytes_per_s",
    }
)
"""Columns of rows that are times, or made of them: two runs of one configuration differ in these."""
SURROUNDINGS_COLUMNS = frozenset(
    {"load_1min", "jobs", "host_rss_peak_bytes", "other_processes", "other_processes_nvml_bytes"}
)
"""Columns that tell what else machine and process were doing: two runs differ in these, too, and in no others."""
