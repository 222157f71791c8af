"""The throughput pass: the largest batch of every method at every length, a fresh process each, with synthetic KV."""

from typing import TYPE_CHECKING, Any

from kvscope.harness.passes.base import failed_lines
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.job import ThroughputJob
from kvscope.harness.passes.plan_text import lengths_text
from kvscope.harness.passes.process_pass import ProcessPass, job_fields
from kvscope.harness.passes.prompt import random_ids
from kvscope.harness.passes.run_plan import Plan
from kvscope.results.row_table import RowTable
from kvscope.results.schema import ThroughputRow

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod
    from kvscope.results.frames import Run
    from kvscope.results.store import RunStore


class ThroughputPass(ProcessPass[ThroughputRow]):
    """Finds how many sequences of a method fit, and how many tokens a second they decode."""

    name = "throughput"

    def lengths_tokens(self, config: RunConfig) -> tuple[int, ...]:
        """Return the run's lengths."""
        return config.lengths_tokens

    def text(self, plan: Plan) -> list[str]:
        """Return its line of the plan."""
        lengths = lengths_text(self.lengths_tokens(plan.config))
        return [
            f"throughput {len(self.cells(plan))} cells, each a fresh process, at {lengths}: the largest batch up to "
            f"{plan.config.max_batch}, synthetic KV"
        ]

    def info(self, plan: Plan) -> dict[str, Any]:
        """Return its lengths."""
        return {"lengths_tokens": self.lengths_tokens(plan.config)}

    def job(self, plan: Plan, method: "CacheMethod[Any]", length_tokens: int) -> ThroughputJob:
        """Return the job of one cell."""
        config = plan.config
        fields = job_fields(
            plan,
            method,
            length_tokens,
            context_ids=(),
            context_tokens=length_tokens - config.footprint_decode_tokens - 1,
            forced_ids=random_ids(plan.facts.vocab_size, 1, seed=config.seed),
            columns={"mirror": "shared" if method.saving_kind == "offloaded" else "none"},
        )
        return ThroughputJob(**fields, max_batch=config.max_batch)

    def rows(self, store: "RunStore") -> RowTable[ThroughputRow]:
        """Return a folder's throughput rows."""
        return store.throughput_rows

    def summary(self, row: ThroughputRow) -> str:
        """Return a row in a few words."""
        if row.status != "ok" or row.tokens_per_s is None:
            return f"{row.status}: {row.reason}"
        return f"batch {row.largest_batch} ({row.batch_bound}), {row.tokens_per_s:.0f} tokens/s"

    def failures(self, run: "Run") -> list[str]:
        """Return the rows that failed."""
        return failed_lines("throughput", run.throughput)
