"""The footprint pass: the bytes and times of every method at every length, a fresh process each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.harness.passes.base import failed_lines
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.facts import ModelFacts
from kvscope.harness.passes.job import FootprintJob
from kvscope.harness.passes.plan_text import lengths_text
from kvscope.harness.passes.process_pass import ProcessPass, job_fields
from kvscope.harness.passes.prompt import Ids, random_ids, split_ids
from kvscope.harness.passes.run_plan import Plan
from kvscope.results.memory_rows import FootprintRow
from kvscope.results.row_table import RowTable
from kvscope.specs import parse_spec
from kvscope.units import format_bytes

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod
    from kvscope.results.frames import Run
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Task


class FootprintPass(ProcessPass[FootprintRow]):
    """Measures one sequence of a method: its bytes by NVML, torch and the ledger, and its times."""

    name = "footprint"

    def __init__(self) -> None:
        self._last: tuple[Plan, int, tuple[Ids, Ids]] | None = None
        """The prompt of the last cell: methods of a length come one after another, and all get the same one."""

    def lengths_tokens(self, config: RunConfig) -> tuple[int, ...]:
        """Return the lengths of the footprint pass; none where it is off."""
        return config.footprint_cells_tokens

    def check(self, config: RunConfig, facts: ModelFacts, tasks: "Sequence[Task]") -> None:
        """Refuse a length that leaves no room for a prompt and the decode steps.

        Raises:
            UsageError: naming the length and the least it takes.
        """
        if config.footprint_batch > 1 and facts.backend.holds_one_sequence and self.lengths_tokens(config):
            raise UsageError(
                f"footprint_batch: model {config.model!r} brings its own cache, which holds one sequence: leave out "
                "--footprint-batch."
            )
        if not tasks or config.synthetic_kv:
            super().check(config, facts, tasks)
            return
        # The prompt is the first task's, with decode steps of room instead of the task's own answer.
        needed_tokens = tasks[0].least_length_tokens(facts.tokenizer, samples=1) - tasks[0].max_new_tokens
        least_tokens = needed_tokens + config.footprint_decode_tokens
        for length_tokens in self.lengths_tokens(config):
            if length_tokens < least_tokens:
                raise UsageError(
                    f"Footprint length {length_tokens:,} is too short for a prompt of {tasks[0].name!r} and "
                    f"{config.footprint_decode_tokens} decode steps: it needs at least {least_tokens:,} tokens."
                )

    def prefill_tokens(self, plan: Plan) -> int:
        """Return the tokens to prefill: one prefill a supported (method, length), none with synthetic KV."""
        if plan.config.synthetic_kv:
            return 0
        return sum(length for method, length in self.cells(plan) if plan.unsupported(method.label, length) is None)

    def text(self, plan: Plan) -> list[str]:
        """Return its line of the plan."""
        cells = self.cells(plan)
        if not cells:
            return []
        work = "synthetic KV" if plan.config.synthetic_kv else f"{self.prefill_tokens(plan):,} tokens to prefill"
        return [
            f"footprint  {len(cells)} cells, each a fresh process, at "
            f"{lengths_text(self.lengths_tokens(plan.config))}: {work}{_together(plan.config.footprint_batch)}"
        ]

    def info(self, plan: Plan) -> dict[str, Any]:
        """Return its lengths."""
        return {"footprint_lengths_tokens": self.lengths_tokens(plan.config)}

    def job(self, plan: Plan, method: "CacheMethod[Any]", length_tokens: int) -> FootprintJob:
        """Return the job of one cell; its predictions are made here, before anything is measured."""
        config, facts = plan.config, plan.facts
        if config.synthetic_kv:
            context_ids: Ids = ()
            context_tokens = length_tokens - config.footprint_decode_tokens - 1
            forced_ids = random_ids(facts.vocab_size, 1, seed=config.seed)
        else:
            context_ids, forced_ids = self._prompt(plan, length_tokens)
            context_tokens = len(context_ids)
        columns = {}
        if not method.unsupported(facts.shape, facts.device):
            steps = len(forced_ids) + config.footprint_decode_tokens - 1
            predicted = method.predict(facts.shape, context_tokens, steps)
            columns = {
                "predicted_kv_bytes": predicted.kv_bytes,
                "predicted_metadata_bytes": predicted.metadata_bytes,
                "predicted_host_bytes": predicted.host_bytes,
            }
        return FootprintJob(
            sequences=config.footprint_batch,
            **job_fields(
                plan,
                method,
                length_tokens,
                context_ids=context_ids,
                context_tokens=context_tokens,
                forced_ids=forced_ids,
                columns=columns,
            ),
        )

    def _prompt(self, plan: Plan, length_tokens: int) -> tuple[Ids, Ids]:
        if self._last is None or self._last[0] is not plan or self._last[1] != length_tokens:
            self._last = plan, length_tokens, footprint_prompt(plan, length_tokens)
        return self._last[2]

    def rows(self, store: "RunStore") -> RowTable[FootprintRow]:
        """Return a folder's footprint rows."""
        return store.footprint_rows

    def summary(self, row: FootprintRow) -> str:
        """Return a row in a few words."""
        if row.status != "ok":
            return f"{row.status}: {row.reason}"
        kept_bytes = (row.resident_kv_bytes or 0) + (row.metadata_bytes or 0)
        share = kept_bytes / row.dense_kv_bytes if row.dense_kv_bytes else 1.0
        text = f"{format_bytes(kept_bytes)} on the device, {share:.1%} of dense"
        return f"{text}, {(row.tpot_s or 0) * 1e3:.2f} ms a token, {row.verdict}"

    def failures(self, run: "Run") -> list[str]:
        """Return the rows that failed, and those that NVML does not confirm."""
        return [*failed_lines("footprint", run.footprint), *mismatch_lines(run)]


def _together(sequences: int) -> str:
    return "" if sequences == 1 else f", {sequences} sequences alike in each"


def footprint_prompt(plan: Plan, length_tokens: int) -> tuple[Ids, Ids]:
    """Return (tokens to prefill, tokens fed under the method): a task's prompt, room for decode left.

    Where there is no task (presets), they are random: all but the last are prefilled.
    """
    config = plan.config
    if not plan.tasks:
        ids = random_ids(plan.facts.vocab_size, length_tokens - config.footprint_decode_tokens, seed=config.seed)
        return ids[:-1], ids[-1:]
    task = plan.tasks[0] if plan.first_task is None else _task_of(plan, plan.first_task)
    prompt_tokens = length_tokens - config.footprint_decode_tokens
    ids, question_start = task.fill(plan.facts.tokenizer, prompt_tokens=prompt_tokens, seed=config.seed)
    return split_ids(ids, question_start, config.method_from)


def _task_of(plan: Plan, given: str) -> "Task":
    """Return the task that the folder's first call gave, which may not be asked for now."""
    from kvscope.tasks.registry import create_task

    spec = parse_spec(given, kind="task")
    for asked, task in zip(plan.config.tasks, plan.tasks, strict=True):
        if asked.label == spec.label:
            return task
    return create_task(spec)


def mismatch_lines(run: "Run") -> list[str]:
    """Return one line for each footprint whose verdict is ``mismatch``: what the driver saw is not what was claimed."""
    from kvscope.results.frames import records

    if run.footprint.empty:
        return []
    return [
        f"footprint: {row['method_label']} at {row['length_tokens']}: mismatch: "
        f"{row['verdict_reason'] or 'NVML does not confirm the saving'}"
        for row in records(run.footprint[run.footprint["verdict"] == "mismatch"])
    ]
