"""The accuracy pass: one prefill per prompt, every method on it, a row as soon as it exists."""

import queue
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError, shown
from kvscope.harness.engine.host_threads import few_host_threads
from kvscope.harness.passes.answering import load, measured_noise, release_memory
from kvscope.harness.passes.base import Left, failed_lines, is_open
from kvscope.harness.passes.batch_plan import batch_text, jobs_text, ray_text
from kvscope.harness.passes.builders import PromptBuilders, builder_processes
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.contract import build_sample
from kvscope.harness.passes.deadline import Deadline
from kvscope.harness.passes.facts import PromptFacts
from kvscope.harness.passes.pools import Pool, ProcessPool, Said
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.run_plan import Plan, RunPlan
from kvscope.harness.passes.shard_list import worker_task
from kvscope.harness.passes.shards import ShardedAccuracy
from kvscope.harness.passes.turns import Turns, pending_samples, prompt_work_tokens
from kvscope.harness.passes.workers import worker_devices
from kvscope.plugins import asking

if TYPE_CHECKING:
    from kvscope.results.frames import Run
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Task

_TRIED_NEAR_LEAST = 32


def rehearsal_text(plan: Plan) -> list[str]:
    """Return the plan's line of methods that decode twice; none where there are none."""
    labels = [method.label for method in plan.methods if method.rehearsal() is not None]
    return [f"           {', '.join(labels)}: each prompt is decoded twice, first densely"] if labels else []


class AccuracyPass:
    """Answers prompts and scores them."""

    def lengths_tokens(self, config: RunConfig) -> tuple[int, ...]:
        """Return the prompts' lengths; none where nothing is scored."""
        return () if config.unscored else config.lengths_tokens

    def check(self, config: RunConfig, facts: PromptFacts, tasks: "Sequence[Task]") -> None:
        """Refuse a length at which a task cannot be built: nothing of this ends a run after its first row.

        The first prompt of every length is built, and more of them near to the least length: there a sample
        with longer words than others may not fit. Prompts that have the length they have are all built there.

        Raises:
            UsageError: naming the length, the task and the least it takes, or what is in the way.
        """
        for task in tasks:
            with asking("task", task.name, type(task), "its min_length_tokens"):
                least_tokens = task.least_length_tokens(facts.tokenizer, samples=config.samples)
            if not isinstance(least_tokens, int):
                raise UsageError(
                    f"Task {task.name!r} cannot be used: its min_length_tokens is {shown(least_tokens)}, no number."
                )
            for length_tokens in config.lengths_tokens:
                if length_tokens < least_tokens:
                    raise UsageError(
                        f"Length {length_tokens:,} is too short for task {task.name!r}: it needs at least "
                        f"{least_tokens:,} tokens."
                    )
            for length_tokens in config.lengths_tokens:
                near_least = config.samples if task.own_lengths else _TRIED_NEAR_LEAST
                tried = near_least if length_tokens < 2 * least_tokens else 1
                for index in range(min(config.samples, tried)):
                    build_sample(task, facts.tokenizer, length_tokens=length_tokens, sample=index, seed=config.seed)

    def cells(self, plan: RunPlan) -> "list[tuple[Task, str, int]]":
        """Return every (task, what rows call it, length in tokens), shortest length first."""
        tasks = list(zip(plan.tasks, plan.task_names, strict=True))
        return [(task, name, length_tokens) for length_tokens in plan.config.lengths_tokens for task, name in tasks]

    def prefill_tokens(self, plan: RunPlan) -> int:
        """Return the tokens to prefill: one prefill a prompt, whatever the number of methods."""
        return sum(length_tokens for _, _, length_tokens in self.cells(plan)) * plan.config.samples

    def text(self, plan: Plan) -> list[str]:
        """Return its line of the plan."""
        if not plan.tasks:
            return []
        prompts = len(self.cells(plan)) * plan.config.samples
        return [
            f"accuracy   {prompts:,} prompts, each prefilled once for {len(plan.methods)} methods: "
            f"{self.prefill_tokens(plan):,} tokens to prefill, {prompts * len(plan.methods):,} rows",
            *rehearsal_text(plan),
            *batch_text(plan.batch, device="a device" if plan.facts.device_map else plan.facts.device),
            *executor_text(plan),
        ]

    def info(self, plan: RunPlan) -> dict[str, Any]:
        """Return tasks, lengths and samples; nothing where nothing is scored."""
        if not plan.tasks:
            return {}
        return {
            "tasks": plan.task_names,
            "lengths_tokens": plan.config.lengths_tokens,
            "samples": plan.config.samples,
        }

    def reopen(self, plan: RunPlan, store: "RunStore") -> int:
        """Reopen the rows of prompts that were not answered."""
        n_reopened = 0
        for _, name, length_tokens in self.cells(plan):
            for index in range(plan.config.samples):
                for method in plan.methods:
                    key = (name, length_tokens, index, method.label)
                    if is_open(store.sample_rows.get(key), unsupported=plan.unsupported(method.label, length_tokens)):
                        store.sample_rows.reopen(key)
                        n_reopened += 1
        return n_reopened

    def left(self, plan: RunPlan, store: "RunStore") -> Left:
        """Count the prompts that lack a row of a method."""
        left = Left()
        for _, name, length_tokens in self.cells(plan):
            pending = pending_samples(plan, store, name, length_tokens)
            work_tokens = sum(prompt_work_tokens(length_tokens, methods=len(methods)) for _, methods in pending)
            left += Left(cells=bool(pending), prompts=len(pending), work_tokens=work_tokens)
        return left

    def run(self, plan: Plan, store: "RunStore", progress: Progress, deadline: Deadline) -> None:
        """Answer every prompt that lacks a row, shortest length first, until the deadline."""
        self._answer(plan, store, progress, deadline)
        if plan.config.footprint or plan.facts.device != "cpu":
            release_memory()  # the model is gone: the processes of the next pass find the device free

    def _answer(self, plan: Plan, store: "RunStore", progress: Progress, deadline: Deadline) -> None:
        devices = worker_devices(plan.config, plan.facts.device)
        if len(devices) > 1 or plan.config.executor == "ray":
            if self.left(plan, store).prompts:
                said: Said = queue.Queue()
                pool = _pool(plan, store, said, devices, note=progress.note)
                ShardedAccuracy(plan, store, progress, self.cells(plan), pool, said).run(deadline)
            return
        if not self.left(plan, store).prompts:
            return
        processes = builder_processes(1, device=plan.facts.device)
        with few_host_threads(plan.facts.device), PromptBuilders(plan, processes=processes) as builders:
            turns = Turns(plan, store, progress, self.cells(plan), builders)
            from kvscope.harness.passes.batch import Batch

            loaded = load(plan)  # only when something is to do
            store.begin()  # not before: weights that do not load leave no run behind
            Batch(plan, loaded, store, turns, noise=measured_noise(plan, loaded, progress)).run(deadline)

    def failures(self, run: "Run") -> list[str]:
        """Return one line per method and status of rows that failed."""
        return failed_lines("accuracy", run.samples)


def executor_text(plan: Plan) -> list[str]:
    """Return the plan's line of who answers; none where that is one process."""
    if plan.config.executor == "ray":
        return [ray_text(plan.config.jobs, devices=plan.facts.devices)]
    return jobs_text(worker_devices(plan.config, plan.facts.device))


def _pool(plan: Plan, store: "RunStore", said: Said, devices: Sequence[str], *, note: Callable[[str], None]) -> Pool:
    task = worker_task(plan, store)
    if plan.config.executor == "processes":
        return ProcessPool(devices, task, said, note=note)
    from kvscope.harness.passes.ray_pool import RayPool
    from kvscope.harness.passes.recording import identity

    return RayPool(plan.config, plan.facts.devices, {**task, "identity": identity(plan)}, said)
