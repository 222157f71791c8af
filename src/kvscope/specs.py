"""What a user writes to name a method or a task, and how the values of its options are read.

A spec is ``name``, ``name:key=value,key=value``, ``package.module:Class`` or ``package.module:Class:key=value``, or a
mapping ``{"name": ..., key: value}``. It is parsed once, when the configuration is read; everything later, a worker's
process too, has the same :class:`Spec`. A value with a comma, a quote or spaces around it stands in double quotes.

Values are read by the type that the option declares, so text of a command line, of a YAML file and a Python value give
the same: see :func:`read_value`.
"""

import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from kvscope.errors import UsageError, did_you_mean, shown
from kvscope.units import PLAIN, Unit, finite_number, whole_number

Kind = Literal["method", "task"]
Value = str | int | float | bool | None

NAME_PATTERN = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
PLACE_PATTERN = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)(?=:|$)")
KEY_PATTERN = re.compile(r"\s*[A-Za-z_]\w*\s*=")
QUOTED_PATTERN = re.compile(r'"(?:[^"\\]|\\.)*"')
BARE_OPTIONS = {"jsonl": "data"}
"""Name -> the option that a first item without ``key=`` gives: ``jsonl:FILE`` is ``jsonl:data=FILE``."""
MOST_CHARACTERS = 4096

NONE_WORDS = frozenset({"none", "auto", "null", "~"})
BOOL_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Spec:
    """A method or task as asked for. ``str()`` is its one text form, which reads back as an equal spec.

    Attributes:
        name: a registered name, or ``package.module:Class``.
        options: key and value of each option as given, in the order given.
    """

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        return _joined(self.name, [(key, _quoted(value_text(value))) for key, value in self.options])

    @property
    def label(self) -> str:
        """Name and options sorted by key, nothing quoted: equal for specs that ask for the same.

        Run folders are told apart by it, so its form stays.
        """
        return _joined(self.name, [(key, value_text(value)) for key, value in sorted(self.options)])

    @property
    def is_import_path(self) -> bool:
        """Whether ``name`` is ``package.module:Class``."""
        return ":" in self.name

    def with_option(self, key: str, value: Value) -> Self:
        """Return the spec with one option set, in its old place where it had one."""
        return type(self)(self.name, tuple({**dict(self.options), key: value}.items()))


def parse_spec(given: object, *, kind: Kind) -> Spec:
    """Read a spec in any of its forms.

    Raises:
        UsageError: text of no such form, a mapping without ``name``, or something else.
    """
    if isinstance(given, Spec):
        return given
    if isinstance(given, str):
        return _from_text(given, kind)
    if isinstance(given, Mapping):
        return _from_mapping(given, kind)
    raise UsageError(f"A {kind} is text like name:key=value or a mapping with a 'name', got {shown(given)}.")


def _from_mapping(given: Mapping[Any, Any], kind: Kind) -> Spec:
    options = {str(key): value for key, value in given.items()}
    name = options.pop("name", None)
    if not isinstance(name, str) or not name:
        raise UsageError(f"A {kind} given as a mapping needs a 'name', got {shown(dict(given))}.")
    place = PLACE_PATTERN.fullmatch(name)
    if not NAME_PATTERN.fullmatch(name) and not place:
        raise UsageError(f"{shown(name)} is not the name of a {kind}: write a name or package.module:Class.")
    for key, value in options.items():
        if not key.isidentifier():
            raise UsageError(f"{shown(key)} is not the name of an option of {kind} {shown(name)}.")
        if not isinstance(value, Value):
            raise UsageError(f"Option {key!r} of {kind} {shown(name)} is {shown(value)}, expected one value.")
    return Spec(name, tuple(options.items()))


def _from_text(text: str, kind: Kind) -> Spec:
    if len(text) > MOST_CHARACTERS:
        raise UsageError(f"A {kind} of {len(text):,} characters is too long: {shown(text)}.")
    name, rest = _split_name(text.strip())
    if not (NAME_PATTERN.fullmatch(name) or PLACE_PATTERN.fullmatch(name)) or rest == "":
        raise UsageError(f"{shown(text)} is not a {kind}: write name or name:key=value,key=value.")
    options: dict[str, Value] = {}
    for index, item in enumerate(split_items(rest or "")):
        if index == 0 and name in BARE_OPTIONS and not KEY_PATTERN.match(item):
            item = f"{BARE_OPTIONS[name]}={item}"
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key.isidentifier() or not value:
            raise UsageError(
                f"{shown(item.strip())} in {kind} {shown(text)} is not key=value: write {name}:key=value,key=value."
            )
        if key in options:
            raise UsageError(f"Option {shown(key)} is given twice in {kind} {shown(text)}: keep one.")
        options[key] = unquoted(value)
    return Spec(name, tuple(options.items()))


def _split_name(text: str) -> tuple[str, str | None]:
    """Return (name or import path, what follows its colon; None without one).

    ``module:Class`` without a dot is an import path when the class is written with a capital, as classes are.
    """
    place = PLACE_PATTERN.match(text)
    if place and place[1] not in BARE_OPTIONS and ("." in place[1] or place[2][0].isupper()):
        rest = text[place.end() :]
        return place[0], rest[1:].strip() if rest else None
    name, colon, rest = text.partition(":")
    return name.strip(), rest.strip() if colon else None


def split_items(text: str) -> list[str]:
    """Split at the commas outside of double quotes; no text has no items."""
    if not text:
        return []
    items, start, at = [], 0, 0
    while at < len(text):
        quoted = QUOTED_PATTERN.match(text, at) if _opens_value(text, start, at) else None
        if text[at] == ",":
            items.append(text[start:at])
            start = at + 1
        at = quoted.end() if quoted else at + 1
    return [*items, text[start:]]


def _opens_value(text: str, start: int, at: int) -> bool:
    """Whether a quote at ``at`` begins the value of the item that begins at ``start``."""
    return text[at] == '"' and text[start:at].rstrip()[-1:] in ("", "=")


def unquoted(text: str) -> str:
    """Take a pair of quotes off a value, as YAML would."""
    if QUOTED_PATTERN.fullmatch(text):
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == "'" else text


def _joined(name: str, options: list[tuple[str, str]]) -> str:
    return f"{name}:{','.join(f'{key}={value}' for key, value in options)}" if options else name


def _quoted(text: str) -> str:
    plain = text and text == text.strip() and "," not in text and text[0] not in "\"'" and text.isprintable()
    return text if plain else json.dumps(text, ensure_ascii=False)


def value_text(value: object) -> str:
    """Return a value as labels write it: ``true``, ``none``, ``0.5``."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _field(kind: Kind) -> tuple[Any, ...]:
    def read(given: object) -> Spec:
        if not isinstance(given, str | Mapping | Spec):
            raise ValueError("not a spec")
        return parse_spec(given, kind=kind)

    return PlainValidator(read), PlainSerializer(str, return_type=str)


MethodSpec = Annotated[Spec, *_field("method")]
"""A field of a model that holds a method; written as its text."""
TaskSpec = Annotated[Spec, *_field("task")]
"""A field of a model that holds a task; written as its text."""


class BadValue(ValueError):  # noqa: N818 - it says what is wrong
    """A value that is not of the declared type.

    Attributes:
        expected: what it should be, in words that follow ``expected``.
        hint: how to write one, after a colon; empty where that is plain.
    """

    def __init__(self, expected: str, hint: str = "") -> None:
        super().__init__(f"expected {expected}")
        self.expected = expected
        self.hint = f": {hint}" if hint else ""


def read_value(declared: Any, given: object) -> Any:
    """Return ``given`` as a value of the declared type; text and Python values of the same meaning give the same.

    - ``int`` takes whole numbers (``010`` is ten), ``Tokens`` and ``Bytes`` with their units; ``float`` finite numbers;
    - ``bool`` takes true, yes, on, false, no, off in any case; a ``Literal`` of on and off takes the same words;
    - ``X | None`` takes none, auto, null and ``~`` for None;
    - ``str`` takes text alone, as written; a tuple takes one value or several;
    - any other type is pydantic's to read.

    Raises:
        BadValue: it is of another type.
    """
    inner, optional = without_none(declared)
    if optional and (given is None or (isinstance(given, str) and given.strip().lower() in NONE_WORDS)):
        return None
    base, unit = _base(inner)
    if typing.get_origin(base) is tuple:
        items = given if isinstance(given, list | tuple) else [given]
        return tuple(read_value(typing.get_args(base)[0], item) for item in items)
    value = _read_base(base, unit, given)
    try:
        # What is left are bounds, choices and types that are not ours.
        return _adapter(inner).validate_python(value)
    except ValidationError as error:
        raise BadValue(expected_text(error.errors()[0])) from None


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
            hint = did_you_mean(key, declared)
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
