"""What ``kvscope list`` and ``kvscope show`` say about methods, tasks and models. Reads code and configuration only."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from kvscope.errors import UsageError, did_you_mean
from kvscope.plugins import asking
from kvscope.specs import PLACE_PATTERN
from kvscope.units import format_length
from kvscope.values import type_name, without_none

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod

Kind = Literal["methods", "tasks", "models"]
SHOWN_LENGTHS_TOKENS = (1024, 8192, 32_768, 131_072)
KINDS: tuple[Kind, ...] = ("methods", "tasks", "models")
SECTION = re.compile(r"^(Args|Attributes|Options):$")
ENTRY = re.compile(r"^([\w, ]+):\s+(.*)$")


def entries(kind: str) -> list[dict[str, Any]]:
    """Return one plain mapping per known name of a kind.

    Raises:
        UsageError: no such kind.
    """
    if kind == "methods":
        return [_or_fault(method_entry, name) for name in _method_names()]
    if kind == "tasks":
        return [_or_fault(task_entry, name) for name in _task_names()]
    if kind == "models":
        return [{"name": name, "description": text} for name, text in _models().items()]
    raise UsageError(f"There is nothing to list under {kind!r}.{did_you_mean(kind, KINDS)}")


def _or_fault(entry: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    """Return an entry, or why there is none: one package that is broken does not hide the others."""
    try:
        return entry(name)
    except UsageError as error:
        return {"name": name, "fault": str(error)}


def show_entry(name: str) -> dict[str, Any]:
    """Return the same as plain values: ``kind`` is ``method``, ``task`` or ``model``.

    Raises:
        UsageError: no method, task or model has that name.
    """
    if name in _method_names():
        return {"kind": "method", **method_entry(name)}
    if name in _task_names():
        return {"kind": "task", **task_entry(name)}
    if PLACE_PATTERN.fullmatch(name):
        return _outside_entry(name)
    if name in _models():
        return {"kind": "model", **model_entry(name)}
    known = [*_method_names(), *_task_names(), *_models()]
    near = did_you_mean(name, known)
    hint = near if "Did you mean" in near else " See kvscope list methods, list tasks and list models."
    raise UsageError(f"No method, task or model is named {name!r}.{hint}")


def _outside_entry(name: str) -> dict[str, Any]:
    """Return everything known of a method or task given as ``package.module:Class``."""
    from kvscope import plugins
    from kvscope.tasks.base import Task

    found = plugins.load(plugins.find("method", name, {}))
    if isinstance(found, type) and issubclass(found, Task):
        return {"kind": "task", **task_entry(name)}
    return {"kind": "method", **method_entry(name)}


def method_entry(name: str) -> dict[str, Any]:
    """Return a method's words and options as plain values."""
    from kvscope.methods.registry import method_class

    cls = method_class(name)
    return {
        "name": name,
        "stays": cls.stays,
        "reads": cls.reads,
        "saves": cls.saves,
        "saving_kind": cls.saving_kind,
        "cost": cls.cost,
        "source": cls.source,
        "needs_training": cls.needs_training,
        "through_decode": cls.through_decode,
        "trained_indexers": cls.shipped_indexers(),
        "kv_refusal": cls.kv_refusal,
        "options": method_options(cls),
        "automatic": automatic_values(cls),
    }


def method_options(cls: "type[CacheMethod[Any]]") -> list[dict[str, Any]]:
    """Return name, type, default and meaning of each option of a method."""
    from kvscope.methods.options import SHARED_OPTIONS, field_types

    types = field_types(cls.Config)
    meanings = documented(cls.Config)
    shared = [
        {"name": name, "type": type_text(SHARED_OPTIONS[name]), "default": None, "meaning": SHARED_MEANINGS[name]}
        for name in shared_options(cls)
        if name not in types
    ]
    own = [
        {
            "name": field.name,
            "type": type_text(types[field.name]),
            "default": field.default,
            "meaning": meanings.get(field.name, ""),
        }
        for field in dataclasses.fields(cls.Config)
    ]
    return own + shared


def shared_options(cls: "type[CacheMethod[Any]]") -> list[str]:
    """Return the options of every method that this one takes."""
    from kvscope.methods.options import BUDGETS, KV_OPTION, READ_SHARE_OPTION, SHARE_OPTION

    budgeted = any(field.name in BUDGETS for field in dataclasses.fields(cls.Config))
    share = READ_SHARE_OPTION if cls.saving_kind == "resident" else SHARE_OPTION
    return [*([share] if budgeted else []), *([] if cls.kv_refusal else [KV_OPTION])]


SHARED_MEANINGS = {
    "kv": "format of the store: older tokens in fp8, 8, 4 or 2 bits with scales, the newest 64 to 128 as they are; "
    "none: the model's dtype (docs/quantised-kv.md)",
    "share": "budget as a share of dense's bytes on the device, metadata included: the nearest that pages allow",
    "read_share": "budget as a share of the bytes that a step of dense reads, metadata included: the nearest there is",
}
"""Option of every method -> what it means."""


def type_text(declared: Any) -> str:
    """Return a declared type as a page names it: ``int``, ``float or none``."""
    return type_name(declared) + (" or none" if without_none(declared)[1] else "")


def automatic_values(cls: "type[CacheMethod[Any]]") -> dict[str, dict[str, Any]]:
    """Return length -> the settings in use there with every option at its default; empty for one without settings."""
    with asking("method", cls.name, cls, "its effective_config"):
        method = cls()
        found = {length_tokens: method.effective_config(length_tokens) for length_tokens in SHOWN_LENGTHS_TOKENS}
    return {
        format_length(length_tokens): {key: value for key, value in values.items() if value is not None}
        for length_tokens, values in found.items()
        if values
    }


def documented(thing: Any) -> dict[str, str]:
    """Return name -> meaning from the Args/Attributes section of a docstring."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if SECTION.match(line):
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and (match := ENTRY.match(line[4:])) and line[:4] == "    " and line[4:5] != " ":
            names = [name.strip() for name in match[1].split(",")]
            found.update(dict.fromkeys(names, match[2]))
        elif inside and line.strip():
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return {name: meaning.replace("``", "") for name, meaning in found.items()}


def task_entry(name: str) -> dict[str, Any]:
    """Return a task's words as plain values; no data file is needed for it."""
    from kvscope.tasks.registry import DESCRIPTIONS, task_class, task_options

    cls = task_class(name)
    meanings = documented(cls)
    return {
        "name": name,
        "description": DESCRIPTIONS.get(name, cls.description),
        "source": cls.source,
        "options": [{"name": option, "meaning": meanings.get(option, "")} for option in task_options(name)],
    }


def model_entry(name: str) -> dict[str, Any]:
    """Return a model's words and sizes as plain values; ``fault`` says why there are no sizes."""
    from kvscope.harness.passes.facts import describe_model

    entry: dict[str, Any] = {"name": name, "description": _models()[name]}
    try:
        facts = describe_model(name)
    except UsageError as error:
        return {**entry, "fault": str(error)}
    shape = facts.shape
    return {
        **entry,
        "layers": shape.n_layers,
        "full_attention_layers": len(shape.layers),
        "query_heads": shape.n_q_heads,
        "kv_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "dtype": facts.dtype,
        "max_length_tokens": facts.max_length_tokens,
    }


def _method_names() -> list[str]:
    from kvscope.methods.registry import method_names

    return method_names()


def _task_names() -> list[str]:
    from kvscope.tasks.registry import task_names

    return task_names()


def _models() -> dict[str, str]:
    from kvscope.harness.engine.names import known_models

    return known_models()
