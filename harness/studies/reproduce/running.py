"""Measures a reproduction's cells by ``kvscope run``, piece by piece; the same call again continues."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kvscope
from kvscope.errors import UsageError
from kvscope.files import whole_file
from kvscope.harness.passes.config import RunConfig, make_config
from kvscope.harness.passes.environment import capture_environment
from kvscope.harness.passes.facts import ModelFacts
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.sweep import as_progress, failures
from kvscope.harness.passes.sweep import run as run_config
from kvscope.harness.studies.reproduce.budgets import equal_methods
from kvscope.paths import check_out, user_path
from kvscope.results.packed import is_packed
from kvscope.results.reproduction import (
    CellPlan,
    Reproduction,
    pack_cell,
    piece_folder,
    read_reproduction,
)
from kvscope.results.share import prompt_shares
from kvscope.results.store import REPRODUCE_FILE, RUN_FILE, RunStore
from kvscope.units import format_length

LEAST_PIECE_S = 20.0
"""A piece is not begun with less time than this left: its model would hardly load."""


@dataclass
class Outcome:
    """What a call measured.

    Attributes:
        complete: whether every cell is there.
        failed: a line a kind of failed row, with its cell.
    """

    complete: bool = True
    failed: list[str] = field(default_factory=list)


def earlier(folder: Path, plan: Reproduction) -> tuple[Path, Reproduction | None]:
    """Return the folder of a reproduction, and what it was begun with; None where it is new.

    Raises:
        UsageError: it holds something else, or cannot be written.
    """
    folder = user_path(folder, what="--out")
    check_out(folder)
    if (folder / RUN_FILE).exists():
        raise UsageError(f"{folder} holds a run of its own, and its report: give --out another folder.")
    before = read_reproduction(folder)
    if before is not None and not before.same_plan(plan):
        raise UsageError(
            f"{folder} holds another reproduction ({before.profile} {before.size} of {before.model}, {before.lsa}, "
            f"lengths over {before.divisor}): give --out another folder, or ask for the same."
        )
    return folder, before


def reproduce(
    plan: Reproduction,
    pilots: tuple[CellPlan, ...],
    equal: tuple[str, ...],
    *,
    facts: ModelFacts,
    folder: Path,
    overrides: Mapping[str, Any],
    time_limit_s: float | None,
    progress: bool | Progress,
) -> Outcome:
    """Measure what is lacking, cell by cell in the order of the plan, into ``folder``.

    Args:
        pilots: what is measured first, to give the methods ``equal`` lsa's bytes.
        facts: of the plan's model.
        overrides: keys of every cell's configuration that decide no value of a claim: device, dtype, jobs, batch.
        time_limit_s: nothing is begun after it.

    Raises:
        UsageError: the folder holds another reproduction, or cannot be written.
    """
    folder, before = earlier(folder, plan)
    plan = before or plan
    started_s = time.monotonic()
    outcome = Outcome()

    def left_s() -> float | None:
        return None if time_limit_s is None else time_limit_s - (time.monotonic() - started_s)

    with as_progress(progress) as shown:
        folder.mkdir(parents=True, exist_ok=True)
        write_plan(folder, plan)
        for pilot in pilots:
            if any(cell.lsa_share is None for cell in _sized_by(plan, pilot)):
                if not _measure(pilot, plan, folder, overrides, left_s(), shown, outcome):
                    outcome.complete = False
                    return outcome
                plan = _with_budgets(plan, pilot, equal, facts=facts, folder=folder)
                write_plan(folder, plan)
        for cell in plan.cells:
            if cell.left_out is not None or is_packed(folder / cell.name):
                continue
            if not _measure(cell, plan, folder, overrides, left_s(), shown, outcome):
                outcome.complete = False
            elif not any(failed_rows(piece_folder(folder, cell.name, seed)) for seed in cell.seeds):
                # What failed is measured again by the next call, so its pieces stay as they are.
                pack_cell(folder, cell)
    return outcome


def cell_config(
    cell: CellPlan,
    plan: Reproduction,
    *,
    seed: int,
    overrides: Mapping[str, Any],
    methods: tuple[str, ...] | None = None,
) -> RunConfig:
    """Return the configuration of one piece of a cell."""
    values: dict[str, Any] = {"model": plan.model, "methods": methods or tuple(dict.fromkeys(cell.methods.values()))}
    values |= {"lengths_tokens": cell.lengths_tokens, "seed": seed, **overrides}
    if cell.scored:
        values |= {"tasks": cell.tasks, "samples": cell.samples, "footprint": False}
    else:
        values = {key: value for key, value in values.items() if key not in ("jobs", "gpus", "batch")}
    return make_config({**values, **cell.config}, source=f"cell {cell.name}")


def write_plan(folder: Path, plan: Reproduction) -> None:
    """Write ``reproduce.json``, whole or not at all."""
    with whole_file(folder / REPRODUCE_FILE) as temporary:
        temporary.write_text(plan.model_dump_json(indent=1) + "\n", encoding="utf-8")


def started(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields that say what began a reproduction, beside those given."""
    from datetime import UTC, datetime

    return {
        "kvscope_version": kvscope.__version__,
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        **values,
    }


def _measure(
    cell: CellPlan,
    plan: Reproduction,
    folder: Path,
    overrides: Mapping[str, Any],
    left_s: float | None,
    progress: Progress,
    outcome: Outcome,
) -> bool:
    """Measure a cell's pieces; return whether all have every row."""
    started_s = time.monotonic()
    for seed in cell.seeds:
        config = cell_config(cell, plan, seed=seed, overrides=overrides)
        place = piece_folder(folder, cell.name, seed)
        if has_all_rows(place, config) and not failed_rows(place):
            continue
        remaining_s = None if left_s is None else left_s - (time.monotonic() - started_s)
        if remaining_s is not None and remaining_s < LEAST_PIECE_S:
            progress.note(f"stopped before {cell.name}, seed {seed}: the same command continues.")
            return False
        lengths = ", ".join(map(format_length, cell.lengths_tokens))
        progress.note(f"cell {cell.name}, seed {seed}: {lengths} tokens")
        if remaining_s is not None:
            config = make_config({**config.model_dump(exclude_unset=True), "time_limit_s": remaining_s})
        measured = run_config(config, out=place, progress=progress)
        outcome.failed += [f"{cell.name}: {line}" for line in failures(measured)]
        if not has_all_rows(place, config):
            return False
    return True


def has_all_rows(place: Path, config: RunConfig) -> bool:
    """Whether a piece has every row it asks for, measured or not."""
    if not (place / RUN_FILE).exists():
        return False
    store = RunStore.open(place)
    if config.throughput:
        return len(store.throughputs()) == len(config.methods) * len(config.lengths_tokens)
    samples = len(config.tasks) * len(config.lengths_tokens) * config.samples * len(config.methods)
    footprints = len(config.footprint_cells_tokens) * len(config.methods)
    return len(store.samples()) == samples and len(store.footprints()) == footprints


def failed_rows(place: Path) -> int:
    """Return how many rows of a piece are no results though the plan expected some: failed, or out of memory."""
    if not (place / RUN_FILE).exists():
        return 0
    store = RunStore.open(place)
    rows = (*store.samples(), *store.footprints(), *store.throughputs())
    return sum(row.status in ("failed", "oom") for row in rows)


def _sized_by(plan: Reproduction, pilot: CellPlan) -> list[CellPlan]:
    return [
        cell
        for cell in plan.cells
        if cell.role == pilot.role and cell.left_out is None and set(cell.lengths_tokens) <= set(pilot.lengths_tokens)
    ]


def _with_budgets(
    plan: Reproduction, pilot: CellPlan, equal: tuple[str, ...], *, facts: ModelFacts, folder: Path
) -> Reproduction:
    """Return the plan with methods of lsa's bytes in the cells that a pilot sizes."""
    from kvscope.results.frames import load_run

    rows = load_run(piece_folder(folder, pilot.name, pilot.seeds[0])).samples
    rows = rows[rows["status"] == "ok"]
    sized = {cell.name for cell in _sized_by(plan, pilot)}
    cells = []
    for cell in plan.cells:
        if cell.name in sized:
            mine = rows[rows["length_tokens"] == cell.lengths_tokens[0]]
            if not len(mine):
                raise UsageError(
                    f"The pilot of {cell.name} has no answer of {pilot.methods['lsa']}, so that nothing says how many "
                    f"bytes its baselines may hold: see {piece_folder(folder, pilot.name, pilot.seeds[0])}."
                )
            share = float(prompt_shares(mine).mean())
            methods = equal_methods(
                equal, share=share, n_tokens=round(float(mine["prompt_tokens"].mean())),
                window_tokens=plan.window_tokens, facts=facts,
            )  # fmt: skip
            cell = cell.model_copy(update={"lsa_share": share, "methods": {**cell.methods, **methods}})
        cells.append(cell)
    return plan.model_copy(update={"cells": tuple(cells)})


def check_cells(plan: Reproduction, *, overrides: Mapping[str, Any]) -> None:
    """Check every cell's configuration against the model, without measuring anything.

    Raises:
        UsageError: what ``kvscope run`` would refuse.
    """
    for cell in plan.cells:
        if cell.left_out is None and cell.role != "throughput":
            make_plan(cell_config(cell, plan, seed=cell.seeds[0], overrides=overrides))


def environment_line(device: str) -> str:
    """Return the machine in a line."""
    found = capture_environment(device=device)
    return str(found.get("gpu") or f"{found['cpu']}, {found['cpu_cores']} cores")
