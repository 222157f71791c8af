"""A run's plan: the checked configuration, what its passes will measure, and what is forecast of each cell."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, Self

from kvscope.harness.passes.base import Pass
from kvscope.harness.passes.batch_plan import BatchCell, prompts_of
from kvscope.harness.passes.chunks import accuracy_chunk_tokens
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.facts import ModelFacts, PromptFacts
from kvscope.harness.passes.plan_text import forecast_tables, lengths_text
from kvscope.methods.indexer_files import prompts_text
from kvscope.results.continuing import recorded_tasks, without_hash
from kvscope.results.run_schema import ExcludedType, PlannedCell, RunInfo
from kvscope.specs import Spec
from kvscope.terminal import folded
from kvscope.units import format_bytes, format_length

if TYPE_CHECKING:
    from kvscope.harness.passes.target_plan import TargetPlan
    from kvscope.methods.base import CacheMethod
    from kvscope.tasks.base import Task


class PlannedMethod(Protocol):
    """What rows and ``run.json`` need of a method."""

    @property
    def name(self) -> str:
        """Its registry name."""

    @property
    def label(self) -> str:
        """The name with options, unique within a run."""

    def describe(self) -> dict[str, Any]:
        """Return the fields of its ``MethodInfo``."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A checked configuration with its prompts, whoever answers them."""

    config: RunConfig
    facts: PromptFacts
    methods: Sequence[PlannedMethod]
    tasks: "tuple[Task, ...]"
    passes: tuple[Pass, ...]
    cells: tuple[PlannedCell, ...]
    excluded_types: tuple[ExcludedType, ...] = ()
    """Question types of these tasks that pooled scores leave out, as the model's folder says."""
    task_names: tuple[str, ...] = ()
    """What rows call each task."""

    def in_folder(self, info: RunInfo) -> Self:
        """Return the plan as a folder has it, which may have been begun by a call that asked for other things.

        Rows call the model and its tasks what the first call did.
        """
        named = dict(zip(map(without_hash, recorded_tasks(info)), info.tasks, strict=True))
        return replace(
            self,
            facts=replace(self.facts, name=info.model),
            task_names=tuple(named[without_hash(spec.label)] for spec in self.config.tasks),
        )

    @cached_property
    def _by_key(self) -> dict[tuple[str, int], PlannedCell]:
        return {(cell.method_label, cell.length_tokens): cell for cell in self.cells}

    def unsupported(self, method_label: str, length_tokens: int) -> str | None:
        """Return why a method cannot run at a length, or None."""
        cell = self._by_key.get((method_label, length_tokens))
        return cell.reason if cell is not None and cell.forecast == "unsupported" else None

    @property
    def warnings(self) -> list[str]:
        """What the user may not expect, one sentence each."""
        said = [f"{each.sentence}." for each in self.excluded_types]
        if len(self.config.lengths_tokens) > 1:
            said += [
                f"the prompts of {task.name} have the length they have, so they are the same at every --length: give "
                "the longest alone."
                for task in self.tasks
                if task.own_lengths and not task.fills_length
            ]
        return said

    def ready(self) -> Self:
        """Return the plan with what has to be asked before there is a folder; of a model of our own that is nothing."""
        return self

    def text(self, *, width: int | None = None) -> str:
        """Return the plan as plain text, with lines of at most ``width`` columns; None for any."""
        lines = [*self.header()]
        for each in self.passes:
            lines += each.text(self)
        return folded("\n".join([*lines, *(f"note       {text}" for text in self.warnings)]), width)

    def values(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        asked: dict[str, Any] = {}
        for each in self.passes:
            asked |= each.info(self)
        return {
            "model": self.config.model,
            "methods": [method.label for method in self.methods],
            **asked,
            "warnings": self.warnings,
            "config": self.config.model_dump(mode="json", exclude={"out"}),
        }

    def header(self) -> list[str]:
        """Return its first lines: the model, tasks and lengths."""
        return self.prompts_text()

    def prompts_text(self) -> list[str]:
        """Return the plan's lines of tasks and lengths."""
        config = self.config
        return [
            f"tasks    {', '.join(task.name for task in self.tasks)}",
            f"lengths  {lengths_text(config.lengths_tokens)}, {config.samples} samples each, seed {config.seed}",
        ]


@dataclass(frozen=True, kw_only=True)
class Plan(RunPlan):
    """A checked configuration with everything made that a run needs except the model's weights."""

    facts: ModelFacts
    methods: "tuple[CacheMethod[Any], ...]"
    specs: Mapping[str, Spec]
    """Label of a method -> the spec that a fresh process makes it from."""
    batch: tuple[BatchCell, ...] = ()
    """Sequences of the accuracy pass that share a step, by length."""
    folder_chunk_tokens: int | None = None
    """Tokens of a prefill chunk in the folder's answers; None before there is a folder."""
    first_task: str | None = None
    """The task whose prompts the folder's footprints are of, as the folder's first call asked for it; None: the first
    of these."""
    elsewhere: "TargetPlan | None" = None
    """What is forecast of the machine that is planned for; None: it is this one."""
    notes: tuple[str, ...] = ()
    """What is to be said of methods and prompts, one sentence each."""

    def in_folder(self, info: RunInfo) -> Self:
        """Return the plan as a folder has it; its footprints are of the prompts of the task that it was begun with."""
        plan = super().in_folder(info)
        mine = [without_hash(spec.label) for spec in self.config.tasks]
        first = recorded_tasks(info)[:1]
        given, chunk = info.config.get("tasks"), info.identity.get("prefill_chunk_tokens")
        other = bool(first) and bool(mine) and without_hash(first[0]) != mine[0] and isinstance(given, list)
        return replace(
            plan,
            folder_chunk_tokens=int(chunk) if isinstance(chunk, int) else None,
            first_task=str(given[0]) if other and isinstance(given, list) else None,
        )

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a prefill chunk of the accuracy pass: the folder's, where there is one."""
        return self.folder_chunk_tokens or accuracy_chunk_tokens(self.config, self.facts)

    def cell(self, method_label: str, length_tokens: int) -> PlannedCell:
        """Return the forecast of one (method, length)."""
        return self._by_key[method_label, length_tokens]

    def batch_rows(self, length_tokens: int) -> int:
        """Return how many sequences of a length may share a step."""
        return next((cell.rows for cell in self.batch if cell.length_tokens == length_tokens), 1)

    def batch_prompts(self, rows: int) -> int:
        """Return how many prompts may be begun at once, with so many sequences a step."""
        return prompts_of(rows, len(self.methods))

    @property
    def most_batch_rows(self) -> int:
        """Most sequences that may share a step, at any length."""
        return max((cell.rows for cell in self.batch), default=1)

    @property
    def lengths_tokens(self) -> tuple[int, ...]:
        """Every length that has a forecast, ascending."""
        return tuple(sorted({cell.length_tokens for cell in self.cells}))

    @property
    def warnings(self) -> list[str]:
        """What the user may not expect, one sentence each."""
        said = list(self.notes)
        if all(method.label != "dense" for method in self.methods):
            what = "accuracy has" if self.tasks else "bytes and times have"
            said.append(f"dense is not among the methods: {what} nothing to be compared with. Add -m dense.")
        for method in self.methods:
            if method.name == "dense":
                continue
            same = [n for n in self.lengths_tokens if method.is_noop(n, self.facts.shape)]
            if same:
                dense = "dense" if method.kv is None else f"dense:kv={method.kv.name}"
                said.append(
                    f"{method.label} leaves nothing out at {lengths_text(same)}: there it is {dense} by another name."
                )
            learnt, asked = method.trained_prompts(self.facts.shape), prompts_text(self.facts.chat_template)
            if self.tasks and learnt not in (None, asked):
                said.append(
                    f"the indexer of {method.label} was trained on {learnt}, and this run asks {asked}: collect again "
                    "as the run asks, or give the run the --chat-template of the indexer."
                )
        if self.tasks and self.facts.not_applied:
            said.append(
                f"answers are greedy and leave out the model's own {', '.join(self.facts.not_applied)}, which its "
                "generation config asks for and stock generate applies."
            )
        said += super().warnings
        note = self.facts.backend.note(self.facts.shape, max(self.config.lengths_tokens))
        return said if note is None else [*said, note]

    def text(self, *, width: int | None = None) -> str:
        """Return the plan as plain text, with lines of at most ``width`` columns; None for any."""
        lines = self.header()
        if self.cells:
            lines += ["", *forecast_tables([method.label for method in self.methods], self.cells, width=width), ""]
            for n_tokens in self.lengths_tokens:
                running = [each for each in self.methods if self.unsupported(each.label, n_tokens) is None]
                budgeted = [method.at(n_tokens, self.facts.shape) for method in running]
                lines += self.facts.backend.tables(self.facts.shape, budgeted, n_tokens)
        if self.elsewhere is not None:
            lines += [*self.elsewhere.text(width=width), ""]
        for each in self.passes:
            lines += each.text(self)
        if self.cells:  # a search finds its own lengths: there is nothing to forecast, or to note about one
            lines += [
                f"{cell.forecast:<10} {cell.method_label} at {format_length(cell.length_tokens)}: {cell.reason}"
                for cell in self.cells
                if cell.reason
            ]
            lines += [f"note       {text}" for text in self.warnings]
        return folded("\n".join(lines), width)

    def values(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        facts = self.facts
        return {
            **super().values(),
            "device": facts.placement,
            "dtype": facts.dtype,
            "weights_bytes": facts.weights_bytes,
            "kv_bytes_per_token": facts.shape.kv_bytes_per_token,
            "max_length_tokens": facts.max_length_tokens,
            "chat_template": facts.chat_template,
            "cells": [cell.model_dump() for cell in self.cells],
            "batch": [asdict(cell) for cell in self.batch],
            "warnings": self.warnings if self.cells else [],
            **({} if self.elsewhere is None else {"elsewhere": self.elsewhere.values()}),
        }

    def header(self) -> list[str]:
        """Return its first lines: the model, tasks, lengths and the budget."""
        config, facts = self.config, self.facts
        where = facts.placement if self.elsewhere is None else self.elsewhere.target.name
        weights = "unknown size" if facts.weights_bytes is None else format_bytes(facts.weights_bytes)
        lines = [
            f"model    {config.model}: {facts.dtype} on {where}, {weights} of weights, "
            f"{facts.shape.kv_bytes_per_token:,} B of KV a token, at most {facts.max_length_tokens:,} tokens",
        ]
        if self.elsewhere is not None:
            lines += self.elsewhere.target.lines()
        if facts.chat_template is not None:
            lines.append(f"chat     prompts are turns of a user by its chat template, {facts.chat_template[:19]}")
        if self.tasks:
            lines += self.prompts_text()
        else:
            lines.append("tasks    none: nothing is scored in this run, memory and times alone are measured")
        if config.gpu_budget_bytes is not None:
            lines.append(
                f"budget   {format_bytes(config.gpu_budget_bytes)} of device memory a process, weights included"
            )
        return lines
