"""How many tokens stay: the shared recency rule, and budgets given in bytes or as a fraction of dense. No torch."""

from typing import Protocol

from kvscope.errors import UsageError
from kvscope.methods.shape import ModelShape


class Budgeted(Protocol):
    """Options that may give a budget."""

    @property
    def budget_bytes(self) -> int | None: ...

    @property
    def budget_fraction(self) -> float | None: ...


def default_recency_tokens(n_tokens: int) -> int:
    """Return the recency window every method uses unless told: min(8192, max(128, n_tokens / 64))."""
    return min(8192, max(128, n_tokens // 64))


def check_budget(budget_bytes: int | None, budget_fraction: float | None) -> None:
    """Raise ValueError when a budget is out of range or given twice."""
    if budget_bytes is not None and budget_fraction is not None:
        raise ValueError("give budget_bytes or budget_fraction, not both")
    if budget_bytes is not None and budget_bytes <= 0:
        raise ValueError(f"budget_bytes must be positive, got {budget_bytes}")
    if budget_fraction is not None and not 0 < budget_fraction <= 1:
        raise ValueError(f"budget_fraction must be above 0 and at most 1, got {budget_fraction}")


def budget_tokens(method: str, n_tokens: int, *, options: Budgeted, shape: ModelShape | None) -> int | None:
    """Return how many tokens a budget holds (it may be more than the prompt's), or None without a budget.

    A budget in bytes buys whole pages in every managed layer, so the bytes kept at opening never exceed it; a
    fraction is of the prompt's tokens. Tokens decoded later come on top, as they do for every method.

    Raises:
        UsageError: the budget does not hold one page, or it is in bytes and ``shape`` is missing.
    """
    budget_bytes = options.budget_bytes
    if options.budget_fraction is not None:
        return int(options.budget_fraction * n_tokens)
    if budget_bytes is None:
        return None
    if shape is None:
        raise UsageError(
            f"Method '{method}': budget_bytes needs the model's shape to become tokens; use budget_fraction instead."
        )
    n_tokens = shape.token_capacity(budget_bytes)
    if not n_tokens and shape.kv is not None:
        raise UsageError(
            f"Method '{method}': budget_bytes={budget_bytes} is less than the newest tokens that kv={shape.kv.name} "
            f"keeps unpacked in every layer ({shape.paged_kv_bytes(0)} bytes); raise the budget."
        )
    if not n_tokens:
        raise UsageError(
            f"Method '{method}': budget_bytes={budget_bytes} is less than one page of every layer "
            f"({shape.paged_kv_bytes(1)} bytes); raise the budget or load the model with smaller pages."
        )
    return n_tokens
