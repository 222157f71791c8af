"""What rows call the tasks of a run, and what its folder keeps of them."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvscope.specs import BARE_OPTIONS, Spec

if TYPE_CHECKING:
    from kvscope.tasks.base import Task


def recorded_task(spec: Spec, task: "Task") -> str:
    """Return a task as a run folder keeps it: as asked for, and the hash of the data its prompts come from."""
    if task.data_sha256 is None:
        return spec.label
    return spec.with_option("sha256", task.data_sha256).label


def row_names(specs: Sequence[Spec], tasks: "Sequence[Task]") -> tuple[str, ...]:
    """Return what rows call each task: its name, and its options where another task of the run has that name.

    A task of a file is called after the file, or by its option ``label``.
    """
    counts = Counter(task.name for task in tasks)
    return tuple(
        spec.label if counts[task.name] > 1 and spec.options and spec.name not in BARE_OPTIONS else task.name
        for spec, task in zip(specs, tasks, strict=True)
    )
