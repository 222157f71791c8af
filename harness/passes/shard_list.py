"""Shards of the accuracy pass: runs of prompts of one (task, length), and what a worker is told of the run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvscope.harness.passes.run_plan import Plan
from kvscope.harness.passes.turns import pending_samples

if TYPE_CHECKING:
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Task

#: Shards of a cell for each worker: the last ones to end leave few others waiting.
_SHARDS_A_WORKER = 4


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
    # Where prompts are answered is said here; a worker is one process.
    config = plan.config.model_dump(mode="json", exclude={"out", "gpus", "device", "executor", "ray_address"})
    return {"config": config, "folder": str(store.folder), "info": store.info.model_dump(mode="json")}
