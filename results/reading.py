"""Reading files of a run folder that may come from anywhere: regular files only, within limits, strict JSON."""

import gc
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from kvscope.errors import UsageError
from kvscope.results.limits import MOST_NESTED

MEND = "Restore it from its source."


def read_regular(path: Path, *, most_bytes: int, mend: str = MEND) -> bytes | None:
    """Return what a file holds; None where there is nothing of that name.

    Args:
        mend: what to do where it cannot be read, as a sentence; empty for nothing.

    Raises:
        UsageError: it is a folder, pipe, device or socket, larger than `most_bytes`, or cannot be read.
    """
    mend = f" {mend}" if mend else ""
    try:
        # Without O_NONBLOCK the opening of a pipe would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        if os.path.lexists(path):
            raise UsageError(f"{path} is a link to nothing.{mend}") from None
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise UsageError(f"{path} is no regular file.{mend}")
    with os.fdopen(fd, "rb") as file:
        if status.st_size > most_bytes:
            raise UsageError(f"{path} has {status.st_size:,} bytes, at most {most_bytes:,} are read.{mend}")
        try:
            return file.read(most_bytes)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}.") from error


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: no JSON (RFC 8259), NaN or infinity, a name twice in one object, more than `MOST_NESTED` levels,
            half a surrogate pair, or a number that Python cannot hold. The message says which.
    """
    text = text if isinstance(text, str) else text.decode("utf-8")
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > MOST_NESTED and _deeper_than(value, MOST_NESTED):
        raise ValueError(_TOO_DEEP)
    if _SURROGATE.search(text) and _SURROGATE_ALONE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("half a surrogate pair is no text")
    return value


@contextmanager
def cycles_left() -> Iterator[None]:
    """Do not look for reference cycles meanwhile: rows have none, and looking takes as long as reading them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE_ALONE = re.compile("[\ud800-\udfff]")
_TOO_DEEP = f"more than {MOST_NESTED} levels of lists and objects within each other"


def _deeper_than(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, list | dict)
            for inner in (outer if isinstance(outer, list) else outer.values())
        ]
        if not layer:
            return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_object)
