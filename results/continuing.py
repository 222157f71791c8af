"""A run folder that is continued: what must be equal, what may grow, and what run.json says afterwards.

What a call asks for may differ from what the folder was begun with: the folder then holds both. What decides a row's
values must be equal, or rows of two kinds would stand side by side under one name.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvscope.errors import UsageError
from kvscope.results.rowfile import first_problem
from kvscope.results.run_schema import Call, PlannedCell, Resumption, RunInfo

GROWING_LISTS = ("methods", "tasks", "lengths_tokens", "footprint_lengths_tokens")
"""Keys of an identity whose lists become what all calls asked for: each entry has rows of its own."""
GROWING = (*GROWING_LISTS, "samples", "footprint", "trained_parts")
"""Keys that may differ. Every other key decides values of rows that are there already: the model and its parts, device
and dtype; seed, task data, max_new_tokens and method_from (the prompts and where the method begins); answer_nll and
paper_settings; page_tokens and prefill_chunk_tokens (bytes, and rounding); what kind of memory run it is, its KV,
budget, decode steps and graphs, and where its searches stop."""
SAMPLED_GAPS = "its tokenizer, EOS ids, chat template, trained indexers and every byte of its weights"


def continued(
    folder: Path, stored: RunInfo, asked: RunInfo, *, earlier_identity: Mapping[str, Any] | None = None
) -> tuple[RunInfo, list[str]]:
    """Return (what run.json says from now on, what the user should hear).

    Args:
        earlier_identity: the identity that versions to 0.2 would have given what is asked for.

    Raises:
        UsageError: the folder holds another run; each key that differs is named with both values.
    """
    messages = []
    identity = plain(asked.identity)
    if earlier_identity is not None and is_earlier(stored.identity):
        identity = plain(earlier_identity)
        messages.append(
            f"{folder} was begun by kvscope {stored.kvscope_version} and keeps the identity it was written with, which "
            f"cannot tell {SAMPLED_GAPS}."
        )
    if asked.config.get("prefill_chunk_tokens", 0) is None and "prefill_chunk_tokens" in stored.identity:
        identity = {**identity, "prefill_chunk_tokens": stored.identity["prefill_chunk_tokens"]}  # not asked for
    asked = _renamed(asked, stored, folder=folder)
    differences = fixed_differences(stored.identity, identity)
    if "chat_template" in identity and "chat_template" not in stored.identity:
        raise UsageError(
            f"The prompts of {folder} have no chat template, and this model has one: add --chat-template none to go on "
            "with them, or give --out another folder."
        )
    if differences:
        raise UsageError(
            f"{folder} holds another configuration; it differs in: {'; '.join(differences)}. "
            "Give --out another folder, or ask for the same configuration to resume."
        )
    if asked.samples < stored.samples and asked.tasks:
        messages.append(
            f"{folder} holds up to {stored.samples} samples of a task and length, {asked.samples} are asked for: "
            "nothing is lost."
        )
    if excludes_otherwise(stored, asked):
        messages.append(
            f"The model's list of excluded question types has changed: {folder} goes on pooling as it began."
        )
    return _noted(_readable(_joined(stored, asked, identity), folder), asked), messages


def is_earlier(identity: Mapping[str, Any]) -> bool:
    """Whether an identity is of a version that read samples of the weights: it names the model by its spelling."""
    return isinstance(identity.get("model"), str)


def fixed_differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Name what differs and must not, with both values."""
    left, right = ({key: value for key, value in each.items() if key not in GROWING} for each in (stored, asked))
    if is_earlier(stored) and str(stored.get("model_revision", "")).startswith("sha256:"):
        left.pop("model")  # a folder's spelling: its revision tells it
        right.pop("model", None)
    lines = identity_differences(left, right)
    there = {base: label for label in stored.get("tasks", ()) for base in [without_hash(label)]}
    for label in asked.get("tasks", ()):
        other = there.get(without_hash(label), label)
        if other != label and "sha256=" in other and "sha256=" in label:
            lines.append(f"tasks (there: {other}, asked: {label})")
    parts = stored.get("trained_parts", {})
    mine = asked.get("trained_parts", {})
    shared = parts.keys() & mine.keys()
    lines += identity_differences(
        {"trained_parts": {key: parts[key] for key in shared}}, {"trained_parts": {key: mine[key] for key in shared}}
    )
    return lines


def excludes_otherwise(stored: RunInfo, asked: RunInfo) -> bool:
    """Whether, of tasks that both have, one leaves question types out of pooled scores that the other does not."""
    shared = set(stored.tasks) & set(asked.tasks)
    there, here = (
        {(each.task, each.question_type) for each in info.excluded_types if each.task in shared}
        for info in (stored, asked)
    )
    return there != here


def recorded_tasks(info: RunInfo) -> list[str]:
    """Return the tasks of a run with options and hashes of their data, in the order of ``info.tasks``."""
    found = info.identity.get("tasks")
    return [str(label) for label in found] if isinstance(found, list) else []


def without_hash(label: str) -> str:
    """Return a recorded task without the hash of its data."""
    name, colon, options = label.partition(":")
    kept = [item for item in options.split(",") if not item.startswith("sha256=")]
    return f"{name}{colon}{','.join(kept)}" if kept else name


def _renamed(asked: RunInfo, stored: RunInfo, *, folder: Path) -> RunInfo:
    """Return what is asked for with its tasks called as in the folder, and new ones so that rows can be told apart."""
    there = dict(zip(map(without_hash, recorded_tasks(stored)), stored.tasks, strict=False))
    names = {}
    for label, name in zip(map(without_hash, recorded_tasks(asked)), asked.tasks, strict=True):
        taken = there.values()
        names[name] = there.get(label) or (name if name not in taken else label)
        if label not in there and names[name] in taken:
            raise UsageError(f"{folder} holds another task that its rows call {name!r}. Give --out another folder.")
    excluded = [each.model_copy(update={"task": names.get(each.task, each.task)}) for each in asked.excluded_types]
    return asked.model_copy(update={"tasks": tuple(names.values()), "excluded_types": tuple(excluded)})


def _joined(stored: RunInfo, asked: RunInfo, identity: Mapping[str, Any]) -> RunInfo:
    """Return the stored info with what is new in what is asked for."""
    first, now = _call(stored, stored.started_utc), _call(asked, asked.started_utc)
    calls = stored.calls or (first,)
    plan = _plan(stored.plan, asked.plan)
    if any(call.covers(now) for call in calls):
        return stored.model_copy(update={"plan": plan})
    tasks = _union(stored.tasks, asked.tasks)
    labels = {method.label for method in stored.methods}
    return stored.model_copy(
        update={
            "tasks": tasks,
            "lengths_tokens": tuple(sorted({*stored.lengths_tokens, *asked.lengths_tokens})),
            "samples": max(stored.samples, asked.samples),
            "footprint_lengths_tokens": tuple(
                sorted({*stored.footprint_lengths_tokens, *asked.footprint_lengths_tokens})
            ),
            "methods": (*stored.methods, *(each for each in asked.methods if each.label not in labels)),
            "excluded_types": (
                *stored.excluded_types,
                *(each for each in asked.excluded_types if each.task not in stored.tasks),
            ),
            "plan": plan,
            "identity": _joined_identity(stored.identity, identity),
            "calls": (*calls, now),
        }
    )


def _readable(info: RunInfo, folder: Path) -> RunInfo:
    """Return the info, after checking that it can be read again."""
    try:
        return RunInfo.model_validate_json(info.model_dump_json())
    except ValidationError as error:
        raise UsageError(
            f"{folder} would hold more than one run can: {first_problem(error)}. Give --out another folder."
        ) from error


def _joined_identity(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    known = {without_hash(label) for label in stored.get("tasks", ())}
    new_tasks = [label for label in asked.get("tasks", ()) if without_hash(label) not in known]
    joined = {**stored, "tasks": [*stored.get("tasks", ()), *new_tasks]}
    joined["methods"] = _union(stored.get("methods", ()), asked.get("methods", ()))
    for key in ("lengths_tokens", "footprint_lengths_tokens"):
        joined[key] = sorted({*stored.get(key, ()), *asked.get(key, ())})
    joined["samples"] = max(stored.get("samples", 0), asked.get("samples", 0))
    joined["footprint"] = bool(stored.get("footprint")) or bool(asked.get("footprint"))
    if "trained_parts" in stored:
        joined["trained_parts"] = {**stored["trained_parts"], **asked.get("trained_parts", {})}
    return plain(joined)


def _plan(stored: Sequence[PlannedCell], asked: Sequence[PlannedCell]) -> tuple[PlannedCell, ...]:
    """Keep what was said first, but for cells that were unsupported."""
    here = {(cell.method_label, cell.length_tokens): cell for cell in asked}
    cells = {(cell.method_label, cell.length_tokens): cell for cell in stored}
    cells |= {key: cell for key, cell in here.items() if key not in cells or cells[key].forecast == "unsupported"}
    return tuple(cells.values())


def _call(info: RunInfo, started_utc: str) -> Call:
    return Call(
        started_utc=started_utc,
        tasks=info.tasks,
        lengths_tokens=info.lengths_tokens,
        samples=info.samples,
        footprint_lengths_tokens=info.footprint_lengths_tokens,
        methods=tuple(method.label for method in info.methods),
        config=info.config,
    )


def _noted(info: RunInfo, asked: RunInfo) -> RunInfo:
    """Return the info with the surroundings of this start, where they are not those of the start before."""
    last = info.resumptions[-1] if info.resumptions else info
    now = (asked.kvscope_version, asked.commit, asked.dirty, asked.environment)
    if now == (last.kvscope_version, last.commit, last.dirty, last.environment):
        return info
    note = Resumption(
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        kvscope_version=asked.kvscope_version,
        commit=asked.commit,
        dirty=asked.dirty,
        environment=asked.environment,
    )
    return info.model_copy(update={"resumptions": (*info.resumptions, note)})


def identity_differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Name every key whose value differs, with both values; nested keys are joined by dots."""
    return [
        f"{key} (there: {old}, asked: {new})" for key, old, new in differing_values(stored, asked, absent="(absent)")
    ]


def differing_values(
    left: Mapping[str, Any], right: Mapping[str, Any], *, absent: str = "-"
) -> list[tuple[str, str, str]]:
    """Return every key whose value differs, with both as JSON; nested keys are joined by dots."""
    first, second = _flatten(left), _flatten(right)
    keys = sorted(first.keys() | second.keys())
    both = [(key, first.get(key, absent), second.get(key, absent)) for key in keys]
    return [(key, old, new) for key, old, new in both if old != new]


def plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as it reads back from run.json."""
    values: dict[str, Any] = json.loads(json.dumps(identity))
    return values


def _union(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping) and inner:
            flat.update(_flatten(inner, f"{name}."))
        else:
            flat[name] = json.dumps(inner, sort_keys=True)
    return flat
