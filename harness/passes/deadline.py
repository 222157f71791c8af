"""``--time-limit``: a run that stops between two rows, so that a long one can be had in pieces."""

import time

from kvscope.errors import KvscopeError


class TimeLimitReached(KvscopeError):  # noqa: N818 - nothing went wrong
    """The time limit ended a run before its last row; the same command continues it."""


class Deadline:
    """Asked before each piece of work; ``limit_s`` None is no limit."""

    def __init__(self, limit_s: float | None = None) -> None:
        self._limit_s = limit_s
        self._started_s = time.monotonic()

    @property
    def left_s(self) -> float | None:
        """Seconds that are left; None where there is no limit."""
        return None if self._limit_s is None else max(0.0, self._limit_s - (time.monotonic() - self._started_s))

    def check(self) -> None:
        """Let the next piece begin.

        Raises:
            TimeLimitReached: the time is over.
        """
        if self.left_s == 0:
            raise TimeLimitReached(
                f"The time limit of {self._limit_s:g} s is reached: every finished row is kept, and the same command "
                "continues."
            )
