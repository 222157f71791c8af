"""How a given value is read: by the type that an option or a key declares, wherever it comes from.

Text of a command line, text of a YAML file and a Python value that mean the same give the same: see :func:`read_value`.
"""

import numbers
import os
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kvscope.errors import UsageError, nearest, shown
from kvscope.units import PLAIN, Unit, finite_number, whole_number

NONE_WORDS = frozenset({"none", "auto", "null", "~"})
BOOL_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def value_text(value: object) -> str:
    """Return a value as labels write it: ``true``, ``none``, ``0.5``."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def own_value(value: object) -> object:
    """Return Python's own value for what stands for one: the text of a path, a number of another library (numpy's)."""
    if isinstance(value, os.PathLike):
        path = os.fspath(value)
        return path if isinstance(path, str) else value
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


class BadValue(ValueError):  # noqa: N818 - it says what is wrong
    """A value that is not of the declared type.

    Attributes:
        expected: what it should be, in words that follow ``expected``.
        hint: how to write one, after a colon; empty where that is plain.
        item: the one of several values that is wrong.
    """

    item: object = None

    def __init__(self, expected: str, hint: str = "") -> None:
        super().__init__(f"expected {expected}")
        self.expected = expected
        self.hint = f": {hint}" if hint else ""


def read_value(declared: Any, given: object) -> Any:
    """Return ``given`` as a value of the declared type; text and Python values of the same meaning give the same.

    - ``int`` takes whole numbers (``010`` is ten), ``Tokens`` and ``Bytes`` with their units; ``float`` finite numbers;
    - ``bool`` takes true, yes, on, false, no, off in any case; a ``Literal`` of on and off takes the same words;
    - ``X | None`` takes none, auto, null and ``~`` for None;
    - ``str`` takes text alone, as written, and a path; a tuple takes one value or several;
    - numbers may be of another library (see :func:`own_value`);
    - any other type is pydantic's to read.

    Raises:
        BadValue: it is of another type.
    """
    given = own_value(given)
    inner, optional = without_none(declared)
    if optional and (given is None or (isinstance(given, str) and given.strip().lower() in NONE_WORDS)):
        return None
    base, unit = _base(inner)
    if typing.get_origin(base) is tuple:
        items = given if isinstance(given, list | tuple | range) else [given]
        return tuple(_read_item(typing.get_args(base)[0], item) for item in items)
    value = _read_base(base, unit, given)
    try:
        # What is left are bounds, choices and types that are not ours.
        return _adapter(inner).validate_python(value)
    except ValidationError as error:
        expected = expected_text(error.errors()[0])
        if optional and typing.get_origin(base) is Literal:  # all choices are listed, and this is one
            expected = f"{expected.replace(' or ', ', ')} or none"
        raise BadValue(expected) from None


def _read_item(declared: Any, item: object) -> Any:
    try:
        return read_value(declared, item)
    except BadValue as error:
        error.item = item
        raise


def read_options(owner: str, declared: Mapping[str, Any], options: Mapping[str, object]) -> dict[str, Any]:
    """Return the options as values of the types they declare.

    Args:
        owner: whose they are, as errors begin: ``Method 'recency'``.
        declared: option name -> its type.

    Raises:
        UsageError: an unknown option, or a value of another type.
    """
    values = {}
    for key, raw in options.items():
        if key not in declared:
            if not declared:
                raise UsageError(f"{owner} has no options, so {shown(key)} cannot be set.")
            listing = ", ".join(declared)
            hint = nearest(key, declared)
            raise UsageError(f"{owner} has no option {shown(key)}.{hint} Its options are: {listing}.")
        try:
            values[key] = read_value(declared[key], raw)
        except BadValue as error:
            raise UsageError(
                f"{owner}: option '{key}' expects {error.expected}, got {shown(raw)}{error.hint}."
            ) from None
    return values


def _read_base(base: Any, unit: Unit, given: object) -> object:
    value: object
    if base is int:
        value, expected = whole_number(given, unit), "a whole number"
    elif base is float:
        value, expected = finite_number(given), "a number"
    elif base is bool:
        value, expected = _truth(given), "true or false"
    elif base is str:
        value, expected = given if isinstance(given, str) else None, "text"
    else:
        return _choice(base, given) if typing.get_origin(base) is Literal else given
    if value is None:
        raise BadValue(expected, unit.hint)
    return value


def _truth(given: object) -> bool | None:
    if isinstance(given, str):
        return BOOL_WORDS.get(given.strip().lower())
    return given if isinstance(given, bool) else None


def _choice(base: Any, given: object) -> object:
    choices = typing.get_args(base)
    text = given.strip() if isinstance(given, str) else given
    if text not in choices and {"on", "off"} <= set(choices) and (truth := _truth(given)) is not None:
        return "on" if truth else "off"
    return text


def expected_text(problem: Mapping[str, Any]) -> str:
    """Return what pydantic expected, in words that follow ``expected``."""
    text = str(problem["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    text = text.rpartition(" should have ")[2]  # "String should have at least 1 character"
    return text.replace("greater than or equal to", "at least").replace("greater than", "more than").replace(
        "less than or equal to", "at most"
    )  # fmt: skip


def without_none(declared: Any) -> tuple[Any, bool]:
    """Return (the type, whether None is one of its values), ``X | None`` reduced to ``X``."""
    if typing.get_origin(declared) in (types.UnionType, typing.Union):
        arguments = typing.get_args(declared)
        others = tuple(each for each in arguments if each is not type(None))
        return typing.Union[others], len(others) < len(arguments)  # noqa: UP007 - made from a tuple
    return declared, False


def _base(declared: Any) -> tuple[Any, Unit]:
    """Return the type under its annotations, and the unit among these."""
    if typing.get_origin(declared) is not Annotated:
        return declared, PLAIN
    base, *notes = typing.get_args(declared)
    return base, next((note for note in notes if isinstance(note, Unit)), PLAIN)


@cache
def _adapter(declared: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(declared, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:  # noqa: BLE001 - a type that brings its own configuration takes no other
        return TypeAdapter(declared)


def type_name(declared: Any) -> str:
    """Return a declared type as pages name it: ``int``, ``on | off | auto``."""
    base, _ = _base(without_none(declared)[0])
    if typing.get_origin(base) is Literal:
        return " | ".join(map(str, typing.get_args(base)))
    return str(getattr(base, "__name__", base))
