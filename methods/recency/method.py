"""Recency Only, the ablation of arXiv 2606.09079: the last tokens of the prompt and everything decoded."""

from dataclasses import dataclass
from typing import Any

from kvscope.methods.budget import budget_tokens, check_budget, default_recency_tokens
from kvscope.methods.resident import StaticResidency
from kvscope.methods.shape import ModelShape
from kvscope.methods.store import PromptKV, TokenRange
from kvscope.units import Bytes, Tokens


@dataclass(frozen=True, kw_only=True)
class RecencyConfig:
    """Options of ``recency``.

    Attributes:
        recency_tokens: prompt tokens that stay; None: min(8192, max(128, length / 64)).
        budget_bytes: bytes for the prompt's KV over all layers, instead of ``recency_tokens``.
        budget_fraction: fraction of the prompt's tokens that stays, instead of ``recency_tokens``.
    """

    recency_tokens: Tokens | None = None
    budget_bytes: Bytes | None = None
    budget_fraction: float | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget_bytes, self.budget_fraction)
        if self.recency_tokens is not None:
            if self.recency_tokens < 0:
                raise ValueError(f"recency_tokens must be 0 or more, got {self.recency_tokens}")
            if self.budget_bytes is not None or self.budget_fraction is not None:
                raise ValueError("a budget sets recency_tokens, so give one of them")


class Recency(StaticResidency[RecencyConfig]):
    """The last ``recency_tokens`` of the prompt, chosen at opening, then every decoded token."""

    name = "recency"
    stays = "the last tokens of the prompt and every decoded token"
    saves = "bytes and reads grow with the window, not the prompt; what lies before the window is lost"
    source = "'Recency Only' of Lookahead Sparse Attention, arXiv 2606.09079"
    cost = "resident = read = R + decoded tokens a layer, R = min(8192, max(128, N/64)) unless set"
    saving_kind = "freed"
    kv_refusal = ""
    Config = RecencyConfig

    def n_resident_tokens(self, n_tokens: int, shape: ModelShape | None) -> int:
        budgeted = budget_tokens(self.name, n_tokens, options=self.config, shape=shape)
        if budgeted is not None:
            return min(n_tokens, budgeted)
        wanted = self.config.recency_tokens
        return min(n_tokens, default_recency_tokens(n_tokens) if wanted is None else wanted)

    def resident_ranges(self, prompt: PromptKV) -> list[TokenRange]:
        n_resident = self.n_resident_tokens(prompt.n_tokens, prompt.shape)
        return [(prompt.n_tokens - n_resident, prompt.n_tokens)]

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return {
            "recency_tokens": self.n_resident_tokens(n_tokens, shape),
            "budget_bytes": self.config.budget_bytes,
            "budget_fraction": self.config.budget_fraction,
        }
