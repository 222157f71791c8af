"""``kvscope run``: check, open the folder, measure every pass. The same configuration again continues."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.harness.engine.presets import refuse_plan_only
from kvscope.harness.passes.base import Left
from kvscope.harness.passes.config import RunConfig, make_config
from kvscope.harness.passes.deadline import Deadline
from kvscope.harness.passes.plan import make_plan, passes_for
from kvscope.harness.passes.process import start_ahead
from kvscope.harness.passes.progress import Progress, make_progress
from kvscope.harness.passes.prompt_check import check_first_prompts
from kvscope.harness.passes.quiet import disturbances
from kvscope.harness.passes.recording import earlier_identity, run_info
from kvscope.harness.passes.run_plan import Plan, RunPlan
from kvscope.harness.passes.workers import worker_devices
from kvscope.paths import check_out, user_path
from kvscope.results.store import RunStore
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.results.frames import Run


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
    refuse_plan_only(config.model)
    folder = out or config.out
    if folder is None:
        raise UsageError("Say where the results go: --out DIR, or `out` in the configuration.")
    folder = user_path(folder, what="out")
    check_out(folder)
    if config.footprint_cells_tokens and not config.served and not folder.exists():
        start_ahead()
    with as_progress(progress) as shown:
        plan = make_plan(config).ready()
        with RunStore.create(folder, run_info(plan), earlier_identity=earlier_identity(plan)) as store:
            measure(plan.in_folder(store.info), store, shown)
    from kvscope.results.frames import load_run

    return load_run(folder)


def measure(plan: RunPlan, store: RunStore, progress: Progress) -> None:
    """Run every pass into an open store.

    Raises:
        UsageError: a prompt is another than that of the rows that are there.
    """
    for message in store.messages:
        progress.note(message)
    for warning in plan.warnings:
        progress.note(f"note: {warning}")
    for cell in plan.cells:
        if cell.forecast == "oom":
            where = f"{cell.method_label} at {format_length(cell.length_tokens)}"
            progress.note(f"note: {where} is not expected to fit: {cell.reason}.")
    deadline = Deadline(plan.config.time_limit_s)
    check_first_prompts(plan, store)
    begin(plan, store, progress)
    for each in plan.passes:
        each.run(plan, store, progress, deadline)
    store.begin()  # where nothing was left to do


def as_progress(progress: bool | Progress) -> Progress:
    """Return the progress asked for."""
    return progress if isinstance(progress, Progress) else make_progress(progress)


def begin(plan: RunPlan, store: RunStore, progress: Progress) -> None:
    """Count what is left to do and tell the progress, and the user when it is a continuation."""
    reopened = sum(each.reopen(plan, store) for each in plan.passes) if plan.config.retry else 0
    if reopened:
        rows = "1 failed row is" if reopened == 1 else f"{reopened} failed rows are"
        progress.note(f"{rows} measured again; --no-retry keeps {'it' if reopened == 1 else 'them'}.")
    left = sum((each.left(plan, store) for each in plan.passes), Left())
    done = len(store.samples()) + len(store.footprints()) + len(store.throughputs())
    if done and (left.prompts or left.processes):
        progress.note(
            f"{done} {'row is' if done == 1 else 'rows are'} there already: continuing with {left.prompts} "
            f"prompt{'' if left.prompts == 1 else 's'} and {left.processes} footprint "
            f"cell{'' if left.processes == 1 else 's'}."
        )
    elif done and not left.cells:
        progress.note(f"All {done} rows are there already: nothing left to measure.")
    if left.cells and (disturbed := disturbances(_devices(plan))):
        progress.note(f"note: this machine is not quiet ({disturbed}): times measured now are not to be trusted.")
    progress.begin(cells=left.cells, work_tokens=left.work_tokens)


def _devices(plan: RunPlan) -> Sequence[str]:
    """Return every device that the run computes on."""
    if isinstance(plan, Plan) and plan.facts.device_map is not None:
        return plan.facts.devices
    return worker_devices(plan.config, plan.facts.device)


def failures(run: "Run") -> list[str]:
    """Return one line per kind of failed cell: what failed, how often, and the first reason. Empty when all is well.

    ``unsupported`` is no failure: the plan said so. A footprint whose verdict is ``mismatch`` is one.
    """
    modes = {key: run.info.config.get(key) is True for key in ("find_max", "throughput")}
    return [line for each in passes_for(**modes) for line in each.failures(run)]
