"""The rows of a run folder, version 1: `samples.jsonl`, `footprint.jsonl` and `run.json`.

Two rules hold for every row. No NaN or infinity is ever written: a value that was not measured is null. And no null
goes unexplained: the row says why in `reason` (the whole cell was not measured) or in the reason of a group of columns
(`nvml_reason`, `torch_reason`, `answer_nll_reason`).

Units are part of the names: `_bytes`, `_s`, `_tokens`. One byte unit everywhere: bytes; GiB and GB appear in no row.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from kvscope.results import limits

SCHEMA_VERSION = 1

Status = Literal["ok", "unsupported", "failed", "oom"]
SavingKind = Literal["resident", "freed", "offloaded"]
RowSavingKind = Literal["resident", "freed", "offloaded", "unknown"]
"""Of a served model nobody tells what becomes of its cache."""
Verdict = Literal["freed", "offloaded", "resident", "mismatch", "below_resolution", "not_measured"]
MethodFrom = Literal["last_token", "question"]
StopReason = Literal["eos", "stop", "length"]
DecodeGraph = Literal["auto", "on", "off"]
"""Whether decode steps are a CUDA graph: where that can be done, always (or fail), or never."""
Selection = Literal["trained", "synthetic", "free"]
FailurePhase = Literal["start", "load", "prefill", "decode"]
SelfCheckState = Literal["passed", "skipped", "not_run"]
OomOf = Literal["device", "device_budget", "host"]
Bound = Literal["device", "device_budget", "host", "model_maximum", "limit", "none_fits", "failed"]
BatchBound = Literal["device", "device_budget", "max_batch"]
Forecast = Literal["fits", "oom", "unsupported", "unknown"]

Count = Annotated[int, Field(ge=0, le=limits.MOST_COUNT)]
Positive = Annotated[int, Field(ge=1, le=limits.MOST_COUNT)]
Length = Annotated[int, Field(ge=1, le=limits.MOST_LENGTH_TOKENS)]
Seed = Annotated[int, Field(ge=limits.LEAST_SEED, le=limits.MOST_SEED)]
Seconds = Annotated[float, Field(ge=0.0, le=limits.MOST_SECONDS)]
Speed = Annotated[float, Field(gt=0.0, le=1e15)]
Load = Annotated[float, Field(ge=0.0, le=1e6)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=limits.MOST_NAME_CHARS)]
Tasks = Annotated[tuple[Name, ...], Field(max_length=limits.MOST_TASKS)]
Lengths = Annotated[tuple[Length, ...], Field(max_length=limits.MOST_LENGTHS)]


class Record(BaseModel):
    """What every record of a run folder is: closed, frozen, and without NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, defer_build=True
    )

    def demand(self, columns: tuple[str, ...], why: str) -> None:
        """Raise ValueError where one of some columns is null."""
        held = self.__dict__
        if None in map(held.__getitem__, columns):
            absent = [name for name in columns if held[name] is None]
            raise ValueError(f"{', '.join(absent)} must not be null {why}")


def in_order(low: float | None, middle: float | None, high: float | None, rule: str) -> None:
    """Raise ValueError, naming ``rule``, where numbers that are known do not ascend."""
    known = [value for value in (low, middle, high) if value is not None]
    if known != sorted(known):
        raise ValueError(f"{rule} does not hold: {', '.join(map(str, known))}")


class ResidencyRecord(Record):
    """How a resident set that changes while decoding behaved: one entry a refresh, the first filling included."""

    tau: Positive
    """Decode steps between refreshes."""
    prompt_tokens: Count
    """Tokens of the prompt that the resident set is a part of."""
    resident_tokens: Annotated[tuple[Count, ...], Field(max_length=limits.MOST_REFRESHES)]
    """Prompt tokens on the device after each refresh, mean over layers."""
    recalled_bytes: Annotated[tuple[Count, ...], Field(max_length=limits.MOST_REFRESHES)]
    """Bytes copied host -> device for each refresh."""
    hit_rate: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Share of the chunks chosen by later refreshes that were resident already; null when there was one refresh only,
    or nothing was chosen."""
    fallbacks: Count
    """Refreshes that made everything resident because more than `fallback_ratio` was chosen."""
    indexer: Name | None = None
    """Trained indexer, as name@hash; null when none chose."""
    indexer_tau: Positive | None = None
    """Interval that indexer was trained for; null when none chose."""
    indexer_bytes: Count = 0
    """Device bytes of the indexer's weights. Like the model's they serve every sequence: no footprint holds them."""

    @model_validator(mode="after")
    def _one_entry_a_refresh(self) -> Self:
        if len(self.resident_tokens) != len(self.recalled_bytes):
            raise ValueError("resident_tokens and recalled_bytes are of different lengths: one entry a refresh each")
        return self


_LEDGER = (
    "resident_kv_bytes",
    "metadata_bytes",
    "host_kv_bytes",
    "dense_kv_bytes",
    "bytes_read_per_step",
    "attention_flops_per_step",
    "bytes_recalled",
)


class ServedRecord(Record):
    """How a server answered one prompt. Its own word is kept, and decides nothing."""

    request_s: Seconds
    """Seconds from the first sending to the whole answer, further tries and their pauses included: of a server that
    others use, too, it says little."""
    tries: Positive
    """How often the prompt was sent."""
    prompt_tokens: Count | None = None
    """Tokens of the prompt as the server counts them; null where it does not."""
    completion_tokens: Count | None = None
    """Tokens of the answer as the server counts them; null where it does not."""
    after_stop: str = ""
    """What it said from the first stop string on, which the row's `output` leaves out: no stop string is sent."""
    finish_reason: Name | None = None
    """Why the answer ended, as the server has it: see the row's `stop_reason` for what its text and length say."""
    nvml_bytes: Count | None = None
    """Most GPU bytes that the server's processes held while it answered, weights and other requests included."""
    nvml_reason: Text | None = None
    """Why `nvml_bytes` is null."""

    @model_validator(mode="after")
    def _nvml_is_explained(self) -> Self:
        if (self.nvml_bytes is None) == (self.nvml_reason is None):
            raise ValueError("exactly one of nvml_bytes and nvml_reason must be null")
        return self


class CellRow(Record):
    """What sample rows and footprint rows share: which cell this is, and whether it could be measured."""

    schema_version: Literal[1] = 1
    """Version of this schema; a reader refuses a version it does not know."""
    model: Name
    """The model as asked for: `reference`, a Hugging Face id, a folder's name or `preset:name`."""
    method: Name
    """Registry name of the method, e.g. `random`."""
    method_label: Name
    """The method with its options, unique within the run, e.g. `random:fraction=0.1`. Part of the row's key."""
    config: dict[str, JsonValue]
    """The method's settings as used at this length (`recency_tokens` resolved to a number, and so on)."""
    length_tokens: Length
    """Length asked for: prompt tokens plus the task's `max_new_tokens`. Part of the row's key."""
    status: Status
    """`ok`: measured. `unsupported`: the method cannot run here. `oom`: out of memory. `failed`: anything else."""
    reason: Text | None = None
    """Why the cell was not measured, in one sentence; null exactly when `status` is `ok`."""
    saving_kind: RowSavingKind
    """What the method claims: everything stays `resident`, the rest is `freed`, or `offloaded` to host memory; of a
    served model it is `unknown`."""
    noop: bool
    """True when at this length everything stays resident and is read, so that the method is dense by another name
    (of the same `kv`, where `config` has one)."""
    prefill: Literal["dense", "synthetic"] = "dense"
    """How the prompt was prefilled. `dense`: every method starts from the same dense prefill. `synthetic`: pages of
    random numbers without a prefill (footprint rows only; then `ttft_s` holds no prefill)."""
    method_from: MethodFrom = "last_token"
    """First token processed under the method: the prompt's last one, or the question's first one."""
    selection: Selection = "free"
    """What chose the resident set: a `trained` indexer, a `synthetic` stand-in, or `free` (nothing trained)."""
    dtype: Text
    """Element type of the model's weights and KV cache, e.g. `float32`, `bfloat16`; `unknown` for a served model."""
    device: Text
    """Where the KV cache lived, e.g. `cpu`, `cuda:0`; of a model on several devices all of them; `server` for a served
    model."""
    self_check: SelfCheckState | None = None
    """Whether the accuracy process found the model's logits through kvscope's cache equal to its own forward's before
    anything was measured: `passed`; `skipped` by `--no-self-check`; `not_run`: a run without that process. Null in rows
    of earlier versions."""
    resident_kv_bytes: Count | None = None
    """Ledger: bytes of keys and values held on the device, mean over the decode steps, metadata not included."""
    metadata_bytes: Count | None = None
    """Ledger: device bytes of what the method keeps besides (summaries, indexer keys, page tables)."""
    host_kv_bytes: Count | None = None
    """Ledger: bytes held in host memory for this sequence (the host mirror); 0 when the method needs none."""
    dense_kv_bytes: Count | None = None
    """What `dense` would hold at the same number of tokens: the denominator of every saving."""
    bytes_read_per_step: Count | None = None
    """Cache bytes one decode step reads, metadata scans included."""
    attention_flops_per_step: Count | None = None
    """Floating-point operations one decode step spends on attention, the method's own scoring included."""
    bytes_recalled: Count | None = None
    """Bytes copied host -> device during decode; 0 when the method recalls nothing."""
    kv_bytes_by_kind: dict[str, Count] | None = None
    """KV bytes on the device behind the last step by kind (`csa_kv`, `indexer_keys`, `hca_kv`, `window`, `buffers`);
    null on models that keep K and V of tokens and nothing else, or when the cell was not measured."""
    residency: ResidencyRecord | None = None
    """How the resident set changed while decoding; null where it is fixed at opening, or the cell was not measured."""
    ledger_reason: Text | None = None
    """Why the columns of the ledger are null in an ok row: nobody but a server sees its cache."""
    transformers_version: Text | None = None
    """Version of transformers that computed; null in rows of earlier versions."""
    torch_version: Text | None = None
    """Version of torch; null in rows of earlier versions."""
    chat_template: Text | None = None
    """Hash of the chat template that put the prompt into a user's turn; null where prompts had none."""

    @property
    def is_result(self) -> bool:
        """Whether the cell was measured: a row that is no result may be followed by one that is."""
        return self.status == "ok"

    @model_validator(mode="after")
    def _status_is_explained(self) -> Self:
        if self.status == "ok" and self.reason is not None:
            raise ValueError("reason must be null when status is ok")
        if self.status != "ok" and self.reason is None:
            raise ValueError(f"status is {self.status}, so reason must say why")
        if self.ledger_reason is not None and (
            self.status != "ok" or any(self.__dict__[name] is not None for name in _LEDGER)
        ):
            raise ValueError("ledger_reason says why an ok row has no ledger, so every column of that must be null")
        if self.status == "ok" and self.ledger_reason is None:
            self.demand(_LEDGER, "in an ok row without a ledger_reason")
        return self


_SCORED_ELSEWHERE = ("output", "score", "stop_reason", "decode_tokens")
_SCORED = (*_SCORED_ELSEWHERE, "prefill_s", "decode_s")
"""Columns of an answered prompt; a server does not tell its times."""


class SampleRow(CellRow):
    """One prompt answered under one method (accuracy pass). Key: task, length_tokens, sample, method_label."""

    task: Name
    """Task name, e.g. `niah_single_1`. Part of the row's key."""
    question_type: Name
    """The task's own kind of question; the task's name where it has one kind."""
    sample: Count
    """Index of the prompt within its (task, length) cell. Part of the row's key."""
    seed: Seed
    """Seed the prompt was drawn with."""
    depth: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Place of the evidence in the prompt: 0 = start, 1 = end; null when the question needs no single place."""
    context_id: Name | None = None
    """Names the context that several questions share, for clustered intervals; null when the prompt has its own."""
    prompt_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the prompt, so that methods and runs can be paired on the very same tokens."""
    prompt_tokens: Count
    """Tokens of the prompt."""
    truncated_tokens: Count | None = None
    """Tokens that a benchmark's own rule left out of the prompt's middle; null in rows of earlier versions."""
    targets: tuple[str, ...]
    """Accepted answers."""
    output: str | None = None
    """The generated text; null when status is not ok."""
    score: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """The task's score of the output, 0 to 1; null when status is not ok."""
    stop_reason: StopReason | None = None
    """Why generation ended: end-of-sequence token, stop string, or the token limit."""
    answer_nll: Annotated[float, Field(ge=-1e30, le=1e30)] | None = None
    """Mean negative log-likelihood of the target under the method, nats per token, teacher-forced."""
    answer_nll_reason: Text | None = None
    """Why answer_nll is null in an ok row (`not requested`, ...)."""
    prefill_s: Seconds | None = None
    """Seconds of the prompt's one prefill, shared by all methods of the run: never add it up over methods."""
    decode_s: Seconds | None = None
    """Seconds of the decode steps this answer took part in, step 0 included; the first capture of a captured step is
    not. Where `batch` is over 1 they are shared with other answers: they say nothing of the time one takes alone, and
    add up to more than the run took."""
    decode_tokens: Count | None = None
    """Tokens generated."""
    step_p10_s: Seconds | None = None
    """10th percentile of the steps that decode_s adds up; null in rows of earlier versions, and when status is not
    ok."""
    step_p90_s: Seconds | None = None
    """90th percentile of the same steps."""
    load_1min: Load | None = None
    """The host's load average over the minute before the answer was done, where the system tells it."""
    cpu_cores: Positive | None = None
    """Cores that this process may use: a load above them spoils times."""
    step_backend: Text | None = None
    """How the decode steps ran: `cuda graph`, `eager`, or `eager: ` and why they were no graph although one was asked
    for. A captured step keeps spare room in places, which the ledger's bytes count. Null in rows of earlier versions,
    where every step was eager, and when status is not ok."""
    jobs: Positive | None = None
    """Processes that answered prompts of this run at the same time, on all its devices; null for one. Times of a row
    say little then."""
    batch: Positive | None = None
    """Most answers that were decoded in one step with this one, itself included; null in rows of earlier versions,
    where it was 1, and when status is not ok."""
    least_logit_gap: Annotated[float, Field(ge=0.0, le=1e30)] | None = None
    """Least distance of the best logit to the second best, over the tokens of the answer, in the logits' own unit
    (nats); null in rows of earlier versions, and when status is not ok."""
    logit_noise: Annotated[float, Field(ge=0.0, le=1e30)] | None = None
    """How far logits of one sequence were measured to differ, in nats, between a step of its own and a step of as many
    as the run's; null where `batch` is 1."""
    served: ServedRecord | None = None
    """How a server answered; null for a model that kvscope ran itself, and when status is not ok. Of a server the
    columns `prefill`, `method_from`, `selection` and `noop` say nothing."""
    tie: bool | None = None
    """Whether `least_logit_gap` is within twice `logit_noise`, as each of the two logits may be off by that: then the
    answer may be another than steps of its own give. Where no noise was measured equal logits are none, either. Null
    where `batch` is 1."""

    @property
    def key(self) -> tuple[str, int, int, str]:
        """(task, length_tokens, sample, method_label): unique within a run folder."""
        return (self.task, self.length_tokens, self.sample, self.method_label)

    @model_validator(mode="after")
    def _scored_when_ok(self) -> Self:
        if self.status == "ok":
            self.demand(_SCORED if self.served is None else _SCORED_ELSEWHERE, "in an ok row")
            if self.answer_nll is None and self.answer_nll_reason is None:
                raise ValueError("answer_nll is null, so answer_nll_reason must say why")
            in_order(self.step_p10_s, self.step_p90_s, None, "step_p10_s <= step_p90_s")
        elif self.score is not None or self.output is not None:
            raise ValueError(f"status is {self.status}, so score and output must be null")
        return self


class ThroughputRow(CellRow):
    """Largest batch that fits and its decode throughput, one fresh process. Key: method_label, length_tokens.

    The ledger's columns are those of the whole batch, where not null.
    """

    prompt_tokens: Count
    """Tokens of each sequence's prompt."""
    backend: Text
    """Attention implementation that really ran."""
    batching: Literal["batched_step", "one_launch"] = "batched_step"
    """How the batch decodes: one forward of the model for all sequences, and attention sequence by sequence or in one
    launch a layer."""
    mirror: Literal["shared", "none"]
    """The sequences share one prompt: methods that recall have one host mirror between them, and each recalls its own
    chunks from it. `none`: nothing is recalled."""
    largest_batch: Count | None = None
    """Most sequences that were open and decoding at once."""
    batch_bound: BatchBound | None = None
    """What the next sequence would have exceeded; `max_batch`: nothing, the search stopped there."""
    tokens_per_s: Speed | None = None
    """Decode tokens a second of the largest batch: batch / mean step."""
    step_s: Seconds | None = None
    """Mean seconds of a step of the largest batch, refreshes of the resident set included."""
    tokens_per_s_at_1: Speed | None = None
    """The same with one sequence."""
    floor_s: Seconds | None = None
    """Least seconds of such a step: bytes of weights and of the ledger's reads over `copy_bytes_per_s`, and recalled
    bytes over `bus_bytes_per_s`: added where a step waits for the recall, the longer where it runs behind. This and the
    next four are null in rows of earlier versions."""
    weights_read_bytes: Count | None = None
    """Bytes of weights that a step reads: all but an embedding table that is no output projection, too."""
    recalled_bytes_per_step: Count | None = None
    """Bytes recalled from host memory, mean over the steps; the first filling is none of them."""
    copy_bytes_per_s: Speed | None = None
    """Bandwidth of a copy in the device's memory just before, bytes read and written."""
    bus_bytes_per_s: Speed | None = None
    """Bandwidth of a copy from pinned host memory just before; null without a bus."""
    step_p10_s: Seconds | None = None
    """10th percentile of the same steps; null in rows of earlier versions."""
    step_p90_s: Seconds | None = None
    """90th percentile of the same steps; null in rows of earlier versions."""
    steps: Count | None = None
    """Steps behind the mean."""
    load_1min: Load | None = None
    """The host's load average over the minute before the timing began, where the system tells it."""
    cpu_cores: Positive | None = None
    """Cores that this process may use: a load above them spoils times."""
    other_processes: Count | None = None
    """Other processes on the GPU when the cell began; null in rows of earlier versions."""
    step_backend: Text | None = None
    """How the steps of the largest batch ran: `cuda graph`, `eager`, or `eager: ` and why they were no graph. Null in
    rows of earlier versions, where every step was eager."""
    gpu_budget_bytes: Positive | None = None
    """Device bytes the process was allowed; null: the whole card."""
    batch_peak_nvml_bytes: Count | None = None
    """NVML, this process: highest reading while the largest batch decoded."""
    failure_phase: FailurePhase | None = None
    """Where an oom or failed cell stopped."""
    failure_device_bytes: Count | None = None
    """Device bytes this process held when it stopped, where that could be read."""
    oom_of: OomOf | None = None
    """What ran out in an oom cell."""

    @property
    def key(self) -> tuple[str, int]:
        """(method_label, length_tokens): unique within a run folder."""
        return (self.method_label, self.length_tokens)

    @model_validator(mode="after")
    def _measured_when_ok(self) -> Self:
        if self.status == "ok":
            self.demand(("largest_batch", "batch_bound", "tokens_per_s", "step_s", "steps"), "in an ok row")
            in_order(self.step_p10_s, self.step_p90_s, None, "step_p10_s <= step_p90_s")
        return self
