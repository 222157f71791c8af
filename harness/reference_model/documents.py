"""Training documents as text: a haystack in lines, and questions with their answers.

Tasks whose haystack means something (stories, variable chains, word lists) come in this form. The training loop turns a
document into one row: haystack, then every question with its answer; only answer tokens carry loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvscope.tasks.draws import Draws


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: question and beginning of the answer, on one line, without a trailing space or newline.
        answer: what follows ``prompt``; begins with a space and holds no newline. The row adds end-of-sequence.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Document:
    """Haystack lines, each ending with a newline, and questions about them in any order."""

    lines: list[str]
    questions: list[Question]


class DocumentMaker(Protocol):
    """Makes documents of one task family from training names, templates and seeds only."""

    def __call__(self, draws: Draws, *, room_tokens: int, n_questions: int, count: Callable[[str], int]) -> Document:
        """Return a document.

        Args:
            draws: the row's random stream.
            room_tokens: the lines must not take more tokens than this, and should come close.
            n_questions: most questions wanted; fewer are fine.
            count: tokens of a line or prompt (cached for lines that recur).
        """
        ...
