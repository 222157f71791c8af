"""Method names and how to make a method. Names map to import strings, resolved on use: listing them loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from kvscope import plugins
from kvscope.errors import UsageError
from kvscope.methods.options import build_config, canonical_label, method_field_types, optional_fields
from kvscope.specs import Spec, parse_spec

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod

METHODS: dict[str, str] = {
    "dense": "kvscope.methods.dense.method:Dense",
    "sliding_window": "kvscope.methods.sliding_window.method:SlidingWindow",
    "recency": "kvscope.methods.recency.method:Recency",
    "random": "kvscope.methods.random.method:RandomChunks",
    "snapkv": "kvscope.methods.snapkv.method:SnapKV",
    "pyramidkv": "kvscope.methods.pyramidkv.method:PyramidKV",
    "adakv": "kvscope.methods.adakv.method:AdaKV",
    "expected_attention": "kvscope.methods.expected_attention.method:ExpectedAttention",
    "tova": "kvscope.methods.tova.method:Tova",
    "h2o": "kvscope.methods.h2o.method:H2O",
    "knorm": "kvscope.methods.knorm.method:KNorm",
    "quest": "kvscope.methods.quest.method:Quest",
    "moba": "kvscope.methods.moba.method:MoBA",
    "msa": "kvscope.methods.msa.method:MSA",
    "dsa": "kvscope.methods.dsa.method:DSA",
    "lsa": "kvscope.methods.lsa.method:Lsa",
}

PAPER_RECENCY_TOKENS = 8192
"""The paper's recency window (arXiv 2606.09079), fixed for every method under ``--paper-settings``."""
_PAPER_OPTIONS = ("recency_tokens", "window")
_WORDS = ("stays", "saves", "source", "cost", "reads")
_SAVING_KINDS = ("resident", "freed", "offloaded")


def method_names() -> list[str]:
    """Return every name, in the order reports show them: kvscope's own, then those of installed packages."""
    return plugins.names("method", METHODS)


def method_class(name: str) -> type[CacheMethod[Any]]:
    """Return the class behind a name or ``package.module:Class``.

    Raises:
        UsageError: no method has that name, two have it, or what it leads to cannot be used as a method.
    """
    place = plugins.find("method", name, METHODS)
    found = plugins.load(place)
    if not place.is_own:
        _check_class(place, found)
    return cast("type[CacheMethod[Any]]", found)


def is_own(spec: Spec) -> bool:
    """Whether a spec names one of kvscope's own methods."""
    return spec.name in METHODS


def _check_class(place: plugins.Place, found: object) -> None:
    """Check that a class from outside keeps the contract of ``methods/base.py``, as far as a class shows.

    Raises:
        UsageError: naming the first thing it lacks.
    """
    from kvscope.methods.base import CacheMethod

    plugins.check_class(place, found, base=CacheMethod, own=METHODS)
    assert isinstance(found, type)
    for word in _WORDS:
        text = getattr(found, word, None)
        if not isinstance(text, str) or not text.strip():
            raise plugins.broken(place, f"its class attribute {word!r} must be text, one clause")
    if getattr(found, "saving_kind", None) not in _SAVING_KINDS:
        raise plugins.broken(place, f"its class attribute 'saving_kind' must be one of {', '.join(_SAVING_KINDS)}")
    config = getattr(found, "Config", None)
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise plugins.broken(place, "its class attribute 'Config' must be a dataclass, every option with a default")
    try:
        config()
    except Exception as error:  # noqa: BLE001 - a stranger's code
        raise plugins.broken(place, f"its Config cannot be made without options: {error}") from None
    with plugins.asking("method", place.name, found, "reading the types of its options"):
        method_field_types(config)


def create_method(given: str | Mapping[str, Any] | Spec, *, paper_settings: bool = False) -> CacheMethod[Any]:
    """Return the method a spec names, its options checked.

    Args:
        given: a spec, or any of its forms (see ``kvscope.specs``).
        paper_settings: fix the recency window at 8192 tokens, and the methods' own papers' values, wherever the spec
            leaves them open.

    Raises:
        UsageError: a spec or name that is none, or an option that is unknown, of the wrong type or out of range.
    """
    spec = parse_spec(given, kind="method")
    cls = method_class(spec.name)
    with plugins.asking("method", spec.name, cls, "making it"):
        return _made(cls, dict(spec.options), paper_settings=paper_settings)


def _made(cls: type[CacheMethod[Any]], options: dict[str, Any], *, paper_settings: bool) -> CacheMethod[Any]:
    asked = build_config(cls.name, cls.Config, options)
    config, share = asked.config, asked.share
    label = canonical_label(cls.name, config, asked)
    if paper_settings:
        open_options = optional_fields(cls.Config)
        budgeted = share is not None or any(
            getattr(config, key, None) is not None for key in ("budget_bytes", "budget_fraction")
        )
        for key, value in (dict.fromkeys(_PAPER_OPTIONS, PAPER_RECENCY_TOKENS) | dict(cls.paper_options)).items():
            # Where a byte budget already sizes the window, the paper's 8192 tokens have nothing left to fix.
            if key in open_options and getattr(config, key) is None and not (budgeted and cls.budget_sets_window):
                options[key] = value
        config = build_config(cls.name, cls.Config, options).config
    # The label is what the user asked for; `effective_config` says what the paper's settings made of it.
    method = cls(config, label=label)
    if asked.kv is not None:
        method.use_kv(asked.kv)
    if share is None:
        return method
    from kvscope.methods.at_share import AtShare

    return AtShare(method, share, sets=asked.share_sets, label=label)


def check_one_class_a_name(methods: list[CacheMethod[Any]]) -> None:
    """Refuse two classes of one name in one run: rows name the method by it.

    Raises:
        UsageError: naming both classes.
    """
    classes: dict[str, type[Any]] = {}
    for method in methods:
        first = classes.setdefault(method.name, method.kind)
        if first is not method.kind:
            both = " and ".join(f"{cls.__module__}:{cls.__qualname__}" for cls in (first, method.kind))
            raise UsageError(f"{both} both have the name {method.name!r}: rows could not be told apart, so keep one.")
