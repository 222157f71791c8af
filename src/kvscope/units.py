"""Numbers, lengths, sizes and times as people write and read them: one reader and one writer of each.

``Tokens`` and ``Bytes`` are types of options: what is declared with them is read with their units, wherever it comes
from. A whole number is digits of ASCII, in base ten whatever zeros lead it; ``1_000``, ``+5`` and ``5.0`` are whole
numbers, ``0x10`` and ``1e3`` are not.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from kvscope.errors import UsageError, shown

WHOLE_PATTERN = re.compile(r"([+-]?)([0-9]+(?:_[0-9]+)*)(\.[0-9]+)?\s*([A-Za-z]*)")
NUMBER_PATTERN = re.compile(r"[+-]?(?:[0-9]+(?:_[0-9]+)*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
MOST_CHARACTERS = 64
LARGEST_WHOLE = 2**63 - 1
"""What a column of a table can hold."""
LENGTH_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}
BYTE_UNITS = {
    "": 1, "b": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3, "kb": 1000, "mb": 1000**2, "gb": 1000**3,
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """What a whole number counts.

    Attributes:
        factors: unit in lower case -> what it multiplies by; ``""`` for a bare number.
        hint: how to write one, as an error ends.
        rounds_down: whether a fraction of one, of something in a larger unit, is dropped (bytes) or refused (tokens).
    """

    factors: Mapping[str, int]
    hint: str = ""
    rounds_down: bool = False

    __hash__ = object.__hash__


PLAIN = Unit({"": 1})
TOKENS = Unit(LENGTH_UNITS, "write tokens as 4096, 4k (k = 1024) or 1M (M = 1024k)")
BYTES = Unit(BYTE_UNITS, "write bytes, or 24GiB (1024-based) or 24GB (1000-based)", rounds_down=True)

Tokens = Annotated[int, TOKENS]
"""A count of tokens: ``4096``, ``4k`` or ``0.5M``."""
Bytes = Annotated[int, BYTES]
"""A count of bytes: ``4096``, ``1.5GiB`` or ``24GB``."""


def whole_number(value: object, unit: Unit = PLAIN) -> int | None:
    """Return a whole number from a number or its text; None for anything else, or more than 2^63 - 1 either way."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    number = _whole_text(value, unit) if isinstance(value, str) else value
    # Only a float can be infinite or have a fraction, and a large int fits none.
    if number is None or (isinstance(number, float) and not number.is_integer()):
        return None
    return int(number) if abs(number) <= LARGEST_WHOLE else None


def _whole_text(text: str, unit: Unit) -> int | float | None:
    text = text.strip()
    match = WHOLE_PATTERN.fullmatch(text) if len(text) <= MOST_CHARACTERS else None
    factor = unit.factors.get(match[4].lower()) if match else None
    if match is None or factor is None:
        return None
    sign = -1 if match[1] == "-" else 1
    if match[3] is None:
        return sign * int(match[2]) * factor
    number = float(match[2] + match[3]) * factor
    return sign * (math.floor(number) if unit.rounds_down and factor > 1 else number)


def finite_number(value: object) -> float | None:
    """Return a finite number from a number or its text (``0.5``, ``.5``, ``1e-3``); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        value = value.strip()
        if len(value) > MOST_CHARACTERS or not NUMBER_PATTERN.fullmatch(value):
            return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def parse_length(value: object) -> int:
    """Return a length in tokens from ``4096``, ``"4096"``, ``"4k"`` (k = 1024) or ``"1M"`` (M = 1024 k).

    Raises:
        UsageError: not a positive whole number of tokens.
    """
    length_tokens = whole_number(value, TOKENS)
    if length_tokens is None:
        raise UsageError(f"{shown(value)} is not a length: {TOKENS.hint}.")
    if length_tokens <= 0:
        raise UsageError(f"{shown(value)} is not a length: it must be at least one token.")
    return length_tokens


def format_length(length_tokens: int) -> str:
    """Return the short form of a length: ``4096`` -> ``4K``, ``1048576`` -> ``1M``, ``1000`` -> ``1000``."""
    for unit_tokens, suffix in ((LENGTH_UNITS["m"], "M"), (LENGTH_UNITS["k"], "K")):
        if length_tokens % unit_tokens == 0:
            return f"{length_tokens // unit_tokens}{suffix}"
    return str(length_tokens)


def format_seconds(seconds: float) -> str:
    """Return ``12 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(value_bytes: float) -> str:
    """Return ``512 B``, ``48.0 KiB``, ``1.5 MiB`` or ``12.3 GiB``."""
    if value_bytes < 1024:
        return f"{value_bytes:.0f} B"
    for unit in ("KiB", "MiB"):
        value_bytes /= 1024
        if value_bytes < 1024:
            return f"{value_bytes:.1f} {unit}"
    return f"{value_bytes / 1024:.1f} GiB"
