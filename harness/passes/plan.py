"""What a run will do, before it does any of it: cells, predicted bytes, forecasts, tokens to prefill.

Making a plan is also how a run is checked: names, options, lengths against the model and the tasks. It reads
configuration and tokenizer files, never weights.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError, shown
from kvscope.harness.passes.accuracy import AccuracyPass
from kvscope.harness.passes.base import Pass
from kvscope.harness.passes.batch_plan import plan_batch
from kvscope.harness.passes.budget_check import check_budgets, noop_notes
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.contract import check_methods
from kvscope.harness.passes.facts import ModelFacts, PromptFacts, describe_model
from kvscope.harness.passes.find_max import FindMaxPass
from kvscope.harness.passes.footprint import FootprintPass
from kvscope.harness.passes.forecast import device_rooms, plan_cell
from kvscope.harness.passes.pooling import excluded_types
from kvscope.harness.passes.ray_pool import check_installed
from kvscope.harness.passes.run_plan import Plan, RunPlan
from kvscope.harness.passes.served_facts import describe_served
from kvscope.harness.passes.served_pass import ServedPass
from kvscope.harness.passes.served_plan import ServedMethod, ServedPlan
from kvscope.harness.passes.server_memory import check_pid
from kvscope.harness.passes.target import Target, check_target
from kvscope.harness.passes.target_plan import plan_target
from kvscope.harness.passes.task_names import row_names
from kvscope.harness.passes.throughput_pass import ThroughputPass
from kvscope.paths import check_out, user_path
from kvscope.results.limits import MOST_NAME_CHARS

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod
    from kvscope.tasks.base import Task


def make_plan(config: RunConfig, target: Target | None = None) -> RunPlan:
    """Check a configuration and forecast every (method, length); of a served model there is nothing to forecast.

    Args:
        target: another machine that is planned for; None: this one.

    Raises:
        UsageError: an unknown method, task, model or option; a trained part of a method that is missing or belongs to
            another model; a length too long for the model or too short for a task; a budget too small for a prompt;
            results in a place that is none; no server that can be used.
    """
    if config.out is not None:
        check_out(user_path(config.out, what="out"))
    if target is not None:
        check_target(config)
    return _served_plan(config) if config.served else _own_plan(config, target)


def _served_plan(config: RunConfig) -> ServedPlan:
    """Return the plan of a model behind a server."""
    method = ServedMethod()
    check_lengths_of_names([method.label, *config.task_labels, config.model])
    tasks, names = planned_tasks(config)
    if config.server_pid is not None:
        check_pid(config.server_pid)
    facts = describe_served(config)
    check_lengths_of_names([facts.name])
    accuracy = ServedPass()
    check_longest(config, facts, accuracy.lengths_tokens(config))
    accuracy.check(config, facts, tasks)
    return ServedPlan(
        config=config,
        facts=facts,
        methods=(method,),
        tasks=tasks,
        passes=(accuracy,),
        cells=(),
        task_names=names,
    )


def planned_tasks(config: RunConfig) -> "tuple[tuple[Task, ...], tuple[str, ...]]":
    """Return (the tasks of a run, what rows call each).

    Raises:
        UsageError: a task is unknown, has fewer samples than asked for, or cannot be told from another.
    """
    from kvscope.tasks.registry import create_task

    tasks = []
    for spec in config.tasks:
        task = create_task(spec)
        if config.max_new_tokens is not None:
            task.max_new_tokens = config.max_new_tokens
        tasks.append(task)
    names = row_names(config.tasks, tasks)
    check_tasks(tasks, config.samples, names=names)
    return tuple(tasks), names


def _own_plan(config: RunConfig, target: Target | None) -> Plan:
    """Return the plan of a model that kvscope runs itself."""
    from kvscope.harness.engine.backend import form_on
    from kvscope.methods.registry import check_one_class_a_name, create_method

    if config.executor == "ray":
        check_installed()
    methods = tuple(create_method(spec, paper_settings=config.paper_settings) for spec in config.methods)
    check_one_class_a_name(list(methods))
    check_unique([method.label for method in methods])
    check_lengths_of_names([*(method.label for method in methods), *config.task_labels, config.model])
    specs = {method.label: spec for method, spec in zip(methods, config.methods, strict=True)}
    tasks, names = planned_tasks(config)
    facts = describe_model(
        config.model,
        device=config.first_device,
        dtype=config.dtype,
        page_tokens=config.page_tokens,
        chat_template=config.chat_template,
        elsewhere=target is not None,
        device_map=None if config.device_map == "none" else config.device_map,
    )
    check_synthetic(config, facts)
    methods = tuple(form_on(facts.backend, method, facts.shape) for method in methods)
    for method in methods:
        method.require(facts.shape)
    check_rehearsals(config, methods)
    passes = passes_of(config)
    lengths = sorted({length for each in passes for length in each.lengths_tokens(config)})
    check_longest(config, facts, lengths)
    for each in passes:
        each.check(config, facts, tasks)
    check_methods(methods, facts.shape, facts.device, lengths_tokens=[max(0, length - 2) for length in lengths])
    check_budgets(config, facts, methods, tasks)
    rooms = device_rooms(config, facts, target)
    cells = [
        plan_cell(method, length_tokens, config=config, facts=facts, rooms=rooms)
        for method in methods
        for length_tokens in lengths
    ]
    excluded = [
        each.model_copy(update={"task": name})
        for task, name in zip(tasks, names, strict=True)
        for each in excluded_types(config.model)
        if each.task == task.name and each.question_type in task.question_types
    ]
    return Plan(
        config=config,
        facts=facts,
        methods=methods,
        tasks=tasks,
        passes=passes,
        cells=tuple(cells),
        specs=specs,
        excluded_types=tuple(excluded),
        task_names=names,
        notes=noop_notes(config, facts, methods, tasks),
        batch=plan_batch(config, facts, methods, tasks, target=target),
        elsewhere=None
        if target is None
        else plan_target(target, methods, lengths, config=config, facts=facts, rooms=rooms),
    )


def passes_of(config: RunConfig) -> tuple[Pass, ...]:
    """Return the passes that a configuration asks for."""
    return passes_for(find_max=config.find_max, throughput=config.throughput)


def passes_for(*, find_max: bool, throughput: bool) -> tuple[Pass, ...]:
    """Return the passes of a run: a search is one alone."""
    if find_max:
        return (FindMaxPass(),)
    if throughput:
        return (ThroughputPass(),)
    return AccuracyPass(), FootprintPass()


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


def check_rehearsals(config: RunConfig, methods: "Sequence[CacheMethod[Any]]") -> None:
    """Refuse to measure memory and times of methods that decode twice: what they know costs more than what they keep.

    Raises:
        UsageError: naming the method.
    """
    if not (config.footprint_cells_tokens or config.unscored):
        return
    advice = "this run scores none, so leave it out" if config.unscored else "ask for it with --no-footprint"
    for method in methods:
        if method.rehearsal() is not None:
            raise UsageError(f"Method {method.label!r} decodes twice and only its answers mean something: {advice}.")


def check_unique(labels: Sequence[str]) -> None:
    """Refuse two methods that are the same once defaults are filled in: rows are told apart by the label.

    Raises:
        UsageError: naming the method.
    """
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"Method {label!r} is asked for twice (options equal to the defaults count): keep one.")


def check_lengths_of_names(names: Sequence[str]) -> None:
    """Refuse names that rows could not carry.

    Raises:
        UsageError: naming it and the limit.
    """
    for name in names:
        if len(name) > MOST_NAME_CHARS:
            raise UsageError(
                f"{shown(name)} has {len(name):,} characters, and rows hold names of {MOST_NAME_CHARS:,} at most: give "
                "it a shorter path or fewer options."
            )


def check_tasks(tasks: "Sequence[Task]", samples: int, *, names: Sequence[str]) -> None:
    """Refuse two tasks that rows could not tell apart, and more samples than a task has.

    Raises:
        UsageError: naming the task.
    """
    from kvscope.tasks.registry import check_samples

    for task, name in zip(tasks, names, strict=True):
        if names.count(name) > 1:
            raise UsageError(f"Two tasks are called {name!r}, so rows could not be told apart: give one a label=.")
        check_samples(task, samples)


def check_longest(config: RunConfig, facts: PromptFacts, lengths_tokens: Sequence[int]) -> None:
    """Refuse lengths that the model cannot take.

    Raises:
        UsageError: naming the length, the limit and the model.
    """
    for length_tokens in lengths_tokens:
        if length_tokens > facts.max_length_tokens:
            raise UsageError(
                f"Length {length_tokens:,} is over the {facts.max_length_tokens:,} tokens that model "
                f"{config.model!r} takes: use shorter lengths or another model."
            )
