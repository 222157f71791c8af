"""What a user writes to name a method or a task, with its options.

A spec is ``name``, ``name:key=value,key=value``, ``package.module:Class`` or ``package.module:Class:key=value``, or a
mapping ``{"name": ..., key: value}``. It is parsed once, when the configuration is read; everything later, a worker's
process too, has the same :class:`Spec`. A value with a comma, a quote or spaces around it stands in double quotes.

Its options are read later, by the types that the method or task declares (see ``kvscope.values``).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import PlainSerializer, PlainValidator

from kvscope.errors import UsageError, shown
from kvscope.values import own_value, value_text

Kind = Literal["method", "task"]
Value = str | int | float | bool | None

NAME_PATTERN = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
PLACE_PATTERN = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)(?=:|$)")
KEY_PATTERN = re.compile(r"\s*[A-Za-z_]\w*\s*=")
QUOTED_PATTERN = re.compile(r'"(?:[^"\\]|\\.)*"')
BARE_OPTIONS = {"jsonl": "data"}
"""Name -> the option that a first item without ``key=`` gives: ``jsonl:FILE`` is ``jsonl:data=FILE``."""
MOST_CHARACTERS = 4096


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
    options: dict[str, Any] = {str(key): own_value(value) for key, value in given.items()}
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
