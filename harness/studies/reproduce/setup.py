"""The cells of ``kvscope reproduce setup``: how much lsa's result depends on each setting, one changed at a time.

All options are methods of one cell, so that every value answers the same prompts. Lengths are cells of their own, and
tasks are told apart in the rows.
"""

from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.passes.facts import ModelFacts
from kvscope.harness.studies.reproduce.profiles import Asked, Size
from kvscope.methods.kv_format import FORMATS
from kvscope.methods.lsa.options import LsaConfig
from kvscope.methods.options import KV_OPTION, method_field_types
from kvscope.methods.registry import create_method
from kvscope.results.reproduction import CellPlan
from kvscope.specs import Spec, parse_spec
from kvscope.units import format_length

FACTORS: dict[str, tuple[dict[str, str], ...]] = {
    "chunk_tokens": ({"chunk_tokens": "16"}, {"chunk_tokens": "64"}, {"chunk_tokens": "256"}),
    "threshold": tuple({"threshold": value} for value in ("0.1", "0.3", "0.5", "0.7", "0.9")),
    "tau": tuple({"tau": value} for value in ("1", "4", "16", "64")),
    "policy": ({"refresh": "stale1"}, {"policy": "pages"}, {"policy": "pages", "refresh": "sync"}),
    KV_OPTION: tuple({KV_OPTION: value} for value in ("none", *FORMATS)),
}
"""Setting -> options of each of its values; what equals the method as asked for is no value of its own."""
TASKS: dict[Size, tuple[str, ...]] = {
    "quick": ("niah_multikey_3", "vt", "long_qa"),
    "full": ("niah_multikey_2", "niah_multikey_3", "niah_multivalue", "vt", "long_qa"),
}
SAMPLES: dict[Size, int] = {"quick": 9, "full": 207}
"""Prompts a task: long_qa's nine types weigh alike in multiples of nine, and every point has 200 or more."""
OPTIONS_TOKENS: dict[Size, int] = {"quick": 2048, "full": 16 * 1024}
LENGTHS_TOKENS: dict[Size, tuple[int, ...]] = {
    "quick": (1024, 4096),
    "full": (4 * 1024, 64 * 1024, 128 * 1024),
}
LENGTH_SAMPLES: dict[Size, int] = {"quick": 9, "full": 45}
OPTIONS_CELL = "options"


def setup_cells(asked: Asked, *, facts: ModelFacts) -> tuple[CellPlan, ...]:
    """Return the cells; one is left out, and says why, for a setting that the model or the method cannot change."""
    base = parse_spec(asked.lsa, kind="method")
    methods = {"dense": "dense", "lsa": create_method(base).label}
    left_out: dict[str, str] = {}
    length = OPTIONS_TOKENS[asked.size]
    for factor, values in FACTORS.items():
        if unknown := set().union(*values) - set(method_field_types(LsaConfig)):
            left_out[factor] = f"lsa has no option {sorted(unknown)[0]}"
            continue
        for options in values:
            label, why = _label(base, options, facts)
            if why is not None:
                left_out[factor] = why
            elif label not in methods.values() and _acts(label, length, facts) != _acts(methods["lsa"], length, facts):
                methods[f"{factor}={_value(factor, options)}"] = label
    size = asked.size
    cells = [
        _cell(asked, OPTIONS_CELL, OPTIONS_TOKENS[size], samples=SAMPLES[size], methods=methods),
        *(
            _cell(
                asked, f"length-{format_length(length).lower()}", length, samples=LENGTH_SAMPLES[size],
                methods={name: methods[name] for name in ("dense", "lsa")},
            )
            for length in LENGTHS_TOKENS[size]
        ),
    ]  # fmt: skip
    cells = [
        cell
        if cell.lengths_tokens[0] <= facts.max_length_tokens
        else cell.model_copy(update={"left_out": f"the model takes {facts.max_length_tokens:,} tokens"})
        for cell in cells
    ]
    for factor, why in left_out.items():
        cells.append(
            CellPlan(name=factor.replace("_", "-"), role="sweep", lengths_tokens=(OPTIONS_TOKENS[size],), left_out=why)
        )
    return tuple(cells)


def _cell(asked: Asked, name: str, length_tokens: int, *, samples: int, methods: dict[str, str]) -> CellPlan:
    return CellPlan(
        name=name,
        role="sweep",
        lengths_tokens=(length_tokens,),
        tasks=TASKS[asked.size],
        samples=samples,
        methods=methods,
    )


def _label(base: Spec, options: dict[str, str], facts: ModelFacts) -> tuple[str, str | None]:
    """Return (label of the method with its options, why it cannot run; None where it can)."""
    spec = base
    for key, value in options.items():
        spec = spec.with_option(key, value)
    try:
        method: Any = facts.backend.form_of(create_method(spec), facts.shape)
        method.require(facts.shape)
    except UsageError as error:
        return "", str(error).rstrip(".")
    reasons = method.unsupported(facts.shape, facts.device)
    return create_method(spec).label, "; ".join(reasons) or None


def _acts(label: str, length_tokens: int, facts: ModelFacts) -> dict[str, Any]:
    """What a method does at a length, whatever its options were called."""
    method: Any = facts.backend.form_of(create_method(label), facts.shape)
    settings: dict[str, Any] = method.effective_config(length_tokens, method.stored(facts.shape))
    return {**settings, **method.kv_values()}


def _value(factor: str, options: dict[str, str]) -> str:
    if factor != "policy":
        return options[factor]
    policy = options.get("policy", "threshold")
    refresh = options.get("refresh", "stale1" if policy == "pages" else "sync")
    return f"{policy}, {refresh}"
