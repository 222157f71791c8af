"""Options of a method or task: given values to typed ones, and these to one canonical label. No torch."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from kvscope.errors import UsageError
from kvscope.values import read_options, value_text, without_none


def field_types(config_type: type[Any]) -> dict[str, Any]:
    """Return option name -> the type it declares, annotations included."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


def optional_fields(config_type: type[Any]) -> set[str]:
    """Return the options that may be ``none`` (chosen automatically)."""
    return {name for name, declared in field_types(config_type).items() if without_none(declared)[1]}


def build_config(method: str, config_type: type[Any], options: Mapping[str, object]) -> Any:
    """Return a ``config_type`` from options as given.

    Raises:
        UsageError: unknown option, a value that is not of the option's type, or one its config refuses.
    """
    owner = f"Method '{method}'"
    values = read_options(owner, field_types(config_type), options)
    try:
        return config_type(**values)
    except ValueError as error:
        raise UsageError(f"{owner}: {error}") from error


def effective_values(config: Any) -> dict[str, Any]:
    """Return the options as a plain dict in the order they are declared."""
    return dataclasses.asdict(config)


def canonical_label(name: str, config: Any) -> str:
    """Return ``name`` or ``name:key=value,...`` with the options that differ from their defaults, in declared order."""
    changed = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            changed.append(f"{field.name}={value_text(value)}")
    return f"{name}:{','.join(changed)}" if changed else name
