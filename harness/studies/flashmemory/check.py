"""One checked number, and how checks are printed: a table that folds at 80 columns, JSON and CSV."""

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

WIDTH_COLUMNS = 80
_WHAT, _VALUE = 38, 13
COLUMNS = ("group", "key", "what", "printed", "recomputed", "difference", "unit", "meaning", "source")


@dataclass(frozen=True, kw_only=True)
class Check:
    """A printed number beside what arithmetic gives.

    Attributes:
        key: names the check in JSON and CSV.
        what: the number in words.
        printed: as printed; None where nothing is.
        recomputed: from other printed numbers, or from the model's geometry.
        unit: of both; ``x`` is a ratio.
        printed_digits, digits: decimals that are shown of each.
        meaning: one sentence.
        source: where the printed number stands.
    """

    key: str
    what: str
    printed: float | None
    recomputed: float
    unit: str
    printed_digits: int = 1
    digits: int = 1
    meaning: str
    source: str

    @property
    def difference(self) -> float | None:
        """Recomputed minus printed, in the unit; None where nothing is printed."""
        return None if self.printed is None else self.recomputed - self.printed


@dataclass(frozen=True, kw_only=True)
class Group:
    """Checks under one title."""

    title: str
    checks: tuple[Check, ...]


def checks_text(groups: Sequence[Group]) -> str:
    """Return the groups as tables of ``WIDTH_COLUMNS`` columns, the meaning of each number below it."""
    lines: list[str] = []
    for group in groups:
        lines += [group.title, _line("", "printed", "recomputed", "difference"), "-" * WIDTH_COLUMNS]
        for source, checks in groupby(group.checks, lambda check: check.source):
            lines.append(f"[{source}]")
            lines += [line for check in checks for line in _check_lines(check)]
        lines.append("")
    return "\n".join(lines[:-1])


def checks_json(groups: Sequence[Group]) -> str:
    """Return the checks as a JSON list, one object each."""
    return json.dumps(_records(groups), indent=2)


def checks_csv(groups: Sequence[Group]) -> str:
    """Return the checks as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_records(groups))
    return text.getvalue()


def _records(groups: Sequence[Group]) -> list[dict[str, str | float | None]]:
    return [
        {
            "group": group.title,
            "key": check.key,
            "what": check.what,
            "printed": check.printed,
            "recomputed": check.recomputed,
            "difference": check.difference,
            "unit": check.unit,
            "meaning": check.meaning,
            "source": check.source,
        }
        for group in groups
        for check in group.checks
    ]


def _check_lines(check: Check) -> list[str]:
    printed = "not printed" if check.printed is None else _quantity(check.printed, check.printed_digits, check.unit)
    difference = "" if check.difference is None else _quantity(check.difference, check.digits, check.unit, sign="+")
    what = textwrap.wrap(check.what, _WHAT)
    first = _line(what[0], printed, _quantity(check.recomputed, check.digits, check.unit), difference)
    below = textwrap.wrap(check.meaning, WIDTH_COLUMNS, initial_indent="  ", subsequent_indent="  ")
    return [first, *what[1:], *below]


def _quantity(value: float, digits: int, unit: str, *, sign: str = "") -> str:
    # No minus before what rounds to nil.
    return f"{round(value, digits) + 0.0:{sign},.{digits}f} {unit}"


def _line(what: str, *values: str) -> str:
    return (f"{what:<{_WHAT}}" + "".join(f" {value:>{_VALUE}}" for value in values)).rstrip()
