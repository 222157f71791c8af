"""Settings of one method that differ in one option (a sweep) as one family: one colour, one line, short point names."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from kvscope.reports.look import look
from kvscope.reports.subtitle import shared_options
from kvscope.reports.theme import MethodStyle, method_styles

LEAST_SETTINGS = 3
_TOKENS_A_K = 1024


@dataclass(frozen=True)
class Family:
    """Settings that differ in one option.

    Attributes:
        method: the method, with its common options.
        option: the one that differs.
        values: label -> the option's value, short.
    """

    method: str
    option: str
    values: dict[str, str]

    @property
    def text(self) -> str:
        """What a figure's key says of it."""
        return f"{self.method}: by {self.option}"


def families(labels: Sequence[str]) -> list[Family]:
    """Return the families among ``labels``: three settings or more of one method that differ in one option.

    A label that does not name the option has its default.
    """
    found: list[Family] = []
    shared = shared_options(labels)
    left = [(label, *_parsed(label)) for label in labels]
    while True:
        groups: dict[tuple[str, str, tuple[str, ...]], list[tuple[str, str]]] = defaultdict(list)
        keys = {(name, key) for _, name, options in left for key in options}
        for label, name, options in left:
            for key in sorted(key for owner, key in keys if owner == name):
                rest = tuple(f"{k}={v}" for k, v in options.items() if k != key)
                groups[name, key, rest].append((label, options.get(key, "default")))
        if not groups:
            return found
        (name, key, rest), members = max(groups.items(), key=lambda item: len(item[1]))
        if len(members) < LEAST_SETTINGS:
            return found
        # Of a file the last part of its path is enough; what every setting shares stands under the title.
        own = [part for part in rest if part not in shared.get(name, [])]
        common = f" ({', '.join(map(_file_named, own))})" if own else ""
        found.append(Family(f"{name}{common}", key, {label: _short(value) for label, value in members}))
        taken = {label for label, _ in members}
        left = [entry for entry in left if entry[0] not in taken]


def family_styles(
    labels: Sequence[str], found: Sequence[Family], *, with_method: bool = False
) -> dict[str, MethodStyle]:
    """Return a style a label; the members of a family share one, with their value as text, or method and value."""
    head_of = {label: next(iter(family.values)) for family in found for label in family.values}
    heads = list(dict.fromkeys(head_of.get(label, label) for label in labels))
    styles = method_styles(heads)
    members = {
        label: MethodStyle(
            styles[head].color,
            styles[head].marker,
            styles[head].dash,
            look().names.get(label) or (f"{family.method} {text}" if with_method else text),
        )
        for family in found
        for label, text in family.values.items()
        for head in (head_of[label],)
    }
    return {label: members.get(label) or styles[label] for label in labels}


def family_note(found: Sequence[Family]) -> str:
    """Return the sentence that explains such texts; empty without families."""
    methods: dict[str, list[str]] = defaultdict(list)
    for family in found:
        methods[family.option].append(family.method)
    return " ".join(f"What stands behind {', '.join(names)} is {option}." for option, names in methods.items())


def _parsed(label: str) -> tuple[str, dict[str, str]]:
    name, _, tail = label.partition(":")
    pairs = (item.partition("=") for item in tail.split(",") if item)
    return name, {key: value for key, _, value in pairs}


def _file_named(option: str) -> str:
    key, _, value = option.partition("=")
    return f"{key}={value.rstrip('/').rsplit('/', 1)[-1]}"


def _short(value: str) -> str:
    whole = int(value) if value.isdigit() else 0
    return f"{whole // _TOKENS_A_K}K" if whole and whole % _TOKENS_A_K == 0 else value
