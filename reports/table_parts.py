"""What the tables share: the two forms of a table, and notes that explain what was not measured."""

from dataclasses import dataclass, field

import pandas as pd

from kvscope.results.schema import RunInfo


@dataclass(frozen=True)
class Table:
    """One table in its two forms."""

    name: str
    """File name without ending."""
    title: str
    caption: str
    data: pd.DataFrame
    """Tidy: one row a cell, units in the column names."""
    text: pd.DataFrame
    """For reading: strings only, units in the headers."""
    notes: tuple[str, ...] = ()
    """`(a) why`, in the order of their letters, and other remarks."""


@dataclass
class Notes:
    """Hands out one letter a reason."""

    letters: dict[str, str] = field(default_factory=dict)

    def mark(self, reason: str) -> str:
        reason = reason.rstrip(".").removeprefix("missing: ")
        if reason not in self.letters:
            place = len(self.letters)
            self.letters[reason] = (chr(96 + place // 26) if place >= 26 else "") + chr(97 + place % 26)
        return f"n/m ({self.letters[reason]})"

    def lines(self) -> tuple[str, ...]:
        return tuple(f"({letter}) not measured: {reason}." for reason, letter in self.letters.items())


def excluded_notes(info: RunInfo) -> tuple[str, ...]:
    """One remark a question type of the run's tasks that pooled scores leave out."""
    return tuple(f"{each.sentence}." for each in info.excluded_types if each.task in info.tasks)
