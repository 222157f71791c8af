"""How numbers are written in reports: lengths in K tokens, bytes in MiB or GiB (powers of 1024), never in GB."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_TINY = 1e-6


@dataclass(frozen=True)
class ByteUnit:
    """One unit for a whole column or axis."""

    name: str
    size_bytes: int

    def text(self, value_bytes: float) -> str:
        """The number alone, three significant digits, trailing zeros kept out."""
        return number(value_bytes / self.size_bytes)


def byte_unit(values_bytes: Iterable[float]) -> ByteUnit:
    """One unit for a whole table: MiB, or KiB when nothing reaches 1 MiB. Never GiB, so that tables of runs compare."""
    largest = max((abs(v) for v in values_bytes if not pd.isna(v)), default=float(MIB))
    return ByteUnit("MiB", MIB) if largest >= MIB else ByteUnit("KiB", KIB)


def bytes_text(value_bytes: float) -> str:
    """One amount with its own unit, e.g. `768 MiB`."""
    size = abs(value_bytes)
    unit = "GiB" if size >= GIB else "MiB" if size >= MIB else "KiB" if size >= KIB else "B"
    return f"{number(value_bytes / {'GiB': GIB, 'MiB': MIB, 'KiB': KIB, 'B': 1}[unit])} {unit}"


def length_text(length_tokens: int) -> str:
    """`512K` for 524288, `1M` for 1048576, `1,500` for 1500."""
    if length_tokens >= MIB and length_tokens % MIB == 0:
        return f"{length_tokens // MIB}M"
    if length_tokens >= KIB and length_tokens % KIB == 0:
        return f"{length_tokens // KIB}K"
    return f"{length_tokens:,}"


def number(value: float) -> str:
    """Three significant digits, without an exponent from a millionth on: 0.0123, 1.23, 12.3, 123, 1,234."""
    if value == 0 or abs(value) < _TINY:
        return "0" if value == 0 else f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def measured(value: float) -> str:
    """A measured number with three significant digits, zeros kept, so that a column lines up: 9.70, 15.5, 103."""
    if value == 0 or abs(value) < _TINY:
        return "0" if value == 0 else f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def percent(fraction: float) -> str:
    """One decimal, without the sign: 0.125 -> `12.5`."""
    return f"{100 * fraction:.1f}"


def points(fraction: float) -> str:
    """A difference in percentage points, with its sign; nil has none."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def with_interval(
    value: float, low: float | None, high: float | None, *, text: Callable[[float], str] = percent
) -> str:
    """`12.5 [10.1, 15.0]`: estimate and both ends rounded alike, so that what is printed holds its estimate, too.

    The estimate alone where there are no ends.
    """
    return text(value) if low is None or high is None else f"{text(value)} [{text(low)}, {text(high)}]"


def milliseconds(middle_s: float, low_s: float | None, high_s: float | None) -> str:
    """A time in ms with its 10th and 90th percentile where they are known: `9.70 [9.65, 9.81]`.

    The ends have as many decimals as the middle, so that what is printed holds it.
    """
    value = 1000 * middle_s
    digits = max(0, 2 - math.floor(math.log10(value))) if value > _TINY else 2
    return with_interval(
        value,
        None if low_s is None else 1000 * low_s,
        None if high_s is None else 1000 * high_s,
        text=lambda ms: measured(ms) if 0 < ms < _TINY else f"{ms:,.{digits}f}",
    )


def p_text(p_value: float) -> str:
    """A p-value: `< 0.0001`, `0.031`, `1`."""
    return "< 0.0001" if p_value < 1e-4 else number(round(p_value, 4))
