"""The phases that training comes in, and what a row of training is.

Mixture after the measured recipe: random-period copying and one-token associative recall teach the circuits, the needle
forms their use. A row is a haystack followed by many questions; only answer tokens carry loss. Lengths grow phase by
phase (long rows from the start do not learn).
"""

from dataclasses import dataclass

from kvscope.harness.reference_model.pieces import Ids
from kvscope.tasks.draws import Draws

ENOUGH_STEPS = 40
"""Steps that a phase's share of right tokens is taken over, where that may end it."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One batch shape of a phase.

    Attributes:
        tokens: row length.
        rows: rows a step.
        questions: most questions a needle row asks.
        share: share of the phase's steps with this shape.
    """

    tokens: int
    rows: int
    questions: int
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training.

    Attributes:
        shapes: batch shapes; each step draws one.
        steps: optimizer steps.
        lr: learning rate at the start and the end of the phase (linear between).
        copy_share, recall_share: share of random-period copying and of one-token recall; the rest are needle rows.
        multi_value_share, multi_query_share: share of needle rows with several values a key, and with questions about
            several keys at once.
        more_uuids: share of needle rows that hold UUIDs under UUIDs, beside the fifth that does anyway.
        documents: share of rows by document family (a key of ``RowMaker.documents``); needle rows give way.
        warmup_steps: steps over which the learning rate rises, where the phase is a run's first.
        objective: what is trained, as the architecture names it; ``answers`` is cross entropy over answer tokens.
        enough: end early once this share of the last ``ENOUGH_STEPS`` steps' scored tokens is right; none: never.
    """

    name: str
    shapes: tuple[Shape, ...]
    steps: int
    lr: tuple[float, float]
    copy_share: float = 0.0
    recall_share: float = 0.0
    multi_value_share: float = 0.3
    multi_query_share: float = 0.15
    more_uuids: float = 0.0
    documents: tuple[tuple[str, float], ...] = ()
    warmup_steps: int = 200
    objective: str = "answers"
    enough: float | None = None

    def shape_of(self, draws: Draws) -> Shape:
        """Draw a step's shape."""
        at = draws.unit() * sum(shape.share for shape in self.shapes)
        for shape in self.shapes:
            at -= shape.share
            if at < 0:
                return shape
        return self.shapes[-1]


@dataclass(frozen=True)
class Row:
    """One training row: ``ids`` of the phase's length; the token after each position in ``answer_at`` is scored."""

    ids: Ids
    answer_at: list[int]
    family: str = "needles"
