"""What the passes with a fresh process per (method, length) have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic

from kvscope.errors import UsageError
from kvscope.harness.passes.base import Left, is_open
from kvscope.harness.passes.chunks import memory_chunk_tokens
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.deadline import Deadline
from kvscope.harness.passes.facts import ModelFacts
from kvscope.harness.passes.job import Job, RowT
from kvscope.harness.passes.process import PHASES, run_worker
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.prompt import Ids
from kvscope.harness.passes.row_columns import cell_columns
from kvscope.harness.passes.run_plan import Plan
from kvscope.harness.passes.sweep_process import sweep_process_id
from kvscope.methods.registry import is_own
from kvscope.plugins import search_path
from kvscope.results.row_table import RowTable
from kvscope.results.schema import SelfCheckState
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Task

PROCESS_WORK_TOKENS = 8192


class ProcessPass(ABC, Generic[RowT]):
    """A pass that measures each (method, length) in a process of its own."""

    name: str

    @abstractmethod
    def lengths_tokens(self, config: RunConfig) -> tuple[int, ...]:
        """Return the lengths that it measures."""

    @abstractmethod
    def job(self, plan: Plan, method: "CacheMethod[Any]", length_tokens: int) -> Job[RowT]:
        """Return what the worker of one cell is asked for."""

    @abstractmethod
    def rows(self, store: "RunStore") -> RowTable[RowT]:
        """Return the rows of its kind that a folder holds."""

    @abstractmethod
    def summary(self, row: RowT) -> str:
        """Return a row in a few words."""

    def check(self, config: RunConfig, facts: ModelFacts, tasks: "Sequence[Task]") -> None:
        """Refuse a length that leaves no room for the decode steps.

        Raises:
            UsageError: naming the length and the least it takes.
        """
        del facts, tasks
        least_tokens = config.footprint_decode_tokens + 2
        for length_tokens in self.lengths_tokens(config):
            if length_tokens < least_tokens:
                raise UsageError(
                    f"Length {length_tokens:,} is too short for {config.footprint_decode_tokens} decode steps: it "
                    f"needs at least {least_tokens:,} tokens."
                )

    def cells(self, plan: Plan) -> "list[tuple[CacheMethod[Any], int]]":
        """Return every (method, length in tokens), shortest length first."""
        return [(method, length) for length in self.lengths_tokens(plan.config) for method in plan.methods]

    def reopen(self, plan: Plan, store: "RunStore") -> int:
        """Reopen the rows of cells that were not measured."""
        rows, n_reopened = self.rows(store), 0
        for method, length_tokens in self.cells(plan):
            key = (method.label, length_tokens)
            if is_open(rows.get(key), unsupported=plan.unsupported(*key)):
                rows.reopen(key)
                n_reopened += 1
        return n_reopened

    def left(self, plan: Plan, store: "RunStore") -> Left:
        """Count the cells that have no row."""
        rows = self.rows(store)
        lengths = [length for method, length in self.cells(plan) if not rows.has((method.label, length))]
        return Left(cells=len(lengths), processes=len(lengths), work_tokens=sum(map(process_work_tokens, lengths)))

    def run(self, plan: Plan, store: "RunStore", progress: Progress, deadline: Deadline) -> None:
        """Measure every cell that has no row yet, until the deadline."""
        rows = self.rows(store)
        for method, length_tokens in self.cells(plan):
            if not rows.has((method.label, length_tokens)):
                deadline.check()
                store.begin()
                rows.append(self.measure(plan, store, method, length_tokens, progress))

    def measure(
        self, plan: Plan, store: "RunStore", method: "CacheMethod[Any]", length_tokens: int, progress: Progress
    ) -> RowT:
        """Measure one cell, and tell the progress."""
        progress.begin_cell(f"{self.name} {method.label} {format_length(length_tokens)}", steps=1)
        job = self.job(plan, method, length_tokens)
        job = job.model_copy(update={"cell": {**job.cell, "self_check": self_check_state(plan, store)}})
        row = run_job(plan, job, plan.unsupported(method.label, length_tokens), progress)
        progress.end_cell(self.summary(row))
        return row


def self_check_state(plan: Plan, store: "RunStore") -> SelfCheckState:
    """Return what a fresh process can say of the model's self-check, which would spoil its own readings of memory."""
    if not plan.config.self_check:
        return "skipped"
    return "passed" if any(row.self_check == "passed" for row in store.samples()) else "not_run"


def run_job(plan: Plan, job: Job[RowT], unsupported: str | None, progress: Progress) -> RowT:
    """Run a job in a fresh process, or say why it cannot run."""
    progress.begin_step("fresh process", parts=len(PHASES))
    if unsupported is not None:
        row = job.failed(status="unsupported", reason=unsupported, phase=None)
    else:
        job = job.model_copy(update={"sweep_pid": sweep_process_id(plan.facts.device)})
        row = run_worker(job, timeout_s=plan.config.footprint_timeout_s, on_phase=progress.part)
    progress.end_step(work_tokens=process_work_tokens(job.length_tokens))
    return row


def process_work_tokens(length_tokens: int) -> int:
    """Return what a cell costs in units of one prefilled token: a process, a model load, a prefill, three decodes."""
    return length_tokens + PROCESS_WORK_TOKENS


def job_fields(
    plan: Plan,
    method: "CacheMethod[Any]",
    length_tokens: int,
    *,
    context_ids: Ids,
    context_tokens: int,
    forced_ids: Ids,
    columns: dict[str, Any],
) -> dict[str, Any]:
    """Return the fields that jobs of every kind have.

    Args:
        context_ids: tokens to prefill; empty for a synthetic prompt.
        context_tokens: how many tokens are prefilled, or filled with random values.
        forced_ids: tokens fed under the method.
        columns: columns of the row that are known before anything is measured.
    """
    config, facts, spec = plan.config, plan.facts, plan.specs[method.label]
    cell = cell_columns(
        method,
        shape=facts.shape,
        model=facts.name,
        method_from=config.method_from,
        length_tokens=length_tokens,
        context_tokens=context_tokens,
        dtype=facts.dtype,
        device=facts.where,
        self_check="not_run",
        chat_template=facts.chat_template,
        prefill="synthetic" if config.synthetic_kv else "dense",
    )
    return {
        "cell": {**cell, "prompt_tokens": context_tokens, **columns},
        "model": config.model,
        "method": spec,
        "import_folders": () if is_own(spec) else search_path(),
        "kv": "synthetic" if config.synthetic_kv else "prefill",
        "context_ids": context_ids,
        "context_tokens": context_tokens,
        "forced_ids": forced_ids,
        "decode_tokens": config.footprint_decode_tokens,
        "seed": config.seed,
        "devices": facts.devices,
        "modules": None if facts.device_map is None else dict(facts.device_map.modules),
        "dtype": facts.dtype,
        "prefill_chunk_tokens": memory_chunk_tokens(config),
        "page_tokens": config.page_tokens,
        "paper_settings": config.paper_settings,
        "decode_graph": config.decode_graph,
        "gpu_budget_bytes": config.gpu_budget_bytes,
    }
