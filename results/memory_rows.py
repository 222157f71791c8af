"""The rows of memory: one (method, length) in a process of its own, and the longest context of a method."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvscope.results import limits
from kvscope.results.schema import (
    Bound,
    CellRow,
    Count,
    FailurePhase,
    Length,
    Lengths,
    Load,
    Name,
    OomOf,
    Positive,
    Record,
    Seconds,
    Text,
    Verdict,
    in_order,
)

NVML_COLUMNS = (
    "context_nvml_bytes",
    "weights_nvml_bytes",
    "baseline_nvml_bytes",
    "prefill_peak_nvml_bytes",
    "decode_peak_nvml_bytes",
    "kv_nvml_bytes",
)
TORCH_COLUMNS = (
    "weights_torch_bytes",
    "prefill_peak_torch_bytes",
    "decode_peak_torch_bytes",
    "prefill_peak_torch_reserved_bytes",
    "decode_peak_torch_reserved_bytes",
)


class FootprintRow(CellRow):
    """One (method, length) measured alone in a fresh process. Key: method_label, length_tokens."""

    prompt_tokens: Count
    """Tokens prefilled."""
    backend: Text
    """Attention implementation that really ran, e.g. `torch`, `triton`."""
    verdict: Verdict
    """What NVML says about the claimed saving: `freed`, `offloaded` or `resident` when it confirms at least 90 % of it,
    `mismatch` when it does not, `below_resolution` when the claim is under 256 MiB, else `not_measured`."""
    context_nvml_bytes: Count | None = None
    """NVML, this process: after creating the CUDA context, before the weights."""
    weights_nvml_bytes: Count | None = None
    """NVML, this process: with the weights loaded."""
    baseline_nvml_bytes: Count | None = None
    """NVML, this process: after warm-up and graph capture, without any KV cache."""
    prefill_peak_nvml_bytes: Count | None = None
    """NVML, this process: highest reading during prefill."""
    decode_peak_nvml_bytes: Count | None = None
    """NVML, this process: highest reading during decode, after `empty_cache`."""
    kv_nvml_bytes: Annotated[int, Field(ge=-limits.MOST_COUNT, le=limits.MOST_COUNT)] | None = None
    """(decode_peak_nvml_bytes - baseline_nvml_bytes) / sequences: the KV cache of a sequence as the driver sees it,
    metadata included. Can be negative for caches under the driver's resolution."""
    sequences: Positive | None = None
    """Sequences of the same prompt that decoded together; null for one. Bytes of the ledger and predictions are those
    of one sequence, readings of NVML and torch those of the process. The verdict is on all of them, and times are of
    their shared steps."""
    nvml_reason: Text | None = None
    """Why an NVML column is null."""
    weights_torch_bytes: Count | None = None
    """torch allocator: allocated bytes with the weights loaded."""
    prefill_peak_torch_bytes: Count | None = None
    """torch allocator: peak allocated bytes during prefill."""
    decode_peak_torch_bytes: Count | None = None
    """torch allocator: peak allocated bytes during decode."""
    prefill_peak_torch_reserved_bytes: Count | None = None
    """torch allocator: peak reserved bytes during prefill."""
    decode_peak_torch_reserved_bytes: Count | None = None
    """torch allocator: peak reserved bytes during decode."""
    torch_reason: Text | None = None
    """Why a torch column is null (the CPU allocator keeps no such counters)."""
    host_rss_peak_bytes: Count | None = None
    """Peak resident set size of the process in host memory, pinned pages included."""
    predicted_kv_bytes: Count | None = None
    """What the method's formula predicts for resident_kv_bytes, made before anything ran."""
    predicted_metadata_bytes: Count | None = None
    """What the method's formula predicts for metadata_bytes."""
    predicted_host_bytes: Count | None = None
    """What the method's formula predicts for host_kv_bytes."""
    ttft_s: Seconds | None = None
    """Time to first token: prefill plus the first decode step, seconds."""
    scores_s: Seconds | None = None
    """Seconds of ttft_s in which the prefill made, from its attention, the scores that the method keeps tokens by; null
    where it chooses without, in rows of earlier versions, and with a synthetic prompt."""
    tpot_s: Seconds | None = None
    """Time per output token: median over decode steps of a run without the NVML sampler, seconds."""
    tpot_p10_s: Seconds | None = None
    """10th percentile of the same steps; null in rows of earlier versions."""
    tpot_p90_s: Seconds | None = None
    """90th percentile of the same steps; null in rows of earlier versions."""
    tpot_steps: Count | None = None
    """Decode steps behind tpot_s."""
    load_1min: Load | None = None
    """The host's load average over the minute before the timing began, this process included, where the system tells
    it."""
    cpu_cores: Positive | None = None
    """Cores that this process may use: a load above them spoils times."""
    step_backend: Text | None = None
    """How the decode steps of tpot_s ran: `cuda graph`, `eager`, or `eager: ` and why they were no graph."""
    step_captures: Count | None = None
    """How often the step was captured while timing: once, and again each time the resident set outgrew its slots."""
    decode_tokens: Count | None = None
    """Tokens decoded during the memory measurement."""
    failure_phase: FailurePhase | None = None
    """Where an oom or failed cell stopped."""
    failure_device_bytes: Count | None = None
    """Device bytes this process held when it stopped (NVML, else the torch allocator), where that could be read."""
    oom_of: OomOf | None = None
    """What ran out in an oom cell: the `device`, the `device_budget` it was held to, or the `host`'s memory."""
    gpu_budget_bytes: Positive | None = None
    """Most device bytes the process was allowed (context and weights included); null without a budget."""
    other_processes: Count | None = None
    """Other processes on the GPU when the cell began: their work spoils times, their bytes can cause an oom."""
    other_processes_nvml_bytes: Count | None = None
    """What NVML says those held, where the driver tells it."""
    allocator: Text | None = None
    """Settings of torch's allocator in that process; null where none were set, or on a CPU."""
    verdict_reason: Text | None = None
    """Which reading does not confirm what, where the verdict is `mismatch`."""

    @property
    def key(self) -> tuple[str, int]:
        """(method_label, length_tokens): unique within a run folder."""
        return (self.method_label, self.length_tokens)

    @model_validator(mode="after")
    def _nulls_are_explained(self) -> Self:
        if self.status == "ok":
            self.demand(("host_rss_peak_bytes", "predicted_kv_bytes", "predicted_metadata_bytes"), "in an ok row")
            self.demand(("predicted_host_bytes", "ttft_s", "tpot_s", "tpot_steps", "decode_tokens"), "in an ok row")
            for columns, reason in ((NVML_COLUMNS, "nvml_reason"), (TORCH_COLUMNS, "torch_reason")):
                absent = [name for name in columns if getattr(self, name) is None]
                if absent and getattr(self, reason) is None:
                    raise ValueError(f"{', '.join(absent)} null, so {reason} must say why")
            if self.kv_nvml_bytes is None and self.verdict != "not_measured":
                raise ValueError(f"verdict is {self.verdict}, but kv_nvml_bytes was not measured")
            in_order(self.tpot_p10_s, self.tpot_s, self.tpot_p90_s, "tpot_p10_s <= tpot_s <= tpot_p90_s")
        elif self.verdict != "not_measured":
            raise ValueError(f"status is {self.status}, so the verdict cannot be {self.verdict}")
        return self


class MaxContextRow(Record):
    """The longest context of one method (`--find-max`), found by bisection with synthetic KV. Key: method_label."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    model: Name
    """The model as asked for."""
    method_label: Name
    """The method with its options. The row's key."""
    longest_tokens: Count
    """Longest length that was measured to fit; 0 when not even the shortest did."""
    shortest_failing_tokens: Length | None = None
    """Shortest length that was measured not to fit; null when the model's maximum fits."""
    bound: Bound
    """What bounds it: the `device`, the `device_budget`, the `host` mirror, the `model_maximum`; `limit`: nothing, up
    to the length where the search was told to stop; `none_fits`: not even the shortest length fits; `failed`: a try
    failed for another reason."""
    reason: Text | None = None
    """The reason of the try that did not fit."""
    tries: Lengths
    """Lengths tried, in order; each is a footprint row of the run."""
    gpu_budget_bytes: Positive | None = None
    """Device bytes each try was allowed; null: the whole card."""
    resolution: Annotated[float, Field(gt=0.0)]
    """The search ended when the two lengths lay this close: (failing - longest) / longest."""

    @property
    def key(self) -> str:
        """method_label: unique within a run folder."""
        return self.method_label

    @property
    def is_result(self) -> bool:
        """Whether the search ended by itself: one that a failed try ended may be followed by another."""
        return self.bound != "failed"
