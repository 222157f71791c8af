"""Method names and specs. Names map to import strings, resolved on use, so that listing them loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError, did_you_mean
from kvscope.methods.options import build_config, canonical_label, optional_fields

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod

METHODS: dict[str, str] = {
    "dense": "kvscope.methods.dense.method:Dense",
    "sliding_window": "kvscope.methods.sliding_window.method:SlidingWindow",
    "recency": "kvscope.methods.recency.method:Recency",
    "random": "kvscope.methods.random.method:RandomChunks",
    "quest": "kvscope.methods.quest.method:Quest",
    "moba": "kvscope.methods.moba.method:MoBA",
    "msa": "kvscope.methods.msa.method:MSA",
    "dsa": "kvscope.methods.dsa.method:DSA",
    "lsa": "kvscope.methods.lsa.method:Lsa",
}

PAPER_RECENCY_TOKENS = 8192
"""The paper's recency window (arXiv 2606.09079), fixed for every method under ``--paper-settings``."""
_PAPER_OPTIONS = ("recency_tokens", "window")


@dataclass(frozen=True)
class MethodSpec:
    """A method's name and its options as given. ``label`` is the spec as text."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The canonical spec: options in declared order, defaults left out; equal configs have equal labels."""
        return create_method(self).label


def method_names() -> list[str]:
    """Return every registered name, in the order reports show them."""
    return list(METHODS)


def method_class(name: str) -> type[CacheMethod[Any]]:
    """Return the class behind a name.

    Raises:
        UsageError: no method has that name.
    """
    if name not in METHODS:
        raise UsageError(f"There is no method '{name}'.{did_you_mean(name, METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    found: type[CacheMethod[Any]] = getattr(import_module(module), attribute)
    return found


def parse_method(spec: str | Mapping[str, Any] | MethodSpec) -> MethodSpec:
    """Read ``name``, ``name:key=value,key=value`` or the mapping ``{"name": ..., key: value}``.

    Raises:
        UsageError: malformed text, a mapping without a name, or a name that is not registered. Options are checked
            by ``create_method``.
    """
    if isinstance(spec, MethodSpec):
        return spec
    if isinstance(spec, str):
        name, colon, tail = (part.strip() for part in spec.partition(":"))
        options: dict[str, Any] = {}
        for item in tail.split(",") if colon else ():
            key, equals, value = (part.strip() for part in item.partition("="))
            if not (key and equals and value):
                raise UsageError(
                    f"Method '{spec}': '{item.strip()}' is not key=value. Write it as name:key=value,key=value."
                )
            if key in options:
                raise UsageError(f"Method '{spec}': option '{key}' is given twice.")
            options[key] = value
    elif isinstance(spec, Mapping):
        options = dict(spec)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise UsageError(f"A method given as a mapping needs 'name' with a method's name, got {dict(spec)!r}.")
    else:
        raise UsageError(f"A method is text like 'recency:recency_tokens=256' or a mapping, got {spec!r}.")
    if name not in METHODS:
        raise UsageError(f"There is no method '{name}'.{did_you_mean(name, METHODS)}")
    return MethodSpec(name, options)


def create_method(spec: str | Mapping[str, Any] | MethodSpec, *, paper_settings: bool = False) -> CacheMethod[Any]:
    """Return the method a spec names, its options checked.

    Args:
        spec: text, mapping or parsed spec, see ``parse_method``.
        paper_settings: fix the recency window at 8192 tokens, and the methods' own papers' values, wherever the spec
            leaves them open.

    Raises:
        UsageError: as ``parse_method``, or an option that is unknown, of the wrong type or out of range.
    """
    parsed = parse_method(spec)
    cls = method_class(parsed.name)
    options = dict(parsed.options)
    config = build_config(parsed.name, cls.Config, options)
    label = canonical_label(parsed.name, config)
    if paper_settings:
        open_options = optional_fields(cls.Config)
        budgeted = any(getattr(config, key, None) is not None for key in ("budget_bytes", "budget_fraction"))
        for key, value in (dict.fromkeys(_PAPER_OPTIONS, PAPER_RECENCY_TOKENS) | dict(cls.paper_options)).items():
            # Where a byte budget already sizes the window, the paper's 8192 tokens have nothing left to fix.
            if key in open_options and getattr(config, key) is None and not (budgeted and cls.budget_sets_window):
                options[key] = value
        config = build_config(parsed.name, cls.Config, options)
    # The label is what the user asked for; `effective_config` says what the paper's settings made of it.
    return cls(config, label=label)
