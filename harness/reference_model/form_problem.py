"""What the families hand to the row: a haystack, and questions about it with their items."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvscope.harness.reference_model.form_noise import Count, Layout, Noise
from kvscope.tasks.draws import Draws

# Texts of a kind that are counted before their ratio is trusted.
_COUNTED = 4


@dataclass(frozen=True)
class Asked:
    """A question: its sentence, the beginning of its answer (for a row that gives one) and the answer's items."""

    question: str
    begin: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """A haystack and what is asked about it."""

    body: str
    asked: list[Asked]


class Sizes:
    """Estimates tokens from characters: texts of one kind in one row have one ratio, told from the first few."""

    def __init__(self, count: Count) -> None:
        self._count = count
        self._seen: dict[str, list[float]] = {}

    def __call__(self, kind: str, text: str) -> float:
        """Return about how many tokens a text of a kind takes behind a space."""
        seen = self._seen.setdefault(kind, [0, 0, 0])
        if seen[0] < _COUNTED:
            tokens = self._count(" " + text)
            self._seen[kind] = [seen[0] + 1, seen[1] + tokens, seen[2] + len(text) + 1]
            return tokens
        return (len(text) + 1) * seen[1] / seen[2]


@dataclass(frozen=True)
class Tools:
    """What every family needs: token counts, noise, and the row's layout."""

    noise: Noise
    layout: Layout
    size: Sizes

    def asked_tokens(self, asked: Sequence[Asked]) -> int:
        """Return about what questions and answers take in a row."""
        return int(
            sum(
                self.size("question", one.question + one.begin) + 9 + len(one.items)
                + self.size("items", " ".join(one.items))
                for one in asked
            )
        )  # fmt: skip

    def haystack(self, draws: Draws, said: Sequence[Sequence[str]], room_tokens: float) -> str:
        """Return statements in noise (see ``Noise.haystack``)."""
        sized = [[(text, self.size("said", text)) for text in group] for group in said]
        return self.noise.haystack(draws, self.layout, sized, room_tokens)


class Wording(Protocol):
    """One row's wording of a family: every problem in the row is drawn from it."""

    head: str

    def problem(self, draws: Draws, tools: Tools, *, room_tokens: int, n_questions: int, small: bool) -> Problem:
        """Return a problem whose haystack, questions and answers take about ``room_tokens``.

        Args:
            small: a solved example rather than the row's real problem.
        """
        ...
