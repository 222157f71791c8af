"""``kvscope run``: check, open the folder, measure every pass. The same configuration again continues."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvscope
from kvscope.errors import UsageError
from kvscope.harness.passes.base import Left, Plan
from kvscope.harness.passes.config import RunConfig, make_config
from kvscope.harness.passes.deadline import Deadline
from kvscope.harness.passes.environment import capture_environment
from kvscope.harness.passes.plan import make_plan, passes_for
from kvscope.harness.passes.progress import Progress, make_progress
from kvscope.paths import check_out, user_path
from kvscope.results.schema import MethodInfo, RunInfo
from kvscope.results.store import RunStore
from kvscope.specs import Spec
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.results.frames import Run
    from kvscope.tasks.base import Task


def run(
    config: RunConfig | Mapping[str, Any], *, out: str | Path | None = None, progress: bool | Progress = True
) -> "Run":
    """Measure what ``config`` asks for and return the rows as data frames.

    Every row is on disk as soon as it exists; the same call again skips what is there and measures the rest.

    Args:
        config: a RunConfig, or a mapping of its keys.
        out: folder of the run; wins over ``config.out``.
        progress: True for bars on a terminal and lines elsewhere, False for silence, or a Progress of your own.

    Raises:
        UsageError: bad configuration, or a folder that holds another one or cannot be written.
        EnvironmentProblem: a row could not be written.
    """
    config = config if isinstance(config, RunConfig) else make_config(config)
    folder = out or config.out
    if folder is None:
        raise UsageError("Say where the results go: --out DIR, or `out` in the configuration.")
    folder = user_path(folder, what="out")
    check_out(folder)
    with as_progress(progress) as shown:
        plan = make_plan(config)
        with RunStore.create(folder, run_info(plan)) as store:
            measure(plan, store, shown)
    from kvscope.results.frames import load_run

    return load_run(folder)


def measure(plan: Plan, store: RunStore, progress: Progress) -> None:
    """Run every pass into an open store."""
    for message in store.messages:
        progress.note(message)
    for warning in plan.warnings:
        progress.note(f"note: {warning}")
    for cell in plan.cells:
        if cell.forecast == "oom":
            where = f"{cell.method_label} at {format_length(cell.length_tokens)}"
            progress.note(f"note: {where} is not expected to fit: {cell.reason}.")
    deadline = Deadline(plan.config.time_limit_s)
    begin(plan, store, progress)
    for each in plan.passes:
        each.run(plan, store, progress, deadline)


def as_progress(progress: bool | Progress) -> Progress:
    """Return the progress asked for."""
    return progress if isinstance(progress, Progress) else make_progress(progress)


def begin(plan: Plan, store: RunStore, progress: Progress) -> None:
    """Count what is left to do and tell the progress, and the user when it is a continuation."""
    left = sum((each.left(plan, store) for each in plan.passes), Left())
    done = len(store.samples()) + len(store.footprints()) + len(store.throughputs())
    if done and (left.prompts or left.processes):
        progress.note(
            f"{done} rows are there already: continuing with {left.prompts} prompts and {left.processes} footprint "
            "cells."
        )
    elif done and not left.cells:
        progress.note(f"All {done} rows are there already: nothing left to measure.")
    progress.begin(cells=left.cells, work_tokens=left.work_tokens)


def run_info(plan: Plan) -> RunInfo:
    """Return what ``run.json`` says: the configuration, the plan, and where it runs."""
    config, facts = plan.config, plan.facts
    environment = capture_environment(device=facts.device, attention_backend=planned_backend(plan))
    measured: dict[str, Any] = {"tasks": (), "lengths_tokens": (), "samples": 0}
    for each in plan.passes:
        measured |= each.info(plan)
    # Resolved, so that `auto` on another machine does not continue this machine's rows.
    identity = {
        **config.identity(),
        "methods": [method.label for method in plan.methods],
        "tasks": [recorded_task(spec, task) for spec, task in zip(config.tasks, plan.tasks, strict=True)],
        "device": facts.device,
        "dtype": facts.dtype,
        "model_revision": facts.revision,
    }
    return RunInfo(
        kvscope_version=kvscope.__version__,
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=environment["commit"],
        dirty=environment["dirty"],
        model=facts.name,
        model_revision=facts.revision,
        methods=tuple(MethodInfo(**method.describe()) for method in plan.methods),
        seed=config.seed,
        config=config.model_dump(mode="json", exclude={"out"}),
        identity=identity,
        environment=environment,
        plan=plan.cells,
        excluded_types=plan.excluded_types,
        **measured,
    )


def recorded_task(spec: Spec, task: "Task") -> str:
    """Return a task as a run folder keeps it: as asked for, and the hash of the data its prompts come from."""
    if task.data_sha256 is None:
        return spec.label
    return spec.with_option("sha256", task.data_sha256).label


def planned_backend(plan: Plan) -> str | None:
    """Name what will compute attention; None where only the loaded model can tell."""
    import torch

    from kvscope.harness.engine.devices import resolve_dtype

    facts, device = plan.facts, torch.device(plan.facts.device)
    return facts.backend.attention_text(facts.shape, device, resolve_dtype(facts.dtype, device))


def failures(run: "Run") -> list[str]:
    """Return one line per kind of failed cell: what failed, how often, and the first reason. Empty when all is well.

    ``unsupported`` is no failure: the plan said so. A footprint whose verdict is ``mismatch`` is one.
    """
    modes = {key: run.info.config.get(key) is True for key in ("find_max", "throughput")}
    return [line for each in passes_for(**modes) for line in each.failures(run)]
