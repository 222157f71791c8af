"""What a run will do, before it does any of it: cells, predicted bytes, forecasts, tokens to prefill.

Making a plan is also how a run is checked: names, options, lengths against the model and the tasks. It reads
configuration and tokenizer files, never weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from kvscope.errors import UsageError
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.device_budget import CONTEXT_BYTES
from kvscope.harness.passes.facts import ModelFacts, describe_model
from kvscope.harness.passes.memory import free_device_bytes
from kvscope.harness.passes.pooling import excluded_types
from kvscope.results.schema import ExcludedType, Forecast, PlannedCell
from kvscope.specs import Spec
from kvscope.units import format_bytes, format_length

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod, Footprint
    from kvscope.tasks.base import Task

DECODE_WORK_TOKENS = 256
PROCESS_WORK_TOKENS = 8192


@dataclass(frozen=True)
class Plan:
    """A checked configuration with everything made that a run needs except the model's weights."""

    config: RunConfig
    facts: ModelFacts
    methods: "tuple[CacheMethod[Any], ...]"
    tasks: "tuple[Task, ...]"
    cells: tuple[PlannedCell, ...]
    specs: Mapping[str, Spec]
    """Label of a method -> the spec that a fresh process makes it from."""
    excluded_types: tuple[ExcludedType, ...] = ()
    """Question types of these tasks that pooled scores leave out, as the model's folder says."""

    @cached_property
    def _by_key(self) -> dict[tuple[str, int], PlannedCell]:
        return {(cell.method_label, cell.length_tokens): cell for cell in self.cells}

    def cell(self, method_label: str, length_tokens: int) -> PlannedCell:
        """Return the forecast of one (method, length)."""
        return self._by_key[method_label, length_tokens]

    def unsupported(self, method_label: str, length_tokens: int) -> str | None:
        """Return why a method cannot run at a length, or None."""
        cell = self._by_key.get((method_label, length_tokens))
        return cell.reason if cell is not None and cell.forecast == "unsupported" else None

    @property
    def planned_lengths_tokens(self) -> tuple[int, ...]:
        """Every length that has a cell; a search for the longest context finds its own."""
        return planned_lengths(self.config)

    @property
    def accuracy_prefill_tokens(self) -> int:
        """Prompt tokens of the accuracy pass: one prefill a prompt, whatever the number of methods."""
        config = self.config
        return sum(config.lengths_tokens) * len(self.tasks) * config.samples

    @property
    def footprint_prefill_tokens(self) -> int:
        """Prompt tokens of the footprint pass: one prefill a supported (method, length)."""
        return sum(
            length_tokens
            for length_tokens in self.config.footprint_cells_tokens
            for method in self.methods
            if self.unsupported(method.label, length_tokens) is None and not self.config.synthetic_kv
        )

    def prompt_work_tokens(self, length_tokens: int, *, methods: int) -> int:
        """Return what a prompt costs in units of one prefilled token, roughly: for the ETA, which corrects itself."""
        return length_tokens + methods * DECODE_WORK_TOKENS

    def footprint_work_tokens(self, length_tokens: int) -> int:
        """Return what a footprint cell costs in the same units: a process, a model load, a prefill, three decodes."""
        return length_tokens + PROCESS_WORK_TOKENS

    @property
    def warnings(self) -> list[str]:
        """What the user may not expect, one sentence each."""
        said = []
        if not self.tasks and all(method.name != "dense" for method in self.methods):
            said.append(
                "dense is not among the methods: bytes and times have nothing to be compared with. Add -m dense."
            )
        elif all(method.name != "dense" for method in self.methods):
            said.append("dense is not among the methods: accuracy has nothing to be compared with. Add -m dense.")
        for method in self.methods:
            if method.name == "dense":
                continue
            same = [n for n in self.planned_lengths_tokens if method.is_noop(n, self.facts.shape)]
            if same:
                said.append(
                    f"{method.label} leaves nothing out at {_lengths(same)}: there it is dense by another name."
                )
        said += [f"{each.sentence}." for each in self.excluded_types]
        if len(self.config.lengths_tokens) > 1:
            said += [
                f"the prompts of {task.name} have the length they have, so they are the same at every --length: give "
                "the longest alone."
                for task in self.tasks
                if task.own_lengths
            ]
        note = self.facts.backend.note(self.facts.shape, max(self.config.lengths_tokens))
        return said if note is None else [*said, note]

    def text(self) -> str:
        """Return the plan as plain text."""
        config, facts = self.config, self.facts
        lengths = list(self.planned_lengths_tokens)
        header = ["method", *(format_length(n) for n in lengths)]
        kv = [[m.label, *(_kv_text(self.cell(m.label, n)) for n in lengths)] for m in self.methods]
        host = [[m.label, *(_mib(self.cell(m.label, n).predicted_host_bytes) for n in lengths)] for m in self.methods]
        weights = "unknown size" if facts.weights_bytes is None else format_bytes(facts.weights_bytes)
        parts = [
            f"model    {config.model}: {facts.dtype} on {facts.device}, {weights} of weights, "
            f"{facts.shape.kv_bytes_per_token:,} B of KV a token, at most {facts.max_length_tokens:,} tokens",
        ]
        if self.tasks:
            parts += [
                f"tasks    {', '.join(task.name for task in self.tasks)}",
                f"lengths  {_lengths(config.lengths_tokens)}, {config.samples} samples each, seed {config.seed}",
            ]
        else:
            parts.append("tasks    none: nothing is scored in this run, memory and times alone are measured")
        if config.gpu_budget_bytes is not None:
            parts.append(
                f"budget   {format_bytes(config.gpu_budget_bytes)} of device memory a process, weights included"
            )
        if config.find_max:
            return "\n".join(
                [
                    *parts,
                    f"search   the longest context of {', '.join(method.label for method in self.methods)}: synthetic "
                    "KV, a fresh process a try",
                ]
            )
        parts += [
            "",
            "Predicted bytes on the device (KV + metadata), MiB",
            tabulate(kv, headers=header, tablefmt="simple", disable_numparse=True, colalign=_columns(header)),
        ]
        if any(cell.predicted_host_bytes for cell in self.cells):
            parts += [
                "",
                "Predicted bytes in host memory, MiB",
                tabulate(host, headers=header, tablefmt="simple", disable_numparse=True, colalign=_columns(header)),
            ]
        prompts = len(self.tasks) * len(config.lengths_tokens) * config.samples
        parts.append("")
        if self.tasks:
            parts.append(
                f"accuracy   {prompts:,} prompts, each prefilled once for {len(self.methods)} methods: "
                f"{self.accuracy_prefill_tokens:,} tokens to prefill, {prompts * len(self.methods):,} rows"
            )
        if config.footprint_cells_tokens:
            footprint_cells = len(config.footprint_cells_tokens) * len(self.methods)
            work = "synthetic KV" if config.synthetic_kv else f"{self.footprint_prefill_tokens:,} tokens to prefill"
            parts.append(
                f"footprint  {footprint_cells} cells, each a fresh process, at "
                f"{_lengths(config.footprint_cells_tokens)}: {work}"
            )
        if config.throughput:
            parts.append(
                f"throughput {len(config.lengths_tokens) * len(self.methods)} cells, each a fresh process, at "
                f"{_lengths(config.lengths_tokens)}: the largest batch up to {config.max_batch}, synthetic KV"
            )
        parts += [f"{cell.forecast:<10} {cell.method_label} at {format_length(cell.length_tokens)}: {cell.reason}"
                  for cell in self.cells if cell.reason]  # fmt: skip
        parts += [f"note       {text}" for text in self.warnings]
        return "\n".join(parts)


def make_plan(config: RunConfig) -> Plan:
    """Check a configuration and forecast every (method, length).

    Raises:
        UsageError: an unknown method, task, model or option; a trained part of a method that is missing or belongs to
            another model; a length too long for the model or too short for a task.
    """
    from kvscope.methods.registry import check_one_class_a_name, create_method
    from kvscope.tasks.registry import create_task

    methods = tuple(create_method(spec, paper_settings=config.paper_settings) for spec in config.methods)
    check_one_class_a_name(list(methods))
    check_unique([method.label for method in methods])
    specs = {method.label: spec for method, spec in zip(methods, config.methods, strict=True)}
    tasks = []
    for spec in config.tasks:
        task = create_task(spec)
        if config.max_new_tokens is not None:
            task.max_new_tokens = config.max_new_tokens
        tasks.append(task)
    check_tasks(tasks, config.samples)
    facts = describe_model(config.model, device=config.device, dtype=config.dtype, page_tokens=config.page_tokens)
    check_synthetic(config, facts)
    methods = tuple(facts.backend.form_of(method, facts.shape) for method in methods)
    for method in methods:
        method.require(facts.shape)
    check_lengths(config, facts, tasks)
    lengths = planned_lengths(config)
    rooms = device_rooms(config, facts)
    cells = [
        plan_cell(method, length_tokens, config=config, facts=facts, rooms=rooms)
        for method in methods
        for length_tokens in lengths
    ]
    asked = {(task.name, kind) for task in tasks for kind in task.question_types}
    excluded = tuple(each for each in excluded_types(config.model) if (each.task, each.question_type) in asked)
    return Plan(
        config=config,
        facts=facts,
        methods=methods,
        tasks=tuple(tasks),
        cells=tuple(cells),
        specs=specs,
        excluded_types=excluded,
    )


def check_synthetic(config: RunConfig, facts: ModelFacts) -> None:
    """Refuse synthetic KV on a model whose cache a prompt of random pages does not fill.

    Raises:
        UsageError: saying what is not filled.
    """
    gap = facts.backend.synthetic_gap(facts.shape)
    if config.synthetic_kv and gap is not None:
        raise UsageError(
            f"Model {config.model!r} has {gap} not filled with synthetic values: leave out --kv synthetic, --find-max "
            "and --throughput, or take another model."
        )


def planned_lengths(config: RunConfig) -> tuple[int, ...]:
    """Return every length that has a cell, ascending."""
    if config.find_max:
        return ()
    scored = () if config.unscored and not config.throughput else config.lengths_tokens
    return tuple(sorted({*scored, *config.footprint_cells_tokens}))


def device_rooms(config: RunConfig, facts: ModelFacts) -> dict[str, tuple[int | None, str]]:
    """Return device -> (free bytes, its name) for the computing device and the host; a budget lowers the device's."""
    rooms = {device: free_device_bytes(device) for device in {facts.device, "cpu"}}
    budget_bytes = config.gpu_budget_bytes
    if budget_bytes is not None and facts.device != "cpu":
        free_bytes, _ = rooms[facts.device]
        least_bytes = budget_bytes if free_bytes is None else min(free_bytes, budget_bytes)
        rooms[facts.device] = least_bytes, "the device budget"
    return rooms


def check_unique(labels: Sequence[str]) -> None:
    """Refuse two methods that are the same once defaults are filled in: rows are told apart by the label.

    Raises:
        UsageError: naming the method.
    """
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"Method {label!r} is asked for twice (options equal to the defaults count): keep one.")


def check_tasks(tasks: "Sequence[Task]", samples: int) -> None:
    """Refuse two tasks of one name, which rows could not tell apart, and more samples than a task has.

    Raises:
        UsageError: naming the task.
    """
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            raise UsageError(f"Two tasks are called {task.name!r}, so rows could not be told apart: give one a label=.")
        if task.n_samples is not None and samples > task.n_samples:
            raise UsageError(
                f"Task {task.name!r} has {task.n_samples:,} prompts, and {samples:,} samples are asked for: use "
                f"--samples {task.n_samples} or fewer."
            )


def check_lengths(config: RunConfig, facts: ModelFacts, tasks: "Sequence[Task]") -> None:
    """Refuse lengths that the model or a task cannot take.

    Raises:
        UsageError: naming the length, the limit and who sets it.
    """
    for length_tokens in planned_lengths(config):
        if length_tokens > facts.max_length_tokens:
            raise UsageError(
                f"Length {length_tokens:,} is over the {facts.max_length_tokens:,} tokens that model "
                f"{config.model!r} takes: use shorter lengths or another model."
            )
    for task in tasks:
        least_tokens = task.min_length_tokens(facts.tokenizer)
        for length_tokens in config.lengths_tokens:
            if length_tokens < least_tokens:
                raise UsageError(
                    f"Length {length_tokens:,} is too short for task {task.name!r}: it needs at least "
                    f"{least_tokens:,} tokens."
                )
    if not tasks or config.synthetic_kv:
        least_tokens = config.footprint_decode_tokens + 2
        for length_tokens in (*config.footprint_cells_tokens, *(config.lengths_tokens if config.throughput else ())):
            if length_tokens < least_tokens:
                raise UsageError(
                    f"Length {length_tokens:,} is too short for {config.footprint_decode_tokens} decode steps: it "
                    f"needs at least {least_tokens:,} tokens."
                )
        return
    # The footprint prompt is the first task's, with decode_tokens of room instead of the task's own.
    least_tokens = (
        tasks[0].min_length_tokens(facts.tokenizer) - tasks[0].max_new_tokens + config.footprint_decode_tokens
    )
    for length_tokens in config.footprint_cells_tokens:
        if length_tokens < least_tokens:
            raise UsageError(
                f"Footprint length {length_tokens:,} is too short for a prompt of {tasks[0].name!r} and "
                f"{config.footprint_decode_tokens} decode steps: it needs at least {least_tokens:,} tokens."
            )


def plan_cell(
    method: "CacheMethod[Any]",
    length_tokens: int,
    *,
    config: RunConfig,
    facts: ModelFacts,
    rooms: Mapping[str, tuple[int | None, str]],
) -> PlannedCell:
    """Forecast one (method, length): predicted bytes, and whether they fit.

    Args:
        rooms: device -> (free bytes, its name), as ``free_device_bytes`` returns; the computing device and ``cpu``.
    """
    reasons = method.unsupported(facts.shape, facts.device)
    if reasons:
        return PlannedCell(
            method_label=method.label, length_tokens=length_tokens, forecast="unsupported", reason="; ".join(reasons)
        )
    decode_tokens = min(config.footprint_decode_tokens, length_tokens - 1)
    # As the footprint pass will find it: all tokens but the last prefilled, that one the first of the steps.
    predicted = method.predict(facts.shape, length_tokens - decode_tokens - 1, decode_tokens)
    forecast: Forecast = "unknown"
    reason = None
    mirror = method.saving_kind == "offloaded"
    needs = needed_bytes_by_device(predicted, length_tokens, config=config, facts=facts, mirror=mirror)
    for device, needed_bytes in needs.items():
        free_bytes, where = rooms[device]
        if free_bytes is None:
            continue
        if needed_bytes > free_bytes:
            forecast = "oom"
            reason = f"needs about {format_bytes(needed_bytes)} of {where}, {format_bytes(free_bytes)} is free"
            break
        forecast = "fits"
    return PlannedCell(
        method_label=method.label,
        length_tokens=length_tokens,
        predicted_kv_bytes=predicted.kv_bytes,
        predicted_metadata_bytes=predicted.metadata_bytes,
        predicted_host_bytes=predicted.host_bytes,
        forecast=forecast,
        reason=reason,
    )


def needed_bytes_by_device(
    predicted: "Footprint", length_tokens: int, *, config: RunConfig, facts: ModelFacts, mirror: bool
) -> dict[str, int]:
    """Estimate the peak bytes of a cell by device: where it computes, and the host that holds the prompt's pages.

    Args:
        mirror: whether the method recalls from the host: a synthetic prompt is smaller without.
    """
    if facts.weights_bytes is None:
        return {}
    pages_bytes = facts.shape.dense_kv_bytes(length_tokens)
    prefill_bytes = facts.prefill_peak_bytes(length_tokens, chunk_tokens=config.prefill_chunk_tokens)
    if config.synthetic_kv and not config.tasks:
        pages_bytes = pages_bytes if mirror else pages_bytes // max(1, len(facts.shape.layers))
        prefill_bytes = 0
    own_bytes = facts.weights_bytes + max(prefill_bytes, predicted.device_bytes)
    if facts.device == "cpu":
        return {"cpu": own_bytes + pages_bytes}
    return {facts.device: CONTEXT_BYTES + own_bytes, "cpu": pages_bytes}


def _columns(header: Sequence[str]) -> tuple[str, ...]:
    return ("left", *("right" for _ in header[1:]))


def _mib(value_bytes: int | None) -> str:
    return "unsupported" if value_bytes is None else f"{value_bytes / 1024**2:,.2f}"


def _kv_text(cell: PlannedCell) -> str:
    if cell.predicted_kv_bytes is None:
        return "unsupported"
    text = _mib(cell.predicted_kv_bytes + (cell.predicted_metadata_bytes or 0))
    return f"{text} OOM" if cell.forecast == "oom" else text


def _lengths(lengths_tokens: Sequence[int]) -> str:
    return ", ".join(format_length(n) for n in lengths_tokens) + " tokens"
