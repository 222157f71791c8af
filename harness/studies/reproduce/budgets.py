"""Baselines at lsa's bytes: the least budget whose predicted share of dense's bytes is not below lsa's."""

from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.engine.backend import NoForm, form_on
from kvscope.harness.passes.facts import ModelFacts
from kvscope.methods.registry import create_method
from kvscope.specs import Spec

EQUAL = "_equal"
"""Ending of what a method of lsa's bytes stands for in a cell's ``methods``."""
_STEPS = 1000


def equal_methods(
    names: tuple[str, ...], *, share: float, n_tokens: int, window_tokens: int, facts: ModelFacts
) -> dict[str, str]:
    """Return ``NAME_equal`` -> label of the method with its budget.

    A budget is a fraction of the prompt's tokens in thousandths. It is rounded up, so a baseline has at least lsa's
    bytes by the byte formulas; what it held is in its rows.

    Args:
        share: lsa's bytes over dense's.
        n_tokens: of the prompt.
        window_tokens: last tokens that ``random`` keeps beside its draw.

    Raises:
        UsageError: a method cannot hold so few bytes and be itself.
    """
    return {f"{name}{EQUAL}": _label(name, share, n_tokens, window_tokens, facts) for name in names}


def runs_at(name: str, facts: ModelFacts) -> bool:
    """Whether a method has a form on the model's cache, so that it can be given lsa's bytes."""
    method = create_method(_spec(name, _STEPS, 1))
    return not isinstance(form_on(facts.backend, method, facts.shape), NoForm)


def _label(name: str, share: float, n_tokens: int, window_tokens: int, facts: ModelFacts) -> str:
    whole = _bytes(Spec("dense"), n_tokens, facts)
    low, high = 0, _STEPS
    assert whole is not None
    while high - low > 1:
        middle = (low + high) // 2
        held = _bytes(_spec(name, middle, window_tokens), n_tokens, facts)
        if held is None or held < share * whole:
            low = middle
        else:
            high = middle
    return create_method(_spec(name, high, window_tokens)).label


def _spec(name: str, thousandths: int, window_tokens: int) -> Spec:
    spec = Spec(name, (("budget_fraction", str(thousandths / _STEPS)),))
    return spec.with_option("recency_tokens", window_tokens) if name == "random" else spec


def _bytes(spec: Spec, n_tokens: int, facts: ModelFacts) -> int | None:
    """Device bytes of a prompt at opening; None where the budget is too small for the method."""
    method: Any = facts.backend.form_of(create_method(spec), facts.shape)
    try:
        return int(method.predict(facts.shape, n_tokens).device_bytes)
    except UsageError:
        return None
