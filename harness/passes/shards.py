"""The accuracy pass in several processes: its prompts in shards, rows gathered by one writer.

A shard is a run of prompts of one (task, length), so that all methods of a prompt share its prefill as ever. Workers
take the next shard when theirs is done. A worker that dies gives its shard back, once: what it had answered is kept.
"""

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.engine.host_threads import threads_a_process
from kvscope.harness.passes.answering import sample_cell
from kvscope.harness.passes.base import Plan
from kvscope.harness.passes.deadline import Deadline, TimeLimitReached
from kvscope.harness.passes.mps import side_by_side
from kvscope.harness.passes.process import SAID, STDERR_TAIL_CHARACTERS, worker_environment
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.prompt_check import build
from kvscope.harness.passes.row_columns import failed_sample_row
from kvscope.harness.passes.turns import cell_summary, pending_samples, prompt_work_tokens
from kvscope.plugins import search_path
from kvscope.results.schema import SampleRow
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Task

WORKER_COMMAND = (sys.executable, "-P", "-m", "kvscope.harness.passes.shard_worker")
#: Shards of a cell for each worker: the last ones to end leave few others waiting.
_SHARDS_A_WORKER = 4
_MOST_DEATHS = 2
"""A shard that has ended so many workers is not given out again."""
END_S = 30.0


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

    def message(self, left_s: float | None) -> str:
        """Return the line that gives it out, for so long; None is no limit."""
        values = {"task": self.task, "length_tokens": self.length_tokens, "prompts": self.prompts, "left_s": left_s}
        return json.dumps(values) + "\n"


@dataclass(eq=False)
class _Worker:
    """A process that answers.

    Attributes:
        device: where it computes.
        shard: what it is at; None before it is ready, and when nothing is left for it.
    """

    device: str
    process: "subprocess.Popen[str]"
    stderr: IO[str]
    shard: Shard | None = None
    ready: bool = False

    def give(self, shard: Shard | None, left_s: float | None) -> None:
        """Give it a shard, whose prompts begin within so many seconds; or let it end."""
        self.shard = shard
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: its reader says so
            if shard is None:
                self.process.stdin.close()
            else:
                self.process.stdin.write(shard.message(left_s))
                self.process.stdin.flush()


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


@dataclass
class ShardedAccuracy:
    """Answers the prompts of a plan in worker processes.

    Args:
        devices: one entry a process.
    """

    plan: Plan
    store: "RunStore"
    progress: Progress
    cells: "Sequence[tuple[Task, str, int]]"
    devices: Sequence[str]
    _waiting: deque[Shard] = field(default_factory=deque)
    _environment: dict[str, str] = field(default_factory=dict)
    _workers: list[_Worker] = field(default_factory=list)
    _said: "queue.Queue[tuple[_Worker, str | None]]" = field(default_factory=queue.Queue)
    _left: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """Rows that a prompt lacks."""
    _in_cell: dict[tuple[str, int], int] = field(default_factory=dict)
    """Prompts of a cell that are not done."""

    def run(self, deadline: Deadline) -> None:
        """Answer every prompt that lacks a row.

        Raises:
            TimeLimitReached: there are prompts left.
            UsageError, EnvironmentProblem: a worker could not begin, or what it met is for the user to mend; the
                message is its own.
        """
        self._count()
        self._waiting.extend(shards_of(self.plan, self.store, self.cells, n_workers=len(self.devices)))
        if not self._waiting:
            return
        devices = self.devices[: len(self._waiting)]
        with side_by_side(devices, note=self.progress.note) as self._environment:
            self._answer(devices, deadline)

    def _answer(self, devices: Sequence[str], deadline: Deadline) -> None:
        over: TimeLimitReached | None = None
        try:
            for device in devices:
                self._start(device)
            while self._workers:
                worker, line = self._said.get()
                if line is None:
                    self._died(worker)
                elif "row" in (message := json.loads(line)):
                    self._row(SampleRow.model_validate(message["row"]))
                elif "note" in message:
                    self.progress.note(message["note"])
                else:  # ready, or done with a shard
                    self.store.begin()  # not before one has loaded the model: damaged weights leave no run behind
                    worker.ready = True
                    over = over or _time_is_over(deadline)
                    if over is not None and worker.shard is not None:
                        self._take_back(worker.shard)
                    worker.give(self._waiting.popleft() if self._waiting and over is None else None, deadline.left_s)
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.wait()
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

    def _start(self, device: str) -> None:
        environment = {**worker_environment(), **self._environment}
        environment.setdefault("OMP_NUM_THREADS", str(threads_a_process(len(self.devices), device=device)))
        stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed when it ends
        process = subprocess.Popen(
            WORKER_COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which then ends the workers
        )
        worker = _Worker(device, process, stderr)
        self._workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), name=f"shards on {device}", daemon=True).start()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(self._task_of(device)) + "\n")
            process.stdin.flush()

    def _task_of(self, device: str) -> Mapping[str, Any]:
        config = self.plan.config.model_dump(mode="json", exclude={"out", "gpus", "device"})
        return {
            "config": {**config, "device": device},
            "folder": str(Path(self.store.folder).resolve()),
            "import_folders": search_path(),
            "n_jobs": len(self.devices),
        }

    def _listen(self, worker: _Worker) -> None:
        """Hand over what a worker says, line by line; None is its end."""
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            if line.endswith("\n"):  # cut short by a kill otherwise
                self._said.put((worker, line))
        self._said.put((worker, None))

    def _died(self, worker: _Worker) -> None:
        """Take back what a worker that ended was at; one that had nothing left has ended well."""
        code = worker.process.wait()
        self._workers.remove(worker)
        worker.stderr.seek(0)
        lines = [line.strip() for line in worker.stderr.read()[-STDERR_TAIL_CHARACTERS:].splitlines() if line.strip()]
        worker.stderr.close()
        last = lines[-1] if lines else "it said nothing"
        text = last.removeprefix(SAID)
        if text != last:
            for kind in (UsageError, EnvironmentProblem):
                if code == kind.exit_code:
                    raise kind(text)
        if not worker.ready:
            raise EnvironmentProblem(
                f"A process of --jobs on {worker.device} could not begin (exit code {code}): {text}"
            )
        if worker.shard is None:
            return
        shard = worker.shard
        shard.prompts = self._lacking(shard)
        shard.deaths += 1
        ended = f"a process on {worker.device} ended with code {code} ({last})"
        if shard.deaths < _MOST_DEATHS:
            self.progress.note(f"{ended}: its prompts are given to another.")
            self._waiting.appendleft(shard)
        else:
            self._give_up(shard, f"{ended}, as did {_MOST_DEATHS - 1} before it with these prompts")
        if self._waiting:
            self._start(worker.device)

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

    _begun: set[tuple[str, int]] = field(default_factory=set)


def _time_is_over(deadline: Deadline) -> TimeLimitReached | None:
    try:
        deadline.check()
    except TimeLimitReached as error:
        return error
    return None
