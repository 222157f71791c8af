"""Options of a method or task: given values to typed ones, and these to one canonical label. No torch."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvscope.errors import UsageError
from kvscope.methods.kv_format import FORMATS, KvFormat, KvName
from kvscope.values import read_options, value_text, without_none

KV_OPTION, SHARE_OPTION, READ_SHARE_OPTION = "kv", "share", "read_share"
SHARED_OPTIONS: dict[str, Any] = {
    KV_OPTION: KvName | None,
    SHARE_OPTION: float | None,
    READ_SHARE_OPTION: float | None,
}
"""Options of every method, beside its own, and their types; a method's own of the same name goes first."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A budget as a share of dense's bytes.

    Attributes:
        of: above 0, at most 1.
        reads: of the bytes that a decode step reads; else of those on the device.
    """

    of: float
    reads: bool = False

    @property
    def option(self) -> str:
        """The option that asks for it."""
        return READ_SHARE_OPTION if self.reads else SHARE_OPTION


BUDGETS: dict[str, Any] = {"budget_tokens": 2**20, "budget_fraction": 1.0}
"""Options that a share can set, the first that a method has, and what stands there until a prompt is known."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked of a method.

    Attributes:
        config: its own options.
        kv: format of the store; None: the model's dtype.
        share: its budget; None: as its own options have it.
        share_sets: the option that the share sets, which holds a placeholder; empty: none.
    """

    config: Any
    kv: KvFormat | None = None
    share: Share | None = None
    share_sets: str = ""


def field_types(config_type: type[Any]) -> dict[str, Any]:
    """Return option name -> the type it declares, annotations included."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


def method_field_types(config_type: type[Any]) -> dict[str, Any]:
    """Return the same of a method, and behind it the options of every method; shares where it has a budget."""
    own = field_types(config_type)
    budgeted = any(name in own for name in BUDGETS)
    shared = {name: declared for name, declared in SHARED_OPTIONS.items() if budgeted or name == KV_OPTION}
    return own | {name: declared for name, declared in shared.items() if name not in own}


def _names(config_type: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(config_type)}


def optional_fields(config_type: type[Any]) -> set[str]:
    """Return the options that may be ``none`` (chosen automatically)."""
    return {name for name, declared in field_types(config_type).items() if without_none(declared)[1]}


def build_config(method: str, config_type: type[Any], options: Mapping[str, object]) -> Options:
    """Return what options as given ask of a method of ``config_type``.

    Raises:
        UsageError: unknown option, a value that is not of the option's type, or one its config refuses.
    """
    owner = f"Method '{method}'"
    values = read_options(owner, method_field_types(config_type), options)
    shared = {name: values.pop(name, None) for name in SHARED_OPTIONS if name not in _names(config_type)}
    kv = shared.get(KV_OPTION)
    share = _share(owner, shared.get(SHARE_OPTION), shared.get(READ_SHARE_OPTION))
    sets = _set_by(owner, share, config_type, values)
    given = values | ({sets: BUDGETS[sets]} if sets else {})
    try:
        config = config_type(**given)
    except ValueError as error:
        told = f"{share_text(share)} sets {sets}: " if share is not None else ""
        raise UsageError(f"{owner}: {told}{error}") from error
    return Options(config=config, kv=None if kv is None else FORMATS[kv], share=share, share_sets=sets)


def _set_by(owner: str, share: Share | None, config_type: type[Any], values: Mapping[str, object]) -> str:
    """Return the option that a share sets; empty without one.

    Raises:
        UsageError: a budget is given, too.
    """
    if share is None:
        return ""
    names = _names(config_type)
    given = [name for name in (*BUDGETS, "budget_bytes") if values.get(name) is not None]
    if given:
        raise UsageError(f"{owner}: {share_text(share)} sets the budget, and {given[0]} does, too; give one of them.")
    return next(name for name in BUDGETS if name in names)


def _share(owner: str, held: float | None, read: float | None) -> Share | None:
    if held is not None and read is not None:
        raise UsageError(f"{owner}: give {SHARE_OPTION} or {READ_SHARE_OPTION}, not both.")
    if read is not None:
        share = Share(of=read, reads=True)
    elif held is not None:
        share = Share(of=held)
    else:
        return None
    if not 0 < share.of <= 1:
        raise UsageError(f"{owner}: {share.option} must be above 0 and at most 1, got {share.of}.")
    return share


def share_text(share: Share) -> str:
    """Return a share as it is asked for."""
    return f"{share.option}={value_text(share.of)}"


def effective_values(config: Any) -> dict[str, Any]:
    """Return the options as a plain dict in the order they are declared."""
    return dataclasses.asdict(config)


def canonical_label(name: str, config: Any, asked: Options | None = None) -> str:
    """Return ``name`` or ``name:key=value,...`` with the options that differ from their defaults, in declared order;
    the share of dense's bytes comes behind them, and the format of the store last.

    Args:
        asked: options beside those of ``config``.
    """
    asked = asked or Options(config=config)
    changed = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name != asked.share_sets:
            changed.append(f"{field.name}={value_text(value)}")
    if asked.share is not None:
        changed.append(share_text(asked.share))
    if asked.kv is not None:
        changed.append(f"{KV_OPTION}={asked.kv.name}")
    return f"{name}:{','.join(changed)}" if changed else name
