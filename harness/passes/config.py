"""The configuration of one run: one frozen object, four sources, one precedence.

``defaults < YAML file < flags < --set key=value``. Every source goes through the same validation, so an unknown key or
a wrong type is the same sentence wherever it came from. No torch here: bad input is refused before anything loads.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from kvscope.errors import UsageError, did_you_mean, shown
from kvscope.harness.engine.presets import is_preset
from kvscope.harness.passes.config_errors import SOURCE, sentence, told
from kvscope.harness.passes.method_sweeps import sweep_methods
from kvscope.harness.passes.served_keys import SERVED_KEYS, check_served, served_values
from kvscope.harness.passes.spread_keys import check_spread
from kvscope.harness.passes.worker_keys import check_executor, checked_device, checked_gpus, checked_ray_address
from kvscope.harness.passes.yaml_text import read_yaml, yaml_value
from kvscope.harness.served.address import is_url
from kvscope.paths import user_path
from kvscope.results import limits
from kvscope.specs import MethodSpec, Spec, TaskSpec
from kvscope.units import Bytes, Tokens
from kvscope.values import own_value, read_value

MOST_SAMPLES = 1_000_000

Length = Annotated[Tokens, Field(ge=1, le=limits.MOST_LENGTH_TOKENS)]

#: Keys that decide no value of a row.
_NO_VALUES = (
    "out",
    "footprint_timeout_s",
    "time_limit_s",
    "retry",
    "self_check",
    "batch",
    "jobs",
    "gpus",
    "executor",
    "ray_address",
)
#: Key -> why nothing is scored where it is set (``model``: to a preset).
_UNSCORED = {
    "model": "a preset has random weights, so its answers mean nothing",
    "find_max": "find_max measures memory with synthetic KV",
    "throughput": "throughput measures speed with synthetic KV",
}

#: Tokens of a prefill chunk unless told; the accuracy pass takes more where that pays (``chunks``).
CHUNK_TOKENS = 2048


class RunConfig(BaseModel):
    """Everything that decides what ``kvscope run`` measures, plus where it goes (``out``).

    Lengths are whole prompts: prompt tokens + new tokens = length.

    Raises:
        UsageError: an unknown key, or a value of the wrong type or range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = Field(
        default="reference", description="reference, a folder, a Hugging Face id, preset:NAME or a server's URL"
    )
    served_model: str | None = Field(
        default=None, min_length=1, description="server: the name it knows the model by (default: its only one)"
    )
    tokenizer: str | None = Field(
        default=None, min_length=1, description="server: its model's tokenizer, as a folder, reference or an id"
    )
    api: Literal["auto", "completions", "chat"] = Field(
        default="auto", description="server: which API; auto is chat where prompts have a chat template"
    )
    server_context_tokens: Tokens | None = Field(
        default=None,
        ge=2,
        le=limits.MOST_LENGTH_TOKENS,
        description="server: longest prompt + answer it takes (default: what it says, else the model's config)",
    )
    concurrency: int = Field(
        default=1, ge=1, le=limits.MOST_REQUESTS, description="server: requests at a time, where that changes no answer"
    )
    request_timeout_s: float = Field(default=600.0, gt=0, description="server: longest time that it may be silent")
    request_tries: int = Field(
        default=6, ge=1, le=100, description="server: most times a request is sent (429, 5xx, time-outs)"
    )
    server_pid: int | None = Field(
        default=None, ge=1, le=2**31, description="server: its process on this host, whose GPU memory NVML tells"
    )
    methods: tuple[MethodSpec, ...] = Field(
        default=tuple(map(Spec, ("dense", "sliding_window", "recency", "random"))),
        description="cache methods, as name or name:key=value,key=value",
    )
    tasks: tuple[TaskSpec, ...] = Field(
        default=tuple(map(Spec, ("niah_single_1", "niah_multikey_2"))),
        description="tasks, as name or name:key=value,key=value",
    )
    lengths_tokens: tuple[Length, ...] = Field(
        default=(1024, 2048, 4096, 8192),
        max_length=limits.MOST_LENGTHS,
        description="prompt + answer lengths, as 4096, 4k or 1M",
    )
    samples: int = Field(default=20, ge=1, le=MOST_SAMPLES, description="prompts per task and length")
    seed: int = Field(default=0, ge=0, le=limits.MOST_SEED, description="seed of prompts and of random choices")
    method_from: Literal["last_token", "question"] = Field(
        default="last_token",
        description="first token fed under the method: the last of the prompt, or the first of the question",
    )
    answer_nll: bool = Field(default=False, description="also measure the teacher-forced NLL of the reference answer")
    max_new_tokens: Tokens | None = Field(
        default=None, ge=1, le=limits.MOST_LENGTH_TOKENS, description="new tokens per sample (default: the task's)"
    )
    chat_template: str = Field(
        default="auto",
        min_length=1,
        description="prompts as a user's turn: auto (the tokenizer's template, if it has one), none, or a Jinja file",
    )
    batch: int | None = Field(
        default=None,
        ge=1,
        le=limits.MOST_BATCH,
        description="accuracy pass: sequences (methods and prompts) that share a step, or auto: by what memory holds",
    )
    jobs: int = Field(
        default=1,
        ge=1,
        le=limits.MOST_JOBS,
        description="accuracy pass: processes on each device that answer prompts; memory and times are measured alone",
    )
    gpus: str | None = Field(
        default=None, description="accuracy pass: GPUs that answer prompts, all or as 0,1 (default: the device's one)"
    )
    executor: Literal["processes", "ray"] = Field(
        default="processes",
        description="accuracy pass: who answers, processes of this machine or jobs a node (or GPU) of a Ray cluster",
    )
    ray_address: str | None = Field(
        default=None,
        description="ray: the cluster, as HOST:PORT, local (one that is started for the run) or auto: $RAY_ADDRESS, "
        "one that runs on this machine, else local",
    )
    paper_settings: bool = Field(
        default=False, description="fix recency_tokens at 8192, blocks and budgets at their papers' values"
    )
    footprint: bool = Field(default=True, description="measure memory and latency, a fresh process per cell")
    footprint_lengths_tokens: tuple[Length, ...] | None = Field(
        default=None,
        max_length=limits.MOST_LENGTHS,
        description="lengths of the footprint pass (default: lengths_tokens)",
    )
    kv: Literal["prefill", "synthetic"] = Field(
        default="prefill",
        description="footprint pass: prefill the prompt, or fill its pages with random values (rows say so)",
    )
    gpu_budget_bytes: Bytes | None = Field(
        default=None,
        ge=1,
        le=limits.MOST_COUNT,
        description="most device bytes a footprint process may take, as 24GiB (default: the whole card)",
    )
    find_max: bool = Field(
        default=False, description="only find each method's longest context, by bisection with synthetic KV"
    )
    find_max_resolution: float = Field(
        default=0.03,
        gt=0,
        lt=1,
        description="the search ends when the next length would differ by less than this share",
    )
    find_max_limit_tokens: Tokens | None = Field(
        default=None,
        ge=1,
        le=limits.MOST_LENGTH_TOKENS,
        description="longest length that search tries (default: the model's maximum)",
    )
    throughput: bool = Field(
        default=False, description="only find each method's largest batch, with synthetic KV, and its tokens a second"
    )
    max_batch: int = Field(
        default=64, ge=1, le=limits.MOST_COUNT, description="where the search for the largest batch stops"
    )
    time_limit_s: float | None = Field(
        default=None, gt=0, description="begin no prompt and no cell after this time; the same command continues"
    )
    retry: bool = Field(
        default=True, description="measure cells again whose rows are no results (failed, oom), once a call"
    )
    footprint_decode_tokens: Tokens = Field(
        default=32, ge=2, le=limits.MOST_LENGTH_TOKENS, description="decode steps per footprint cell"
    )
    footprint_batch: int = Field(
        default=1,
        ge=1,
        le=limits.MOST_BATCH,
        description="sequences alike in a footprint cell, where the KV of one is below the driver's resolution",
    )
    footprint_timeout_s: float = Field(default=3600.0, gt=0, description="longest time of one footprint cell")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    device_map: str = Field(
        default="none",
        min_length=1,
        description="a model over several GPUs: auto or balanced (its layers over all of them), a JSON file of "
        "module: device, or none",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto is float32 on a CPU, bfloat16 on a GPU"
    )
    prefill_chunk_tokens: Tokens | None = Field(
        default=None,
        ge=1,
        description="tokens per prefill chunk; none: 2,048, and up to 16,384 where a GPU answers with a small model",
    )
    page_tokens: Tokens = Field(default=64, ge=1, description="tokens per page of the KV store")
    decode_graph: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="footprint, throughput: decode steps as a CUDA graph where that can be done, always (or fail), or "
        "never",
    )
    accuracy_graph: bool = Field(
        default=False,
        description="accuracy pass: decode steps as a CUDA graph where that can be done and pays; rows say which",
    )
    self_check: bool = Field(
        default=True,
        description="accuracy pass: compare the model through kvscope's cache with its own forward before anything is "
        "measured; rows say whether",
    )
    out: str | None = Field(default=None, description="folder of the run")

    def __init__(self, **values: Any) -> None:
        """Read and check values, wherever they come from: ``make_config`` says where that is."""
        source = SOURCE.get()
        for key in values:
            if key not in type(self).model_fields:
                raise UsageError(f"Unknown key {shown(key)} in {source}.{did_you_mean(str(key), config_keys())}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(sentence(error, source=source)) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Read a mapping, or pass a configuration on, with the sentences of ``make_config``.

        Raises:
            UsageError: as ``make_config``.
        """
        with told():
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Read a JSON object, as ``model_validate``."""
        with told():
            return super().model_validate_json(json_data, **options)

    @field_validator("*", mode="before")
    @classmethod
    def _by_type(cls, value: object, info: ValidationInfo) -> object:
        """Read a value by the type its key declares, as an option of a method is read."""
        key = str(info.field_name)
        if key in ("methods", "tasks", "out"):
            return own_value(value)
        return read_value(_declared_types()[key], value)

    @field_validator("lengths_tokens", "footprint_lengths_tokens")
    @classmethod
    def _ascending(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if value is None else tuple(sorted(set(value)))

    @field_validator("methods", "tasks", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="before")
    @classmethod
    def _memory_alone(cls, values: Any) -> Any:
        """Take the tasks out where nothing is scored: random weights, or a search with synthetic KV."""
        if not isinstance(values, dict):
            return values
        for key, why in _UNSCORED.items():
            asked = is_preset(str(values.get("model", ""))) if key == "model" else values.get(key) is True
            if not asked:
                continue
            if values.get("tasks"):
                raise UsageError(f"tasks: {why}: leave the tasks out.")
            values = {**values, "tasks": ()}
        return values

    @model_validator(mode="before")
    @classmethod
    def _served(cls, values: Any) -> Any:
        """Give a server its one method, and take the memory passes out."""
        return served_values(values) if isinstance(values, dict) else values

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        return checked_device(value)

    @field_validator("gpus")
    @classmethod
    def _gpus(cls, value: str | None) -> str | None:
        return None if value is None else checked_gpus(value)

    @field_validator("ray_address")
    @classmethod
    def _ray_address(cls, value: str | None) -> str | None:
        return None if value is None else checked_ray_address(value)

    @field_validator("out", mode="before")
    @classmethod
    def _out(cls, value: object) -> object:
        if isinstance(value, str | Path):
            user_path(value, what="out")
            return str(value)
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for key, what in (("methods", "method"), ("tasks", "task"), ("lengths_tokens", "length")):
            if not getattr(self, key) and not (key == "tasks" and self.unscored):
                raise UsageError(f"{key}: at least one {what} is needed.")
        chunk_tokens = CHUNK_TOKENS if self.prefill_chunk_tokens is None else self.prefill_chunk_tokens
        if chunk_tokens % self.page_tokens:
            raise UsageError(
                f"prefill_chunk_tokens is {chunk_tokens}, expected a multiple of page_tokens ({self.page_tokens})."
            )
        if self.gpus is not None and self.device != "auto":
            raise UsageError("gpus says where prompts are answered: leave out --device.")
        check_spread(self.device_map, self.decode_graph, changed=_changed(self))
        check_served(self.model, self.methods, self.tokenizer, changed=_changed(self))
        if self.find_max and self.throughput:
            raise UsageError("find_max and throughput are two runs: ask for one of them.")
        if self.unscored and (self.jobs > 1 or self.gpus is not None or self.executor != "processes"):
            raise UsageError("jobs, gpus and executor say who answers prompts, and this run asks none: leave them out.")
        check_executor(self.executor, device=self.device, gpus=self.gpus, ray_address=self.ray_address)
        asks_memory = self.gpu_budget_bytes is not None or self.kv == "synthetic" or self.footprint_batch > 1
        if not self.footprint and (self.unscored or asks_memory):
            raise UsageError(
                "footprint is off, so this run would measure no memory, which its other options ask for: leave out "
                "--no-footprint."
            )
        for key, labels in (("methods", list(self.method_labels)), ("tasks", list(self.task_labels))):
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise UsageError(f"{key}: {twice[0]!r} is given twice: keep one.")
        return self

    @property
    def served(self) -> bool:
        """Whether the model is one behind a server."""
        return is_url(self.model)

    @property
    def unscored(self) -> bool:
        """Whether the run has no accuracy pass: random weights, or a search with synthetic KV."""
        return is_preset(self.model) or self.find_max or self.throughput

    @property
    def first_device(self) -> str:
        """Where everything is computed that one process does: the first of ``gpus`` where they are named."""
        return self.device if self.gpus in (None, "all") else f"cuda:{str(self.gpus).partition(',')[0]}"

    @property
    def synthetic_kv(self) -> bool:
        """Whether the memory passes fill pages with random values instead of prefilling."""
        return self.kv == "synthetic" or self.find_max or self.throughput

    @property
    def footprint_cells_tokens(self) -> tuple[int, ...]:
        """Lengths of the footprint pass; empty when it is off, and in the searches, which have rows of their own."""
        if not self.footprint or self.find_max or self.throughput:
            return ()
        return self.footprint_lengths_tokens or self.lengths_tokens

    @property
    def method_labels(self) -> tuple[str, ...]:
        """One text a method, as asked for; rows use the method's own label, which leaves defaults out."""
        return tuple(spec.label for spec in self.methods)

    @property
    def task_labels(self) -> tuple[str, ...]:
        """One text a task, options included."""
        return tuple(spec.label for spec in self.tasks)

    def identity(self) -> dict[str, Any]:
        """Return what decides the rows: all but ``out``, the time limits, ``retry``, ``batch`` and the self-check.

        What ``chat_template`` and ``device_map`` come to is for the plan to say.
        """
        values = self.model_dump(
            mode="json",
            exclude={*_NO_VALUES, *SERVED_KEYS, "chat_template", "device_map", "methods", "tasks"},
        )
        values["footprint_lengths_tokens"] = list(self.footprint_cells_tokens)
        if self.prefill_chunk_tokens is None:
            values["prefill_chunk_tokens"] = CHUNK_TOKENS  # what earlier folders say; the plan knows better
        if self.footprint_batch == 1:
            del values["footprint_batch"]  # absent from folders begun before there was a choice
        if not self.accuracy_graph:
            del values["accuracy_graph"]  # absent from folders begun before there was a choice: they go on
        return {"methods": list(self.method_labels), "tasks": list(self.task_labels), **values}


def _changed(config: RunConfig) -> set[str]:
    """Return the keys whose values are not the defaults."""
    return {key for key, field in RunConfig.model_fields.items() if getattr(config, key) != field.default}


@lru_cache(maxsize=1)
def _declared_types() -> dict[str, Any]:
    return get_type_hints(RunConfig, include_extras=True)


@lru_cache(maxsize=1)
def config_keys() -> tuple[str, ...]:
    """Names of every configuration key, in declaration order."""
    return tuple(RunConfig.model_fields)


def make_config(values: Mapping[str, Any], *, source: str = "the configuration") -> RunConfig:
    """Validate ``values`` into a RunConfig.

    Args:
        source: where the values came from, as an error names it.

    Raises:
        UsageError: an unknown key (with the nearest known one), or a value of the wrong type or range.
    """
    if not isinstance(values, Mapping):
        raise UsageError(
            f"{source[0].upper()}{source[1:]} is {shown(values)}, expected a mapping of keys such as "
            '{"methods": ["dense"], "samples": 5}, or a RunConfig.'
        )
    odd = next((key for key in values if not isinstance(key, str)), None)
    if odd is not None:
        raise UsageError(f"Unknown key {shown(odd)} in {source}.{did_you_mean(str(odd), config_keys())}")
    said = SOURCE.set(source)
    try:
        return RunConfig(**values)
    finally:
        SOURCE.reset(said)


def load_config(
    path: str | Path | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    sweeps: Sequence[str] = (),
) -> RunConfig:
    """Merge defaults, a YAML file, command-line flags and ``--set`` items, the later winning, and validate once.

    Args:
        path: YAML file with keys of :class:`RunConfig`; None for no file.
        flags: keys given as flags; None values mean "not given" and are left out.
        sets: ``key=value`` items whose value is read as YAML.
        sweeps: ``method.option=value,value`` items, which multiply the methods (see :func:`sweep_methods`).

    Raises:
        UsageError: file missing or not a YAML mapping; unknown key; wrong type or value; malformed ``--set``.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update(read_yaml(Path(path)))
        make_config(values, source=str(path))
    values.update({key: value for key, value in (flags or {}).items() if value is not None})
    make_config(values, source="the options")
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {shown(item)} is not key=value: write for example --set samples=50.")
        values[key.strip()] = yaml_value(text, source=f"--set {shown(item)}")
    merged = make_config(values, source="--set" if sets else "the options")
    if not sweeps:
        return merged
    values["methods"] = sweep_methods(merged.methods, sweeps)
    return make_config(values, source="--sweep")
