"""The accuracy pass in several processes: its prompts in shards, rows gathered by one writer.

A shard is a run of prompts of one (task, length), so that all methods of a prompt share its prefill as ever. Workers
take the next shard when theirs is done. A worker that dies gives its shard back, once: what it had answered is kept.
"""

import json
import queue
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.passes.answering import sample_cell
from kvscope.harness.passes.base import Plan
from kvscope.harness.passes.deadline import Deadline, TimeLimitReached
from kvscope.harness.passes.pools import Ended, Pool, Said, Worker
from kvscope.harness.passes.process import SAID
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.prompt_check import build
from kvscope.harness.passes.row_columns import failed_sample_row
from kvscope.harness.passes.turns import cell_summary, pending_samples, prompt_work_tokens
from kvscope.results.schema import SampleRow
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Task

#: Shards of a cell for each worker: the last ones to end leave few others waiting.
_SHARDS_A_WORKER = 4
_MOST_DEATHS = 2
"""A shard that has ended so many workers is not given out again."""


@dataclass(eq=False)
class Shard:
    """Prompts of one (task, length) that lack rows.

    Attributes:
        task: what rows call it.
        prompts: index of each prompt, and labels of the methods that lack a row of it.
        deaths: workers that died with it.
    """

    task: str
    length_tokens: int
    prompts: tuple[tuple[int, tuple[str, ...]], ...]
    deaths: int = 0

    def message(self, store: "RunStore", left_s: float | None) -> str:
        """Return the line that gives it out, for so long (None is no limit), with what there is of its prompts."""
        keys = [
            (self.task, self.length_tokens, index, method.label)
            for index, _ in self.prompts
            for method in store.info.methods
        ]
        found = [row for key in keys if (row := store.sample_rows.get(key)) is not None]
        values = {
            "task": self.task,
            "length_tokens": self.length_tokens,
            "prompts": self.prompts,
            "rows": [row.model_dump(mode="json") for row in found],
            "left_s": left_s,
        }
        return json.dumps(values) + "\n"


@dataclass(eq=False)
class _Hand:
    """What a worker is at.

    Attributes:
        shard: None before it is ready, and when nothing is left for it.
    """

    shard: Shard | None = None
    ready: bool = False


def shards_of(
    plan: Plan, store: "RunStore", cells: "Sequence[tuple[Task, str, int]]", *, n_workers: int
) -> list[Shard]:
    """Return what lacks rows in shards, in the order in which one process would answer."""
    found = []
    for _, name, length_tokens in cells:
        pending = [
            (index, tuple(method.label for method in methods))
            for index, methods in pending_samples(plan, store, name, length_tokens)
        ]
        least = plan.batch_prompts(plan.batch_rows(length_tokens)) if plan.batch_rows(length_tokens) > 1 else 1
        size = max(1, min(least, -(-len(pending) // n_workers)), -(-len(pending) // (n_workers * _SHARDS_A_WORKER)))
        found += [Shard(name, length_tokens, tuple(pending[at : at + size])) for at in range(0, len(pending), size)]
    return found


def worker_task(plan: Plan, store: "RunStore") -> dict[str, Any]:
    """Return the first line of every worker, but for where it computes and who else does."""
    # Where prompts are answered is said here; a worker is one process on one device.
    config = plan.config.model_dump(mode="json", exclude={"out", "gpus", "device", "executor", "ray_address"})
    return {"config": config, "folder": str(store.folder), "info": store.info.model_dump(mode="json")}


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
                    worker, line = self.said.get(timeout=self.pool.tick_s)
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
                    self._row(SampleRow.model_validate(message["row"]))
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
                self._row(failed_sample_row(cell, sample, status="failed", reason=f"decode: {reason}"))

    # -- rows

    def _row(self, row: SampleRow) -> None:
        key = (row.task, row.length_tokens, row.sample)
        if self.store.has_sample((*key, row.method_label)):
            return  # answered by a worker that died before it could say that it was done
        cell, name = key[:2], f"{row.task} {format_length(row.length_tokens)}"
        if self._in_cell.get(cell, 0) > 0 and cell not in self._begun:
            self._begun.add(cell)
            self.progress.begin_cell(name, steps=self._in_cell[cell])
        self.store.append_sample(row)
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
