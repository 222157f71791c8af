"""Options of a method: text to typed values, values to one canonical label. No torch."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from kvscope.errors import UsageError, did_you_mean

_TOKEN_UNITS = {"k": 1024, "m": 1024**2}
_BYTE_UNITS = {"kib": 1024, "mib": 1024**2, "gib": 1024**3}


def field_types(config_type: type[Any]) -> dict[str, type]:
    """Return option name -> its type, with ``X | None`` reduced to ``X``."""
    hints = typing.get_type_hints(config_type)
    found: dict[str, type] = {}
    for field in dataclasses.fields(config_type):
        hint = hints[field.name]
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        found[field.name] = hint
    return found


def optional_fields(config_type: type[Any]) -> set[str]:
    """Return the options that may be ``none`` (chosen automatically)."""
    hints = typing.get_type_hints(config_type)
    return {f.name for f in dataclasses.fields(config_type) if type(None) in typing.get_args(hints[f.name])}


def build_config(method: str, config_type: type[Any], options: Mapping[str, Any]) -> Any:
    """Return a ``config_type`` from raw options (text or already typed).

    Raises:
        UsageError: unknown option, a value that is not of the option's type, or one its config refuses.
    """
    types_by_name = field_types(config_type)
    may_be_none = optional_fields(config_type)
    values: dict[str, Any] = {}
    for key, raw in options.items():
        if key not in types_by_name:
            if not types_by_name:
                raise UsageError(f"Method '{method}' has no options, so '{key}={raw}' cannot be set.")
            hint = did_you_mean(key, types_by_name)
            listing = ", ".join(types_by_name)
            raise UsageError(f"Method '{method}' has no option '{key}'.{hint} Its options are: {listing}.")
        if key in may_be_none and (raw is None or (isinstance(raw, str) and raw.lower() in ("none", "auto"))):
            values[key] = None
        else:
            values[key] = _convert(method, key, raw, types_by_name[key])
    try:
        return config_type(**values)
    except ValueError as error:
        raise UsageError(f"Method '{method}': {error}") from error


def effective_values(config: Any) -> dict[str, Any]:
    """Return the options as a plain dict in the order they are declared."""
    return dataclasses.asdict(config)


def canonical_label(name: str, config: Any) -> str:
    """Return ``name`` or ``name:key=value,...`` with the options that differ from their defaults, in declared order."""
    changed = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            changed.append(f"{field.name}={_text(value)}")
    return f"{name}:{','.join(changed)}" if changed else name


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _convert(method: str, key: str, raw: Any, wanted: type) -> Any:
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[wanted]
    wrong = UsageError(f"Method '{method}': option '{key}' expects {expected}, got {raw!r}.")
    if wanted is bool:
        if isinstance(raw, bool):
            return raw
        if isinstance(raw, str) and raw.lower() in ("true", "false"):
            return raw.lower() == "true"
        raise wrong
    if isinstance(raw, bool) or raw is None:
        raise wrong
    if wanted is str:
        if not isinstance(raw, str):
            raise wrong
        return raw
    if wanted is float:
        try:
            return float(raw)
        except (TypeError, ValueError):
            raise wrong from None
    if isinstance(raw, int):
        return raw
    number = _whole_number(key, raw) if isinstance(raw, str) else None
    if number is None:
        raise wrong
    return number


def _whole_number(key: str, text: str) -> int | None:
    """Read ``4096``, and with a unit ``4k`` (an option in tokens) or ``64MiB`` (an option in bytes)."""
    lowered = text.strip().lower()
    units = _BYTE_UNITS if key.endswith("_bytes") else _TOKEN_UNITS if key.endswith(("_tokens", "window")) else {}
    for suffix, factor in units.items():
        if lowered.endswith(suffix):
            lowered, scale = lowered[: -len(suffix)].strip(), factor
            break
    else:
        scale = 1
    try:
        return int(lowered) * scale
    except ValueError:
        return None
