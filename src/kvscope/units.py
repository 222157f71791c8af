"""Lengths, sizes and times as people write and read them: one reader and one writer of each."""

import re

from kvscope.errors import UsageError

LENGTH_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmM]?)")
BYTES_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|KB|MB|GB)?")
BYTE_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "KB": 1000, "MB": 1000**2, "GB": 1000**3}
LENGTH_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}


def parse_length(value: object) -> int:
    """Return a length in tokens from ``4096``, ``"4096"``, ``"4k"`` (k = 1024) or ``"1M"`` (M = 1024 k).

    Raises:
        UsageError: not a positive whole number of tokens.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        length_tokens = value
    else:
        match = LENGTH_PATTERN.fullmatch(str(value).strip()) if isinstance(value, str) else None
        tokens = float(match[1]) * LENGTH_UNITS[match[2].lower()] if match else 0.5
        if not tokens.is_integer():
            raise UsageError(f"{value!r} is not a length: write tokens as 4096, 4k (k = 1024) or 1M (M = 1024k).")
        length_tokens = int(tokens)
    if length_tokens <= 0:
        raise UsageError(f"{value!r} is not a length: it must be at least one token.")
    return length_tokens


def parse_bytes(value: object) -> int:
    """Return bytes from a whole number, ``"24GiB"`` (binary units) or ``"24GB"`` (decimal units).

    Raises:
        UsageError: not a positive size.
    """
    match = BYTES_PATTERN.fullmatch(str(value).strip()) if isinstance(value, str | int) else None
    size_bytes = int(float(match[1]) * BYTE_UNITS[match[2] or "B"]) if match and not isinstance(value, bool) else 0
    if size_bytes <= 0:
        raise UsageError(f"{value!r} is not a size: write bytes, or 24GiB (1024-based) or 24GB (1000-based).")
    return size_bytes


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
