"""SnapKV (arXiv 2404.14469): what the last tokens of the prompt attend to stays, chosen once, when the prompt ends."""

from dataclasses import dataclass
from typing import Any, ClassVar

from kvscope.methods.eviction.budget import PAPER_BUDGET_TOKENS
from kvscope.methods.eviction.kept import KeptTokens
from kvscope.methods.eviction.window import ByWindow, WindowConfig


@dataclass(frozen=True, kw_only=True)
class SnapKVConfig(WindowConfig):
    """Options of ``snapkv``.

    Attributes:
        budget_tokens: tokens kept in each KV head, the window included; none: min(2048, max(128, length / 16)).
        budget_fraction: the same as a fraction of the prompt's tokens.
        window_tokens: last tokens of the prompt, whose queries score the others; they stay.
        kernel_size: tokens that scores are pooled over, an odd number.
        pooling: avg or max.
    """


class SnapKV(ByWindow[SnapKVConfig], KeptTokens[SnapKVConfig]):
    """The observation window, the tokens it attends to most, and every decoded token."""

    name = "snapkv"
    stays = "of each KV head the tokens that the last ones of the prompt attend to, those last ones, decoded tokens"
    saves = "bytes and reads grow with the budget, not the prompt; what the window did not attend to is lost"
    source = "Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469"
    cost = "resident = read = B + decoded tokens a layer, B = min(2048, max(128, N/16)) unless set"
    paper_options: ClassVar[dict[str, Any]] = {"budget_tokens": PAPER_BUDGET_TOKENS}
    Config = SnapKVConfig
