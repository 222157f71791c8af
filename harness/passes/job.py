"""What a worker process is asked to measure: one type of job for each kind of row."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from kvscope.harness.passes.row_columns import FailureStatus, one_line
from kvscope.results.memory_rows import FootprintRow
from kvscope.results.schema import DecodeGraph, OomOf, ThroughputRow
from kvscope.specs import MethodSpec

WARM_UP_TOKENS = 256

RowT = TypeVar("RowT", bound=FootprintRow | ThroughputRow)


class Job(BaseModel, Generic[RowT]):
    """What one worker measures.

    Attributes:
        cell: the columns every row of this cell shares (``row_columns.cell_columns`` and what the pass adds), so that a
            failure in any phase still becomes a whole row.
        import_folders: where to look for the modules of a method from outside the tree, behind the usual places.
        kv: ``prefill`` runs the model over ``context_ids``; ``synthetic`` fills ``context_tokens`` with random values.
        context_ids: tokens to prefill. Every method of a length gets the same ones.
        context_tokens: tokens of a synthetic prompt.
        forced_ids: tokens fed under the method before it decodes on its own: at least one.
        decode_tokens: decode steps; nothing stops them early.
        devices: that the model is on, that of its embeddings first.
        modules: where each of its modules goes; None where that is one device.
        decode_graph: whether steps are replays of a CUDA graph. The warm-up captures one too, whose memory is then part
            of the baseline.
        gpu_budget_bytes: most device bytes the process may take; None for the whole card.
        sweep_pid: how NVML lists the sweep that waits for the row, which is no other process that disturbs the times.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    #: Import string of the class that measures such a job, for :func:`kvscope.harness.passes.measurement.measure`.
    measured_by: ClassVar[str]

    cell: dict[str, Any]
    model: str
    method: MethodSpec
    import_folders: tuple[str, ...] = ()
    kv: Literal["prefill", "synthetic"] = "prefill"
    context_ids: tuple[int, ...] = ()
    context_tokens: int = 0
    forced_ids: tuple[int, ...]
    decode_tokens: int
    seed: int
    devices: tuple[str, ...] = Field(min_length=1)
    modules: dict[str, str] | None = None
    dtype: str
    prefill_chunk_tokens: int
    page_tokens: int
    paper_settings: bool
    decode_graph: DecodeGraph = "auto"
    gpu_budget_bytes: int | None = None
    sweep_pid: int | None = None

    @property
    def length_tokens(self) -> int:
        """The cell's length: prompt plus decode steps."""
        return int(self.cell["length_tokens"])

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt that is prefilled, or filled with random values."""
        return len(self.context_ids) or self.context_tokens

    def warm_up_ids(self, n_tokens: int) -> tuple[int, ...]:
        """Return the warm-up's prompt, no longer than the job's own; a synthetic one has no tokens of its own."""
        return self.context_ids[:n_tokens] or self.forced_ids[:1] * min(n_tokens, self.context_tokens)

    @abstractmethod
    def row(self, columns: Mapping[str, Any]) -> RowT:
        """Return a row of this job's kind with exactly these columns."""

    def failed(
        self,
        *,
        status: FailureStatus,
        reason: str,
        phase: str | None,
        backend: str = "none",
        failure_device_bytes: int | None = None,
        oom_of: OomOf | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> RowT:
        """Return the row of a job that gave no measurement.

        Args:
            phase: where it ended: warm-up counts as load, timing as decode; None when it never began.
            columns: what had been read before it ended.
        """
        ended = {
            "status": status,
            "reason": one_line(reason),
            "backend": backend,
            "failure_phase": None if phase is None else {"warm-up": "load", "timing": "decode"}.get(phase, phase),
            "failure_device_bytes": failure_device_bytes,
            "oom_of": oom_of,
            "gpu_budget_bytes": self.gpu_budget_bytes,
        }
        return self.row({**self.cell, **ended, **self._columns_of_a_failure(columns or {})})

    def _columns_of_a_failure(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what a failed row keeps of the columns read before: nothing, where rows have no such columns."""
        del columns
        return {}


class FootprintJob(Job[FootprintRow]):
    """Bytes and times of a sequence.

    Attributes:
        sequences: how many alike decode together, where one alone is below what the driver tells.
    """

    measured_by = "kvscope.harness.passes.footprint_measurement:FootprintMeasurement"

    kind: Literal["footprint"] = "footprint"
    sequences: int = 1

    def row(self, columns: Mapping[str, Any]) -> FootprintRow:
        """Return a footprint row."""
        return FootprintRow(**columns)

    def _columns_of_a_failure(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**columns, "verdict": "not_measured"}


class ThroughputJob(Job[ThroughputRow]):
    """The largest batch that fits, and its tokens a second.

    Attributes:
        max_batch: where the search for the largest batch stops.
    """

    measured_by = "kvscope.harness.passes.throughput:ThroughputMeasurement"

    kind: Literal["throughput"] = "throughput"
    max_batch: int

    def row(self, columns: Mapping[str, Any]) -> ThroughputRow:
        """Return a throughput row."""
        return ThroughputRow(**columns)


_ANY_JOB: TypeAdapter[FootprintJob | ThroughputJob] = TypeAdapter(
    Annotated[FootprintJob | ThroughputJob, Field(discriminator="kind")]
)


def read_job(text: str) -> Job[Any]:
    """Return the job that a line of JSON asks for."""
    return _ANY_JOB.validate_json(text)
