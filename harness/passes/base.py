"""What each pass of a run must be able to say and do.

A pass is one kind of measurement: accuracy, footprint, throughput, the search for the longest context. Everything that
differs between them is a method of the pass, so the plan, the progress, the run and its exit code loop over passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.deadline import Deadline
from kvscope.harness.passes.progress import Progress
from kvscope.results.run_schema import RunInfo

if TYPE_CHECKING:
    from kvscope.results.frames import Run
    from kvscope.results.memory_rows import FootprintRow
    from kvscope.results.schema import SampleRow, ThroughputRow
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a folder still lacks of a pass.

    Attributes:
        cells: units that the progress counts.
        prompts: prompts to answer.
        processes: cells that get a fresh process.
        work_tokens: work of all that, in units of one prefilled token.
    """

    cells: int = 0
    prompts: int = 0
    processes: int = 0
    work_tokens: int = 0

    def __add__(self, other: "Left") -> "Left":
        return Left(
            cells=self.cells + other.cells,
            prompts=self.prompts + other.prompts,
            processes=self.processes + other.processes,
            work_tokens=self.work_tokens + other.work_tokens,
        )


class SampleStore(Protocol):
    """Where rows of the accuracy pass go: a folder (``RunStore``), or the process that writes one."""

    @property
    def folder(self) -> Path:
        """The run's folder."""

    @property
    def info(self) -> RunInfo:
        """What its run.json says."""

    def samples(self) -> "Sequence[SampleRow]":
        """Return the rows that are there."""

    def has_sample(self, key: tuple[str, int, int, str]) -> bool:
        """Return whether (task, length_tokens, sample, method_label) needs no row any more."""

    def append_sample(self, row: "SampleRow") -> None:
        """Put a row there."""


class Pass(Protocol):
    """One kind of measurement of a run; ``plan`` is the kind of plan that has such passes."""

    def lengths_tokens(self, config: RunConfig) -> tuple[int, ...]:
        """Return the lengths that it measures and the plan forecasts; a search finds its own."""

    def check(self, config: RunConfig, facts: Any, tasks: "Sequence[Task]") -> None:
        """Refuse lengths that are too short for it.

        Raises:
            UsageError: naming the length, the limit and who sets it.
        """

    def cells(self, plan: Any) -> Sequence[Any]:
        """Return what it measures, in the order in which it is measured."""

    def text(self, plan: Any) -> list[str]:
        """Return its lines of the plan."""

    def info(self, plan: Any) -> dict[str, Any]:
        """Return its fields of ``run.json``."""

    def reopen(self, plan: Any, store: "RunStore") -> int:
        """Let its rows that are no results be measured again by this call; return how many."""

    def left(self, plan: Any, store: "RunStore") -> Left:
        """Return what a folder lacks of it."""

    def run(self, plan: Any, store: "RunStore", progress: Progress, deadline: Deadline) -> None:
        """Measure what is lacking into the store, until the deadline."""

    def failures(self, run: "Run") -> list[str]:
        """Return one line per kind of failed cell; empty when all is well."""


def failed_lines(what: str, frame: Any) -> list[str]:
    """Return one line per method and status of the rows that failed: how many, and the first reason.

    ``unsupported`` is no failure: the plan said so.

    Args:
        frame: rows of one kind, as :class:`kvscope.results.frames.Run` holds them.
    """
    if frame.empty:
        return []
    bad = frame[frame["status"].isin(["failed", "oom"])]
    return [
        f"{what}: {label}: {len(group)} {status}: {group['reason'].iloc[0]}"
        for (label, status), group in bad.groupby(["method_label", "status"], sort=False)
    ]


def is_open(row: "SampleRow | FootprintRow | ThroughputRow | None", *, unsupported: str | None) -> bool:
    """Whether a row is one to measure again: it failed, ran out of memory, or was unsupported and no longer is.

    Args:
        unsupported: why the plan cannot run its cell.
    """
    if row is None or row.is_result:
        return False
    return row.status != "unsupported" or unsupported is None
