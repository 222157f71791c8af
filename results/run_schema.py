"""What `run.json` says of a run: its methods, plan, parts, calls and surroundings, version 1."""

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from kvscope.results import limits
from kvscope.results.schema import (
    Count,
    Forecast,
    Length,
    Lengths,
    Name,
    Positive,
    Record,
    RowSavingKind,
    Seed,
    Tasks,
    Text,
)


class MethodInfo(Record):
    """One method of the run in words, so that a report needs nothing but the run folder."""

    label: Name
    """The method with its options; equals `method_label` of its rows."""
    name: Name
    """Registry name."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """The options as asked for."""
    stays: Text
    """What stays on the GPU, one clause."""
    saves: Text
    """What it saves and what it does not, one clause."""
    source: Text
    """Citation."""
    saving_kind: RowSavingKind
    """Where the rest goes: `resident`, `freed` or `offloaded`; `unknown` of a server."""
    cost: str = ""
    """The method's byte formula as text."""


class PlannedCell(Record):
    """What the plan said of one (method, length) before anything ran."""

    method_label: Name
    """The method with its options."""
    length_tokens: Length
    """Length asked for."""
    predicted_kv_bytes: Count | None = None
    """Predicted device bytes of keys and values; null when the forecast is `unsupported`."""
    predicted_metadata_bytes: Count | None = None
    """Predicted device bytes of metadata."""
    predicted_host_bytes: Count | None = None
    """Predicted host bytes."""
    forecast: Forecast = "unknown"
    """Whether the cell was expected to fit this machine."""
    reason: Text | None = None
    """Why not, where the forecast is `oom` or `unsupported`."""


class Resumption(Record):
    """The surroundings of a later start on the same folder, noted when they differ from the start before."""

    started_utc: Text
    """ISO 8601 time of the later start."""
    kvscope_version: Text
    """Version of kvscope then."""
    commit: str | None = None
    """Commit of the checkout then; null outside a checkout."""
    dirty: bool | None = None
    """Whether that checkout had uncommitted changes."""
    environment: dict[str, JsonValue]
    """Environment then."""


class ExcludedType(Record):
    """A kind of question that the dense model cannot do, so that pooled scores leave it out, by name."""

    task: Name
    """Task of the question type."""
    question_type: Name
    """The question type."""
    dense_percent: Annotated[float, Field(ge=0.0, le=100.0)]
    """Accuracy of dense on training seeds, which decided it."""
    n: Positive
    """Prompts behind that."""

    @property
    def sentence(self) -> str:
        """What is left out, and why."""
        return (
            f"{self.question_type} of {self.task} counts in no pooled score: dense answers {self.dense_percent:.0f} % "
            f"of it on training seeds (n={self.n})"
        )


class CutCell(Record):
    """A (task, length) of a part that has fewer prompts than the part was asked for."""

    task: Name
    """Task name."""
    length_tokens: Length
    """Length."""
    samples: Count
    """Prompts that are there, each with a row of every method."""
    reason: Text
    """Why the others are not."""


class RunPart(Record):
    """One part of a merged run: what was asked for, and what measured it (see `results/merge.py`).

    Parts packed by a kvscope that did not yet keep a record a part have none: that of the whole run is theirs.
    """

    tasks: Tasks
    """Task names."""
    lengths_tokens: Lengths
    """Lengths."""
    samples: Count
    """Prompts per (task, length) asked for, over all seeds. As many are there, but for the cells in `cut`."""
    seeds: tuple[Seed, ...] = ()
    """Seeds whose prompts these are."""
    fewer: Text | None = None
    """Why it was asked for fewer prompts than usual."""
    cut: tuple[CutCell, ...] = ()
    """Cells with fewer prompts than asked for. What was kept was decided by what was complete, never by its score."""
    command: Text | None = None
    """What measures it, once for each of `seeds`."""
    started_utc: Text | None = None
    """ISO 8601 time of the first start."""
    kvscope_version: Text | None = None
    """Version of kvscope then."""
    commit: str | None = None
    """Commit of the checkout that measured it; null outside a checkout."""
    dirty: bool | None = None
    """Whether that checkout had uncommitted changes."""
    environment: dict[str, JsonValue] = Field(default_factory=dict)
    """Environment then."""
    resumptions: tuple[Resumption, ...] = ()
    """Starts of its other seeds, and later ones, whose surroundings differed."""

    def expected_samples(self, task: str, length_tokens: int) -> int:
        """Return how many prompts of a (task, length) this part has; 0 where it is not of this part."""
        if task not in self.tasks or length_tokens not in self.lengths_tokens:
            return 0
        cut = (cell.samples for cell in self.cut if (cell.task, cell.length_tokens) == (task, length_tokens))
        return next(cut, self.samples)

    def holds(self, task: str, length_tokens: int, seed: int) -> bool:
        """Whether a row of this (task, length, seed) is of this part."""
        inside = task in self.tasks and length_tokens in self.lengths_tokens
        return inside and (not self.seeds or seed in self.seeds)


class Call(Record):
    """What one call asked for, of a folder whose calls asked for different things."""

    started_utc: Text
    """ISO 8601 time of the first such call."""
    tasks: Tasks
    """Task names, as rows have them."""
    lengths_tokens: Lengths
    """Lengths of the accuracy pass."""
    samples: Count
    """Prompts per (task, length)."""
    footprint_lengths_tokens: Lengths = ()
    """Lengths of the footprint pass."""
    methods: Annotated[tuple[Name, ...], Field(max_length=limits.MOST_METHODS)]
    """Method labels."""
    config: dict[str, JsonValue]
    """The whole configuration, for the record."""

    def covers(self, other: "Call") -> bool:
        """Whether another call asks for nothing more."""
        return other.samples <= self.samples and all(
            set(getattr(other, name)) <= set(getattr(self, name))
            for name in ("tasks", "lengths_tokens", "footprint_lengths_tokens", "methods")
        )

    def expected_samples(self, task: str, length_tokens: int) -> int:
        """Return how many prompts of a (task, length) it asked for."""
        return self.samples if task in self.tasks and length_tokens in self.lengths_tokens else 0


class RunInfo(Record):
    """`run.json`: what was asked, and where it ran.

    Written before the first row, when the model has loaded, and again when a later call asks for more.
    """

    schema_version: Literal[1] = 1
    """Version of this schema."""
    kvscope_version: Text
    """Version of kvscope that started the run."""
    started_utc: Text
    """ISO 8601 time of the first start."""
    commit: str | None = None
    """Commit of the kvscope checkout; null outside a checkout."""
    dirty: bool | None = None
    """Whether that checkout had uncommitted changes; null outside a checkout."""
    model: Name
    """The model as asked for."""
    model_revision: str | None = None
    """Commit or hash of the weights, where known."""
    tasks: Tasks
    """Task names asked for."""
    lengths_tokens: Lengths
    """Lengths of the accuracy pass."""
    samples: Count
    """Prompts per (task, length)."""
    footprint_lengths_tokens: Lengths = ()
    """Lengths of the footprint pass; empty when it was not asked for."""
    methods: Annotated[tuple[MethodInfo, ...], Field(min_length=1, max_length=limits.MOST_METHODS)]
    """The methods in the order asked for."""
    seed: Seed = 0
    """Seed of the run."""
    config: dict[str, JsonValue]
    """The whole configuration, for the record."""
    identity: dict[str, JsonValue]
    """The part of the configuration that decides the rows: the folder is resumed only by an equal one."""
    environment: dict[str, JsonValue]
    """Versions, GPU, driver, CPU, attention backend. No host name, user name or absolute path."""
    plan: Annotated[tuple[PlannedCell, ...], Field(max_length=limits.MOST_CELLS)] = ()
    """Predicted bytes per (method, length)."""
    excluded_types: tuple[ExcludedType, ...] = ()
    """Question types that pooled scores leave out, as the model's folder names them (see `passes/pooling.py`). Rows are
    measured and written all the same."""
    resumptions: tuple[Resumption, ...] = ()
    """Later starts whose surroundings differed."""
    calls: tuple[Call, ...] = ()
    """What each call asked for, where a later one asked for more; the fields above then hold all of it. Empty where all
    asked for the same."""
    parts: tuple[RunPart, ...] = ()
    """Of a run merged from several: what each part was asked for and what measured it. Empty for any other, where every
    (task, length) has `samples` prompts."""

    @property
    def served(self) -> bool:
        """Whether a server answered, whose cache nobody measures."""
        return all(method.saving_kind == "unknown" for method in self.methods)

    def expected_samples(self, task: str, length_tokens: int) -> int:
        """Return how many prompts of a (task, length) were asked for."""
        if self.calls and not self.parts:
            return max(call.expected_samples(task, length_tokens) for call in self.calls)
        parts = self.parts or (RunPart(tasks=self.tasks, lengths_tokens=self.lengths_tokens, samples=self.samples),)
        return sum(part.expected_samples(task, length_tokens) for part in parts)

    def asks_footprint(self, method_label: str, length_tokens: int) -> bool:
        """Whether a footprint was asked for: later calls of a folder may measure some of its methods alone."""
        if not self.calls:
            return length_tokens in self.footprint_lengths_tokens
        return any(
            method_label in call.methods and length_tokens in call.footprint_lengths_tokens for call in self.calls
        )

    @model_validator(mode="after")
    def _cells_can_be_told_apart(self) -> Self:
        counts = Counter(method.label for method in self.methods)
        twice = sorted(label for label, count in counts.items() if count > 1)
        if twice:
            raise ValueError(f"two methods share the label {', '.join(twice)}: rows could not be told apart")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("a task stands there twice: rows could not be told apart")
        cells = len(self.methods) * max(1, len(self.tasks)) * max(1, len(self.lengths_tokens))
        if cells > limits.MOST_CELLS:
            raise ValueError(f"{cells:,} cells (methods x tasks x lengths), at most {limits.MOST_CELLS:,} are possible")
        return self

    def pools(self, task: str, question_type: str) -> bool:
        """Whether rows of this kind of question count in pooled scores."""
        return all((each.task, each.question_type) != (task, question_type) for each in self.excluded_types)
