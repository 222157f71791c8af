"""The accuracy pass in several processes: its prompts in shards, rows gathered by one writer.

A shard is a run of prompts of one (task, length), so that all methods of a prompt share its prefill as ever. Workers
take the next shard when theirs is done. A worker that dies gives its shard back, once: what it had answered is kept.
"""

import json
import queue
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.passes.answering import sample_cell
from kvscope.harness.passes.deadline import Deadline, TimeLimitReached
from kvscope.harness.passes.pools import Ended, Pool, Said, Worker
from kvscope.harness.passes.process import SAID
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.prompt_check import build
from kvscope.harness.passes.row_columns import failed_sample_row
from kvscope.harness.passes.run_plan import Plan
from kvscope.harness.passes.shard_list import Shard, shards_of
from kvscope.harness.passes.turns import cell_summary, pending_samples, prompt_work_tokens
from kvscope.results.schema import SampleRow
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Task

_MOST_ROWS_A_SYNC = 256
_MOST_DEATHS = 2
"""A shard that has ended so many workers is not given out again."""


@dataclass(eq=False)
class _Hand:
    """What a worker is at.

    Attributes:
        shard: None before it is ready, and when nothing is left for it.
    """

    shard: Shard | None = None
    ready: bool = False


@dataclass
class ShardedAccuracy:
    """Answers the prompts of a plan in worker processes.

    Args:
        pool: starts them; its workers say what they do into ``said``.
    """

    plan: Plan
    store: "RunStore"
    progress: Progress
    cells: "Sequence[tuple[Task, str, int]]"
    pool: Pool
    said: Said
    _waiting: deque[Shard] = field(default_factory=deque)
    _workers: dict[Worker, _Hand] = field(default_factory=dict)
    _next: deque[tuple[Worker, str | None]] = field(default_factory=deque)
    """What was said, and is not heard yet."""
    _lost_at_start: int = 0
    _some_began: bool = False
    _left: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """Rows that a prompt lacks."""
    _in_cell: dict[tuple[str, int], int] = field(default_factory=dict)
    """Prompts of a cell that are not done."""
    _begun: set[tuple[str, int]] = field(default_factory=set)

    def run(self, deadline: Deadline) -> None:
        """Answer every prompt that lacks a row.

        Raises:
            TimeLimitReached: there are prompts left.
            UsageError, EnvironmentProblem: a worker could not begin, or what it met is for the user to mend; the
                message is its own.
        """
        self._count()
        self._waiting.extend(shards_of(self.plan, self.store, self.cells, n_workers=self.pool.n_workers))
        over: TimeLimitReached | None = None
        try:
            self._fill()
            while self._workers or (self._waiting and over is None):
                try:
                    worker, line = self._next.popleft() if self._next else self.said.get(timeout=self.pool.tick_s)
                except queue.Empty:
                    over = over or _time_is_over(deadline)
                    if over is None:
                        self._fill()
                    continue
                if worker not in self._workers:
                    continue  # it is gone already
                if line is None:
                    self._died(worker)
                    if over is None:
                        self._fill()
                elif "row" in (message := json.loads(line)):
                    self._rows([message["row"], *self._more_rows()])
                elif "note" in message:
                    self.progress.note(message["note"])
                else:  # ready, or done with a shard
                    self.store.begin()  # not before one has loaded the model: damaged weights leave no run behind
                    hand = self._workers[worker]
                    hand.ready = self._some_began = True
                    over = over or _time_is_over(deadline)
                    if over is not None and hand.shard is not None:
                        self._take_back(hand.shard)
                    hand.shard = self._waiting.popleft() if self._waiting and over is None else None
                    worker.give(None if hand.shard is None else hand.shard.message(self.store, deadline.left_s))
        finally:
            for worker in self._workers:
                worker.kill()
            self.pool.close()
        if over is not None and self._waiting:
            raise over

    def _count(self) -> None:
        for _, name, length_tokens in self.cells:
            pending = pending_samples(self.plan, self.store, name, length_tokens)
            for index, methods in pending:
                self._left[name, length_tokens, index] = len(methods)
            if pending:
                self._in_cell[name, length_tokens] = len(pending)

    # -- workers

    def _fill(self) -> None:
        """Start as many workers as there are shards that no starting one will take."""
        starting = sum(not hand.ready for hand in self._workers.values())
        for worker in self.pool.fill(len(self._waiting) - starting):
            self._workers[worker] = _Hand()

    def _died(self, worker: Worker) -> None:
        """Take back what a worker that ended was at; one that had nothing left has ended well."""
        ended, hand = worker.ended(), self._workers.pop(worker)
        text = ended.last.removeprefix(SAID)
        if text != ended.last:
            for kind in (UsageError, EnvironmentProblem):
                if ended.code == kind.exit_code:
                    self._mend(kind(text), worker, hand)
                    return
        if not hand.ready:
            self._begins_not(ended, worker)
            return
        self.pool.left(worker, usable=True)
        if hand.shard is None:
            return
        shard = hand.shard
        shard.prompts = self._lacking(shard)
        shard.deaths += ended.blames_shard
        died = f"a process on {worker.where} {ended}"
        if shard.deaths < _MOST_DEATHS:
            self.progress.note(f"{died}: its prompts are given to another.")
            self._waiting.appendleft(shard)
        else:
            self._give_up(shard, f"{died}, as did {_MOST_DEATHS - 1} before it with these prompts")

    def _mend(self, error: UsageError | EnvironmentProblem, worker: Worker, hand: _Hand) -> None:
        """End the run with what the user is to mend; a machine that came later is left out."""
        if hand.ready or self.pool.tick_s is None or not self._some_began:
            raise error
        self.progress.note(f"{error} It is left out.")
        self.pool.left(worker, usable=False)

    def _begins_not(self, ended: Ended, worker: Worker) -> None:
        """Let another begin for one that was lost while it began, some times; end the run with one that fails."""
        self._lost_at_start += ended.blames_shard
        if not ended.is_lost or self._lost_at_start > _MOST_DEATHS:
            text = ended.last.removeprefix(SAID)
            raise EnvironmentProblem(
                f"A process of --jobs on {worker.where} could not begin (exit code {ended.code}): {text}"
            )
        self.progress.note(f"a process on {worker.where} {ended} before it could begin: another begins.")
        self.pool.left(worker, usable=True)

    def _take_back(self, shard: Shard) -> None:
        """Let what a worker's time did not do wait."""
        shard.prompts = self._lacking(shard)
        if shard.prompts:
            self._waiting.appendleft(shard)

    def _lacking(self, shard: Shard) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """Return what of a shard has no row yet."""
        mine = {index for index, _ in shard.prompts}
        return tuple(
            (index, tuple(method.label for method in methods))
            for index, methods in pending_samples(self.plan, self.store, shard.task, shard.length_tokens)
            if index in mine
        )

    def _give_up(self, shard: Shard, reason: str) -> None:
        """Make failed rows of what two workers have died with; the same command measures them again."""
        plan = self.plan
        task = next(task for task, name, _ in self.cells if name == shard.task)
        for index, methods in pending_samples(plan, self.store, shard.task, shard.length_tokens):
            if index not in {index for index, _ in shard.prompts}:
                continue
            sample = build(plan, task, shard.task, shard.length_tokens, index)
            for method in methods:
                cell = sample_cell(plan, method, sample)
                row = failed_sample_row(cell, sample, status="failed", reason=f"decode: {reason}")
                self._rows([row.model_dump(mode="json")])

    # -- rows

    def _more_rows(self) -> list[dict[str, Any]]:
        """Return the rows that wait behind one: they get one sync, which on many disks takes longer than all else."""
        found: list[dict[str, Any]] = []
        while not self._next and len(found) < _MOST_ROWS_A_SYNC:
            try:
                worker, line = self.said.get_nowait()
            except queue.Empty:
                break
            message = {} if line is None or worker not in self._workers else json.loads(line)
            if "row" in message:
                found.append(message["row"])
            else:
                self._next.append((worker, line))
        return found

    def _rows(self, said: Sequence[Mapping[str, Any]]) -> None:
        """Put rows into their file, but for those that are there, and tell what is done with them."""
        rows = {row.key: row for row in map(SampleRow.model_validate, said)}
        # Others were answered by a worker that died before it could say that it was done.
        fresh = [row for key, row in rows.items() if not self.store.has_sample(key)]
        if not fresh:
            return
        for row in fresh:
            self._begin_cell(row)
        self.store.append_samples(fresh)
        for row in fresh:
            self._done(row)

    def _begin_cell(self, row: SampleRow) -> None:
        cell = (row.task, row.length_tokens)
        if self._in_cell.get(cell, 0) > 0 and cell not in self._begun:
            self._begun.add(cell)
            name = f"{row.task} {format_length(row.length_tokens)}"
            self.progress.begin_cell(name, steps=self._in_cell[cell])

    def _done(self, row: SampleRow) -> None:
        key = (row.task, row.length_tokens, row.sample)
        cell, name = key[:2], f"{row.task} {format_length(row.length_tokens)}"
        self._left[key] -= 1
        if self._left[key]:
            return
        self.progress.end_step(
            work_tokens=prompt_work_tokens(row.length_tokens, methods=len(self.plan.methods)), cell=name
        )
        self._in_cell[cell] -= 1
        if not self._in_cell[cell]:
            self.progress.end_cell(cell_summary(self.plan, self.store, *cell), cell=name)


def _time_is_over(deadline: Deadline) -> TimeLimitReached | None:
    try:
        deadline.check()
    except TimeLimitReached as error:
        return error
    return None
