"""Reading one row of a file in a single pass, where nothing about its line is unusual.

pydantic's own JSON parser is several times as fast as the strict one of `results/reading.py`, but takes what that one
refuses: a name twice in one object, deep nesting, infinite numbers. Lines that may hold such things are left to it, and
so is every line with a fault: it alone says what is wrong.
"""

import math
import re
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvscope.results.columns import may_nest
from kvscope.results.limits import MOST_NESTED

ModelT = TypeVar("ModelT", bound=BaseModel)
_SURROGATE = re.compile(rb"\\u[dD]")
_NAME_ENDS = b'":'
"""Names with space before their colon are not counted: such a line is left to the strict parser."""
_NAMELESS = frozenset({str, int, bool, type(None)})


def quick_row(line: bytes, kind: type[ModelT]) -> ModelT | None:
    """Return the valid row that a line holds; None where the strict parser has to decide."""
    if b'" :' in line or b"\t" in line or b"\r" in line:
        return None
    if (b"\\" in line and _SURROGATE.search(line)) or line.count(b"[") + line.count(b"{") > MOST_NESTED:
        return None
    try:
        row = kind.__pydantic_validator__.validate_json(line)
    except ValidationError:
        return None
    # A name that stands twice is one name of the row. So is none where a text holds what looks like the end of a name.
    return row if line.count(_NAME_ENDS) == _names(row) else None


def _names(row: BaseModel) -> float:
    """How many names a row was read from; not a number where it holds one that is infinite."""
    held = row.__dict__
    names: float = len(row.model_fields_set)
    for field in _nesting(row.__class__):
        value = held[field]
        if value is not None:
            names += _names(value) if isinstance(value, BaseModel) else _names_within(value)
    return names


def _names_within(value: Any) -> float:
    kind = value.__class__
    if kind is dict:
        names: float = len(value)
        for inner in value.values():
            if inner.__class__ not in _NAMELESS:
                names += _names_within(inner)
        return names
    if kind is list:
        return sum(map(_names_within, value))
    return math.nan if kind is float and not math.isfinite(value) else 0


@cache
def _nesting(kind: type[BaseModel]) -> tuple[str, ...]:
    """The fields that may hold names: objects, and lists of anything but plain values."""
    return tuple(name for name, field in kind.model_fields.items() if may_nest(field.annotation))
