"""How a sweep tells where it is: rich bars with an ETA on a terminal, plain lines elsewhere, nothing when silent.

All of it goes to stderr; tables and paths go to stdout. The sweep's bar counts tokens, not prompts, so its ETA holds
when long and short lengths are mixed.
"""

import sys
import time
from types import TracebackType
from typing import Self

from kvscope.terminal import printable, tell
from kvscope.units import format_seconds

PLAIN_INTERVAL_S = 30.0
DESCRIPTION_CHARACTERS = 30


class Progress:
    """The silent progress, and the interface of the other two. Use as a context manager."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def begin(self, *, cells: int, work_tokens: int) -> None:
        """Start a sweep of ``cells`` cells that will process ``work_tokens`` prompt tokens in all."""

    def begin_cell(self, name: str, *, steps: int) -> None:
        """Start one cell of ``steps`` prompts (or phases)."""

    def begin_step(self, name: str, *, parts: int = 0) -> None:
        """Start one prompt of the cell; ``parts`` is the number of :meth:`part` calls that will follow."""

    def part(self, name: str) -> None:
        """Say what is being done now (``prefill``, a method's name) within the prompt."""

    def end_step(self, *, work_tokens: int, cell: str | None = None) -> None:
        """One prompt is done, of the cell begun last or of an earlier one: a cell may begin before another ends."""

    def end_cell(self, summary: str, *, cell: str | None = None) -> None:
        """A cell is done, the one begun last or an earlier one; ``summary`` is its result in a few words."""

    def note(self, text: str) -> None:
        """Tell the user something once: a repaired file, a fallback, a failure."""


class _Cell:
    """A cell under way: its prompts, and since when."""

    def __init__(self, steps: int) -> None:
        self.steps, self.steps_done = steps, 0
        self._started_s = time.monotonic()

    def took(self) -> str:
        """Return the time since its beginning, in words."""
        return format_seconds(time.monotonic() - self._started_s)


class PlainProgress(Progress):
    """One line a finished cell, and one every 30 s inside a long one."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._spoke_s = self._started_s
        self._cells = self._cells_done = self._work_tokens = self._done_tokens = 0
        self._cell = ""
        self._under_way: dict[str, _Cell] = {}

    def _write(self, text: str) -> None:
        tell(text)
        self._spoke_s = time.monotonic()

    def _left(self) -> str:
        # Others are under way as the first prompt ends, and loading counts in: less than a tenth tells nothing.
        if not self._work_tokens <= 10 * self._done_tokens < 10 * self._work_tokens:
            return ""
        elapsed_s = time.monotonic() - self._started_s
        left_s = elapsed_s * (self._work_tokens - self._done_tokens) / self._done_tokens
        return f", about {format_seconds(left_s)} left"

    def begin(self, *, cells: int, work_tokens: int) -> None:
        self._cells, self._work_tokens = cells, work_tokens
        self._started_s = time.monotonic()

    def begin_cell(self, name: str, *, steps: int) -> None:
        self._cell = name
        self._under_way[name] = _Cell(steps)

    def end_step(self, *, work_tokens: int, cell: str | None = None) -> None:
        name = self._cell if cell is None else cell
        current = self._under_way[name]
        current.steps_done += 1
        self._done_tokens += work_tokens
        if time.monotonic() - self._spoke_s >= PLAIN_INTERVAL_S and current.steps_done < current.steps:
            done = self._cells_done + 1
            self._write(
                f"[{done}/{self._cells}] {name}: prompt {current.steps_done} of {current.steps} done{self._left()}"
            )

    def end_cell(self, summary: str, *, cell: str | None = None) -> None:
        name = self._cell if cell is None else cell
        self._cells_done += 1
        took = self._under_way.pop(name).took()
        self._write(f"[{self._cells_done}/{self._cells}] {name}: {summary} ({took}{self._left()})")

    def note(self, text: str) -> None:
        self._write(text)


def _column(bar: str, text: str = "") -> str:
    """Return a bar's name and text in a fixed width, so that the bars do not jump."""
    return f"{bar:<7} {printable(text)[:DESCRIPTION_CHARACTERS]:<{DESCRIPTION_CHARACTERS}}"


class RichProgress(Progress):
    """Three bars (sweep, cell, prompt) with an ETA, and one line a finished cell above them."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            speed_estimate_period=120.0,
            transient=True,
        )
        self._cells = self._cells_done = 0
        self._cell = self._step = ""
        self._parts = 0
        self._under_way: dict[str, _Cell] = {}
        self._sweep = self._bars.add_task(_column("sweep", "loading"), total=None)
        self._cell_bar = self._bars.add_task(_column("cell"), total=None)
        self._step_bar = self._bars.add_task(_column("prompt"), total=None)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, *, cells: int, work_tokens: int) -> None:
        self._cells = cells
        self._bars.update(self._sweep, total=work_tokens)

    def begin_cell(self, name: str, *, steps: int) -> None:
        self._cell = name
        self._under_way[name] = _Cell(steps)
        self._bars.update(self._sweep, description=_column("sweep", f"{self._cells_done + 1} of {self._cells}"))
        self._bars.reset(self._cell_bar, description=_column("cell", name), total=steps)

    def begin_step(self, name: str, *, parts: int = 0) -> None:
        self._step, self._parts = name, 0
        self._bars.reset(self._step_bar, description=_column("prompt", name), total=parts or None)

    def part(self, name: str) -> None:
        self._bars.update(self._step_bar, description=_column("prompt", f"{self._step}: {name}"), completed=self._parts)
        self._parts += 1

    def end_step(self, *, work_tokens: int, cell: str | None = None) -> None:
        if cell in (None, self._cell):
            step = self._bars.tasks[self._step_bar]
            self._bars.update(self._step_bar, completed=step.total or 0)
            self._bars.advance(self._cell_bar)
        self._bars.advance(self._sweep, work_tokens)

    def end_cell(self, summary: str, *, cell: str | None = None) -> None:
        name = self._cell if cell is None else cell
        self._cells_done += 1
        took = self._under_way.pop(name).took()
        self._bars.console.print(printable(f"{name}: {summary} ({took})"), highlight=False, markup=False)

    def note(self, text: str) -> None:
        self._bars.console.print(printable(text), highlight=False, markup=False, style="yellow")


def make_progress(wanted: bool = True) -> Progress:
    """Return bars on a terminal, lines without one, silence when not ``wanted``."""
    if not wanted:
        return Progress()
    return RichProgress() if sys.stderr.isatty() else PlainProgress()
