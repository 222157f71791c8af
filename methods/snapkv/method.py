"""SnapKV (arXiv 2404.14469): what the last tokens of the prompt attend to stays, chosen once, when the prompt ends."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvscope.methods.base import SequenceCache
from kvscope.methods.eviction.budget import PAPER_BUDGET_TOKENS
from kvscope.methods.eviction.kept import KeptTokens, held_footprint, stock_footprint
from kvscope.methods.eviction.reapplied import Reapplied, ReappliedSequence
from kvscope.methods.eviction.window import ByWindow, WindowConfig
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.store import PromptKV


@dataclass(frozen=True, kw_only=True)
class SnapKVConfig(WindowConfig):
    """Options of ``snapkv``.

    Attributes:
        budget_tokens: tokens kept in each KV head, the window included; none: min(2048, max(128, length / 16)).
        budget_fraction: the same as a fraction of the prompt's tokens.
        window_tokens: last tokens of the prompt, whose queries score the others; they stay.
        kernel_size: tokens that scores are pooled over, an odd number.
        pooling: avg or max.
        interval_steps: decode steps after which the choice is made anew, by the last queries; none: it is made once.
    """

    interval_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval_steps is not None and self.interval_steps < self.window_tokens:
            raise ValueError(
                f"interval_steps must be window_tokens ({self.window_tokens}) or more, so that the window is of "
                f"decoded queries, got {self.interval_steps}"
            )


class SnapKV(ByWindow[SnapKVConfig], KeptTokens[SnapKVConfig]):
    """The observation window, the tokens it attends to most, and every decoded token."""

    name = "snapkv"
    stays = "of each KV head the tokens that the last ones of the prompt attend to, those last ones, decoded tokens"
    saves = "bytes and reads grow with the budget, not the prompt; what the window did not attend to is lost"
    source = "Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469"
    cost = "resident = read = B + decoded tokens a layer, B = min(2048, max(128, N/16)) unless set"
    paper_options: ClassVar[dict[str, Any]] = {"budget_tokens": PAPER_BUDGET_TOKENS}
    Config = SnapKVConfig

    def reapplied(self, n_tokens: int) -> Reapplied | None:
        """Return how the choice is made anew while decoding; None where it is not."""
        config = self.config
        if config.interval_steps is None or config.evicts_nothing:
            return None
        return Reapplied(
            interval_steps=config.interval_steps,
            budget_tokens=max(config.window_tokens, config.wanted_tokens(n_tokens)),
            window_tokens=config.window_tokens,
            pooling=config.pooling,
            kernel_size=config.kernel_size,
        )

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        rule = self.reapplied(n_tokens)
        if rule is None:
            return super().predict(shape, n_tokens, n_new_tokens)
        held, most = rule.held_tokens(self.n_kept_tokens(n_tokens), n_new_tokens)
        n_layers = len(shape.layers)
        found = held_footprint(shape, [held] * n_layers, room_tokens=[most] * n_layers)
        return found + rule.queries(shape) + stock_footprint(shape, n_tokens, n_new_tokens)

    def kv_refusal_of_options(self) -> str:
        if self.config.interval_steps is None:
            return ""
        return "interval_steps chooses anew by raw keys, and what is packed is not packed again"

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return {**super().effective_config(n_tokens, shape), "interval_steps": self.config.interval_steps}

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        rule = self.reapplied(prompt.n_tokens)
        if rule is None:
            return super().open(prompt, device, reserve_tokens=reserve_tokens)
        return ReappliedSequence(
            prompt, torch.device(device), kept=self.kept(prompt), rule=rule, reserve_tokens=reserve_tokens
        )
