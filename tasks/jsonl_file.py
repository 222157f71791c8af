"""The file of a ``jsonl`` task: a prompt a line, checked whole before anything is measured."""

import gzip
import hashlib
import json
import lzma
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError, did_you_mean, shown, shown_path
from kvscope.files import first_line
from kvscope.tasks.answers import METRICS

MOST_LINE_BYTES = 32 * 1024**2
SEPARATOR = "\n\n"
"""Stands between ``context`` and ``question``."""
KEYS = ("id", "prompt", "context", "question", "answers", "metric", "meta")
_BOM = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".xz")
"""Endings of files that are unpacked as they are read, in any case."""
_PACKED = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
"""How files of gzip, xz, bzip2, zstandard and zip begin; no JSON does."""


class _Fault(Exception):  # noqa: N818 - it says what is wrong
    """What is wrong with one line."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One prompt of the file.

    Attributes:
        context: what stands before the question; empty where the line has a ``prompt``.
        text: the whole prompt.
        answers: texts of the expected answer.
        metric: how an answer is scored; None for the task's own.
    """

    context: str
    text: str
    answers: tuple[str, ...]
    metric: str | None


def read_jsonl(path: Path) -> tuple[tuple[Line, ...], str]:
    """Return (the lines of a file, the SHA-256 of its bytes, unpacked where the file is compressed).

    Raises:
        UsageError: no such regular file, or the first line that is wrong, by number.
    """
    digest = hashlib.sha256()
    lines: list[Line] = []
    ids: dict[str, int] = {}
    try:
        for number, raw in enumerate(_raw_lines(path), start=1):
            digest.update(raw)
            try:
                values = _object(raw, first=number == 1)
                lines.append(_line(values))
                _check_id(values, ids, number)
            except _Fault as fault:
                end = "" if str(fault).endswith("?") else "."
                raise UsageError(f"Line {number} of {shown_path(path)} {fault}{end}") from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UsageError(
            f"The file {shown_path(path)} is no whole {path.suffix} file ({first_line(error)}): bring it here again."
        ) from error
    except OSError as error:
        raise UsageError(f"The file {shown_path(path)} cannot be read: {error.strerror}.") from error
    if not lines:
        raise UsageError(f"The file {shown_path(path)} holds no prompt: write one JSON object a line.")
    return tuple(lines), digest.hexdigest()


def _raw_lines(path: Path) -> Iterator[bytes]:
    if not path.exists():
        raise UsageError(f"There is no file {shown_path(path)}: write jsonl:FILE, with a JSON object a line in it.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise UsageError(f"{shown_path(path)} is not a regular file: write jsonl:FILE with one.")
    with _opened(path) as file:
        while raw := file.readline(MOST_LINE_BYTES + 1):
            yield raw


def _opened(path: Path) -> BufferedIOBase:
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.open(path)
    return lzma.open(path) if ending == ".xz" else path.open("rb")


def _object(raw: bytes, *, first: bool) -> dict[str, Any]:
    if len(raw) > MOST_LINE_BYTES:
        raise _Fault(f"is longer than {MOST_LINE_BYTES // 1024**2} MiB")
    if first and raw.startswith(_PACKED):
        raise _Fault("begins as a packed file does: unpack it, or let its name end in .gz or .xz if it is one")
    if first and raw.startswith(_BOM):
        raise _Fault("begins with a byte order mark: save the file as UTF-8 without one")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _Fault(f"is not UTF-8 text (byte {error.start + 1})") from None
    if not text.strip():
        raise _Fault("is empty: write one JSON object a line, without lines between")
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep or large"
        raise _Fault(f"is not JSON: {why}") from None
    if not isinstance(values, dict):
        raise _Fault(f"is {shown(values)}, expected a JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Fault(f"has the key {shown(key)} twice")
        found[key] = value
    return found


def _line(values: Mapping[str, Any]) -> Line:
    for key in values:
        if key not in KEYS:
            raise _Fault(f"has the key {shown(key)}, which means nothing here (put it under 'meta')."
                         f"{did_you_mean(key, KEYS)}".rstrip("."))  # fmt: skip
    if "prompt" in values:
        if "context" in values or "question" in values:
            raise _Fault("has 'prompt' beside 'context' or 'question': give the one or the other two")
        context, text = "", _text(values, "prompt")
    else:
        if not {"context", "question"} <= values.keys():
            absent = "'prompt', or 'context' and 'question'" if "question" not in values else "'context'"
            raise _Fault(f"lacks {absent}")
        context = _text(values, "context") + SEPARATOR
        text = context + _text(values, "question")
    metric = values.get("metric")
    if metric is not None and (not isinstance(metric, str) or metric not in METRICS):
        raise _Fault(f"has the metric {shown(metric)}, expected one of {', '.join(METRICS)}")
    return Line(context=context, text=text, answers=_answers(values), metric=metric)


def _answers(values: Mapping[str, Any]) -> tuple[str, ...]:
    if "answers" not in values:
        raise _Fault("lacks 'answers'")
    given = values["answers"]
    answers = given if isinstance(given, list) else [given]
    if not answers:
        raise _Fault("has no answer in 'answers'")
    return tuple(_text({"answers": answer}, "answers") for answer in answers)


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        raise _Fault(f"has {shown(value)} as '{key}', expected text")
    if not value.strip():
        raise _Fault(f"has an empty '{key}'")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Fault(f"has half a character (a lone surrogate) in '{key}'") from None
    return value


def _check_id(values: Mapping[str, Any], seen: dict[str, int], number: int) -> None:
    if "id" not in values:
        return
    given = values["id"]
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise _Fault(f"has the id {shown(given)}, expected text or a whole number")
    first = seen.setdefault(str(given), number)
    if first != number:
        raise _Fault(f"has the id {shown(given)} of line {first} again")
