"""Filler lines grouped into dated sessions, made one after another as a prompt's room asks for them."""

from collections.abc import Callable

from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.lexicon import date_text
from kvscope.tasks.long_qa.render import line, small_talk
from kvscope.tasks.long_qa.wording import Wording
from kvscope.tasks.long_qa.world import DAYS, World
from kvscope.tasks.words import Split

# Filler lines a session; questions' facts come on top.
SESSION_LINES = (4, 12)


class Sessions:
    """The i-th filler line of a story: a session's header, a fact nobody asks about, or small talk.

    Args:
        world: whose facts filler takes; questions must have claimed theirs before the first line is made.
        wording: templates.
        split: whose words small talk uses.
        draws: the filler's random stream.
        day_of: session number -> day of the year, never falling.
    """

    def __init__(
        self, world: World, wording: Wording, *, split: Split, draws: Draws, day_of: Callable[[int], int]
    ) -> None:
        self._world, self._wording, self._split, self._draws, self._day_of = world, wording, split, draws, day_of
        self._lines: list[str] = []
        self._sessions = 0
        self._left = 0

    def __call__(self, index: int) -> str:
        """Return line ``index``; earlier lines are made first, so the text does not depend on who asks when."""
        while len(self._lines) <= index:
            self._lines.append(self._next())
        return self._lines[index]

    def _next(self) -> str:
        draws, wording = self._draws, self._wording
        if self._left == 0:
            self._left = draws.between(*SESSION_LINES)
            day = min(DAYS - 1, self._day_of(self._sessions))
            self._sessions += 1
            return draws.pick(wording.sessions).format(d=date_text(day))
        self._left -= 1
        fact = self._world.filler(draws)
        return small_talk(wording, draws, self._split) if fact is None else line(wording, draws, fact)
