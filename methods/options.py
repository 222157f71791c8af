"""Options of a method or task: given values to typed ones, and these to one canonical label. No torch."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from kvscope.errors import UsageError
from kvscope.methods.kv_format import FORMATS, KvFormat, KvName
from kvscope.values import read_options, value_text, without_none

KV_OPTION = "kv"


def field_types(config_type: type[Any]) -> dict[str, Any]:
    """Return option name -> the type it declares, annotations included."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


def method_field_types(config_type: type[Any]) -> dict[str, Any]:
    """Return the same of a method, whose store's format is an option beside its own."""
    return {**field_types(config_type), **({} if KV_OPTION in _names(config_type) else {KV_OPTION: KvName | None})}


def _names(config_type: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(config_type)}


def optional_fields(config_type: type[Any]) -> set[str]:
    """Return the options that may be ``none`` (chosen automatically)."""
    return {name for name, declared in field_types(config_type).items() if without_none(declared)[1]}


def build_config(method: str, config_type: type[Any], options: Mapping[str, object]) -> tuple[Any, KvFormat | None]:
    """Return a ``config_type`` from options as given, and the format of the store.

    Raises:
        UsageError: unknown option, a value that is not of the option's type, or one its config refuses.
    """
    owner = f"Method '{method}'"
    values = read_options(owner, method_field_types(config_type), options)
    kv = None if KV_OPTION in _names(config_type) else values.pop(KV_OPTION, None)
    try:
        return config_type(**values), None if kv is None else FORMATS[kv]
    except ValueError as error:
        raise UsageError(f"{owner}: {error}") from error


def effective_values(config: Any) -> dict[str, Any]:
    """Return the options as a plain dict in the order they are declared."""
    return dataclasses.asdict(config)


def canonical_label(name: str, config: Any, kv: KvFormat | None = None) -> str:
    """Return ``name`` or ``name:key=value,...`` with the options that differ from their defaults, in declared order;
    the format of the store comes last."""
    changed = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            changed.append(f"{field.name}={value_text(value)}")
    if kv is not None:
        changed.append(f"{KV_OPTION}={kv.name}")
    return f"{name}:{','.join(changed)}" if changed else name
