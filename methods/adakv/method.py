"""AdaKV (arXiv 2407.11550) on SnapKV's scores: the heads of a layer share its budget, each with a safe share."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvscope.methods.base import SequenceCache
from kvscope.methods.eviction.budget import PAPER_BUDGET_TOKENS
from kvscope.methods.eviction.choice import shared_tokens
from kvscope.methods.eviction.heads import HeadSequence, heads_footprint, most_pages
from kvscope.methods.eviction.kept import stock_footprint
from kvscope.methods.eviction.window import ByWindow, WindowConfig
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.store import PromptKV


@dataclass(frozen=True, kw_only=True)
class AdaKVConfig(WindowConfig):
    """Options of ``adakv``.

    Attributes:
        budget_tokens: tokens kept in each KV head, mean over the heads of a layer, the window included; none:
            min(2048, max(128, length / 16)).
        budget_fraction: the same as a fraction of the prompt's tokens.
        window_tokens: last tokens of the prompt, whose queries score the others; every head keeps them.
        kernel_size: tokens that scores are pooled over, an odd number.
        pooling: avg or max.
        safeguard: share of the budget that every head keeps at least, its best tokens.
    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard must be between 0 and 1, got {self.safeguard}")


class AdaKV(ByWindow[AdaKVConfig]):
    """The observation window, and a layer's tokens of highest score whatever their head."""

    name = "adakv"
    stays = (
        "as snapkv, with a budget that the heads of a layer share, so that heads keep unequally many; decoded tokens"
    )
    saves = "bytes and reads grow with the budget, not the prompt; what the window did not attend to is lost"
    source = (
        "Feng et al., Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference, "
        "arXiv 2407.11550"
    )
    cost = (
        "resident = read = B + decoded tokens a layer, B = min(2048, max(128, N/16)) unless set; up to a page more for "
        "each head, and 4 bytes a page of a table"
    )
    kv_refusal = "the heads of a layer fill their pages at different steps, and a page is packed for all heads at once"
    paper_options: ClassVar[dict[str, Any]] = {"budget_tokens": PAPER_BUDGET_TOKENS}
    Config = AdaKVConfig

    def safe_tokens(self, n_tokens: int) -> int:
        """Return the tokens that each head keeps at least, the window among them."""
        return max(self.config.window_tokens, int(self.config.safeguard * self.n_kept_tokens(n_tokens)))

    def kept(self, prompt: PromptKV) -> dict[int, list[torch.Tensor]]:
        """Return of each managed layer the positions each KV head keeps, ascending."""
        n_kept, H = self.n_kept_tokens(prompt.n_tokens), prompt.shape.n_kv_heads
        if n_kept >= prompt.n_tokens:
            return {layer: [torch.arange(n_kept)] * H for layer in prompt.shape.layers}
        n_safe = self.safe_tokens(prompt.n_tokens)
        return {
            layer: shared_tokens(self.scores(prompt, layer), n_kept, n_safe=n_safe) for layer in prompt.shape.layers
        }

    def sizes(self, shape: ModelShape, n_tokens: int, n_new_tokens: int) -> tuple[int, int]:
        """Return the pages of one head in a layer, and the most pages of one head's table."""
        n_kept, H = self.n_kept_tokens(n_tokens), shape.n_kv_heads
        if n_kept >= n_tokens:
            n_pages = shape.pages(n_tokens + n_new_tokens)
            return H * n_pages, n_pages
        most_tokens = min(n_tokens, H * n_kept - (H - 1) * self.safe_tokens(n_tokens))
        return most_pages(shape, n_kept + n_new_tokens), shape.pages(most_tokens + n_new_tokens)

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        n_pages, table_pages = self.sizes(shape, n_tokens, n_new_tokens)
        head_tokens = self.n_kept_tokens(n_tokens) + n_new_tokens
        found = heads_footprint(shape, n_pages=n_pages, head_tokens=head_tokens, table_pages=table_pages)
        return found + stock_footprint(shape, n_tokens, n_new_tokens)

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return {**super().effective_config(n_tokens, shape), "safeguard": self.config.safeguard}

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        n_pages, table_pages = self.sizes(prompt.shape, prompt.n_tokens, reserve_tokens)
        return HeadSequence(
            prompt,
            torch.device(device),
            kept=self.kept(prompt),
            n_pages=n_pages,
            table_pages=table_pages,
            reserve_tokens=reserve_tokens,
        )
