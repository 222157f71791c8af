"""How many tokens an eviction method keeps in each KV head. No torch."""

from dataclasses import dataclass

from kvscope.errors import UsageError
from kvscope.methods.block_budget import default_budget_tokens
from kvscope.units import Tokens

PAPER_BUDGET_TOKENS = 2048
"""SnapKV's default capacity (its authors' code). ``--paper-settings`` sets it where a paper names sizes, not shares."""


@dataclass(frozen=True, kw_only=True)
class EvictionConfig:
    """Options of every eviction method.

    Attributes:
        budget_tokens: tokens kept in each KV head, mean over layers and heads; none: min(2048, max(128, length / 16)).
        budget_fraction: the same as a fraction of the prompt's tokens.
    """

    budget_tokens: Tokens | None = None
    budget_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.budget_tokens is not None and self.budget_fraction is not None:
            raise ValueError("give budget_tokens or budget_fraction, not both")
        if self.budget_tokens is not None and self.budget_tokens < 1:
            raise ValueError(f"budget_tokens must be 1 or more, got {self.budget_tokens}")
        if self.budget_fraction is not None and not 0 < self.budget_fraction <= 1:
            raise ValueError(f"budget_fraction must be above 0 and at most 1, got {self.budget_fraction}")

    @property
    def evicts_nothing(self) -> bool:
        """Whether every token is asked for, those decoded later included."""
        return self.budget_fraction == 1

    def wanted_tokens(self, n_tokens: int) -> int:
        """Return the budget for a prompt of ``n_tokens``; it may be more than the prompt."""
        if self.budget_fraction is not None:
            return int(self.budget_fraction * n_tokens)
        if self.budget_tokens is not None:
            return self.budget_tokens
        return default_budget_tokens(n_tokens, PAPER_BUDGET_TOKENS)


def kept_tokens(method: str, n_tokens: int, options: EvictionConfig, *, least_tokens: int, least: str) -> int:
    """Return the tokens of a prompt that each KV head keeps.

    Args:
        method: its name, for the message.
        least_tokens: tokens that stay whatever their scores.
        least: what these are, as a noun with its article.

    Raises:
        UsageError: the budget holds less than these, and not the whole prompt.
    """
    wanted = options.wanted_tokens(n_tokens)
    if wanted >= n_tokens:
        return n_tokens
    if wanted < least_tokens:
        raise UsageError(
            f"Method '{method}': the budget holds {wanted} of {n_tokens} tokens, and {least} takes {least_tokens}; "
            "raise the budget."
        )
    return wanted
