"""What a worker process is asked to measure, and the row of a job that gave no measurement."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from kvscope.harness.passes.rows import FailureStatus, one_line
from kvscope.results.schema import FootprintRow, OomOf, ThroughputRow
from kvscope.specs import MethodSpec

WARM_UP_TOKENS = 256


class FootprintJob(BaseModel):
    """What one worker measures.

    Attributes:
        cell: the columns every row of this cell shares (``rows.cell_columns`` and the predictions), so that a failure
            in any phase still becomes a whole row.
        kind: ``footprint`` (one sequence: bytes and times) or ``throughput`` (the largest batch that fits).
        import_folders: where to look for the modules of a method from outside the tree, behind the usual places.
        kv: ``prefill`` runs the model over ``context_ids``; ``synthetic`` fills ``context_tokens`` with random values.
        context_ids: tokens to prefill. Every method of a length gets the same ones.
        context_tokens: tokens of a synthetic prompt.
        forced_ids: tokens fed under the method before it decodes on its own: at least one.
        decode_tokens: decode steps; nothing stops them early.
        decode_graph: whether steps are replays of a CUDA graph. The warm-up captures one too, whose memory is then part
            of the baseline.
        gpu_budget_bytes: most device bytes the process may take; None for the whole card.
        max_batch: where the search for the largest batch stops.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cell: dict[str, Any]
    kind: Literal["footprint", "throughput"] = "footprint"
    model: str
    method: MethodSpec
    import_folders: tuple[str, ...] = ()
    kv: Literal["prefill", "synthetic"] = "prefill"
    context_ids: tuple[int, ...] = ()
    context_tokens: int = 0
    forced_ids: tuple[int, ...]
    decode_tokens: int
    seed: int
    device: str
    dtype: str
    prefill_chunk_tokens: int
    page_tokens: int
    paper_settings: bool
    decode_graph: Literal["auto", "on", "off"] = "auto"
    gpu_budget_bytes: int | None = None
    max_batch: int = 1

    @property
    def warm_up_ids(self) -> tuple[int, ...]:
        """Tokens of the warm-up's prompt; a synthetic one has no tokens of its own."""
        return self.context_ids[:WARM_UP_TOKENS] or self.forced_ids[:1] * min(WARM_UP_TOKENS, self.context_tokens)


def failed_row(
    job: FootprintJob,
    *,
    status: FailureStatus,
    reason: str,
    phase: str | None,
    backend: str = "none",
    failure_device_bytes: int | None = None,
    oom_of: OomOf | None = None,
    columns: dict[str, Any] | None = None,
) -> FootprintRow | ThroughputRow:
    """Return the row of a job that gave no measurement.

    Args:
        phase: where it ended: warm-up counts as load, timing as decode; None when it never began.
        columns: what a footprint had read before it ended.
    """
    ended: dict[str, Any] = {
        "status": status,
        "reason": one_line(reason),
        "backend": backend,
        "failure_phase": None if phase is None else {"warm-up": "load", "timing": "decode"}.get(phase, phase),
        "failure_device_bytes": failure_device_bytes,
        "oom_of": oom_of,
        "gpu_budget_bytes": job.gpu_budget_bytes,
    }
    if job.kind == "throughput":
        return ThroughputRow(**job.cell, **ended)
    return FootprintRow(**job.cell, **ended, **(columns or {}), verdict="not_measured")
