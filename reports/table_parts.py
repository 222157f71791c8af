"""What the tables share: the two forms of a table, and notes that explain what was not measured."""

from dataclasses import dataclass, field

import pandas as pd

from kvscope.results.plain_text import shortened
from kvscope.results.run_schema import RunInfo


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


_MOST_REASON_CHARS = 400


@dataclass
class Notes:
    """Hands out one letter a reason: why something was not measured, or why a time is not to be trusted."""

    letters: dict[str, str] = field(default_factory=dict)

    def mark(self, reason: str) -> str:
        """Return what stands in the place of a value: `n/m (a)`."""
        reason = shortened(reason.rstrip(".").removeprefix("missing: "), most=_MOST_REASON_CHARS)
        return f"n/m ({self._letter(f'not measured: {reason}')})"

    def doubted(self, time: str, doubts: str) -> str:
        """Return a time as it is quoted: with a letter where it is not to be trusted."""
        return f"{time} ({self._letter(f'time not to be trusted: {doubts}')})" if doubts else time

    def lines(self) -> tuple[str, ...]:
        """Return one note a letter."""
        return tuple(f"({letter}) {text}." for text, letter in self.letters.items())

    def _letter(self, text: str) -> str:
        if text not in self.letters:
            number, letters = len(self.letters), ""
            while number >= 0:
                number, last = number // 26 - 1, number % 26
                letters = chr(97 + last) + letters
            self.letters[text] = letters
        return self.letters[text]


def excluded_notes(info: RunInfo) -> tuple[str, ...]:
    """One remark a question type of the run's tasks that pooled scores leave out."""
    return tuple(f"{each.sentence}." for each in info.excluded_types if each.task in info.tasks)
