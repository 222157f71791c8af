"""What a run folder keeps of a plan: what its rows have in common, and what measured them."""

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

import kvscope
from kvscope.errors import UsageError
from kvscope.harness.passes.environment import capture_environment, torch_state
from kvscope.harness.passes.run_plan import Plan, RunPlan
from kvscope.harness.passes.served_plan import ServedPlan
from kvscope.harness.passes.task_names import recorded_task
from kvscope.results.rowfile import first_problem
from kvscope.results.run_schema import MethodInfo, RunInfo


def run_info(plan: RunPlan) -> RunInfo:
    """Return what ``run.json`` says: the configuration, the plan, and where it runs.

    Raises:
        UsageError: a file of the model cannot be read, or the run is more than a folder can hold.
    """
    config, facts = plan.config, plan.facts
    environment = surroundings(plan)
    measured: dict[str, Any] = {"tasks": (), "lengths_tokens": (), "samples": 0}
    for each in plan.passes:
        measured |= each.info(plan)
    try:
        return RunInfo(
            kvscope_version=kvscope.__version__,
            started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=environment["commit"],
            dirty=environment["dirty"],
            model=facts.name,
            model_revision=facts.revision,
            methods=tuple(MethodInfo(**method.describe()) for method in plan.methods),
            seed=config.seed,
            config=config.model_dump(mode="json", exclude={"out"}),
            identity=identity(plan),
            environment=environment,
            plan=plan.cells,
            excluded_types=plan.excluded_types,
            **measured,
        )
    except ValidationError as error:
        raise UsageError(f"This run could not be read afterwards: {first_problem(error)}.") from error


def surroundings(plan: RunPlan) -> dict[str, Any]:
    """Return where a plan is run: this machine, and what was found of a server."""
    if isinstance(plan, ServedPlan):
        return plan.environment()
    assert isinstance(plan, Plan)
    facts = plan.facts
    found = capture_environment(device=facts.device, attention_backend=planned_backend(plan))
    if facts.device_map is not None:
        gpus = Counter(torch_state(device)["gpu"] for device in facts.devices)
        named = " and ".join(f"{n} x {name}" for name, n in gpus.items() if name is not None)
        found |= {"device": facts.placement, "gpu": named or None}
    return found


def identity(plan: RunPlan) -> dict[str, Any]:
    """Return what rows of one folder have in common: the configuration, and the model part by part.

    Raises:
        UsageError: a file of the model cannot be read.
    """
    if isinstance(plan, ServedPlan):
        return plan.identity()
    assert isinstance(plan, Plan)
    from kvscope.harness.engine.identity import model_parts
    from kvscope.harness.engine.loading import load_config
    from kvscope.harness.engine.names import resolve_model

    facts = plan.facts
    where, _ = resolve_model(facts.spec)
    trained = {method.label: method.trained_part(facts.shape) for method in plan.methods}
    values = _earlier_identity(plan)
    del values["model_revision"]  # of samples of the weights
    return {
        **values,
        "model": model_parts(facts.spec, where, load_config(facts.spec), facts.tokenizer),
        "trained_parts": {label: part for label, part in trained.items() if part is not None},
    }


def earlier_identity(plan: RunPlan) -> dict[str, Any] | None:
    """Return the identity that versions to 0.2 gave a run; None for one that they did not have."""
    return _earlier_identity(plan) if isinstance(plan, Plan) else None


def _earlier_identity(plan: Plan) -> dict[str, Any]:
    """Return the identity that versions to 0.2 gave a run.

    Its values are resolved, so that ``auto`` on another machine does not continue this machine's rows.
    """
    config, facts = plan.config, plan.facts
    chat = {} if facts.chat_template is None else {"chat_template": facts.chat_template}  # earlier folders have none
    return {
        **config.identity(),
        **chat,
        "methods": [method.label for method in plan.methods],
        "tasks": [recorded_task(spec, task) for spec, task in zip(config.tasks, plan.tasks, strict=True)],
        "device": facts.placement,
        "dtype": facts.dtype,
        "prefill_chunk_tokens": plan.chunk_tokens,
        "model_revision": facts.revision,
    }


def planned_backend(plan: Plan) -> str | None:
    """Name what will compute attention; None where only the loaded model can tell."""
    import torch

    from kvscope.harness.engine.devices import resolve_dtype

    facts, device = plan.facts, torch.device(plan.facts.device)
    return facts.backend.attention_text(facts.shape, device, resolve_dtype(facts.dtype, device))
