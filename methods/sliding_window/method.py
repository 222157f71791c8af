"""StreamingLLM (arXiv 2309.17453): attention sinks and a ring of the last W tokens, with cache-relative positions."""

from dataclasses import dataclass
from typing import Any

import torch

from kvscope.errors import UsageError
from kvscope.methods.base import CacheMethod, SequenceCache
from kvscope.methods.budget import budget_tokens, check_budget, default_recency_tokens
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.sliding_window.sequence import StreamingSequence
from kvscope.methods.store import PromptKV
from kvscope.units import Bytes, Tokens

_ENDLESS_TOKENS = 2**40
"""A window that no context fills."""


@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig:
    """Options of ``sliding_window``.

    Attributes:
        sinks: first tokens of the prompt that always stay.
        window: last tokens that stay, the current one included; None: min(8192, max(128, length / 64)).
        budget_bytes: bytes for the prompt's KV over all layers, sinks included, instead of ``window``.
        budget_fraction: fraction of the prompt's tokens that stays, sinks included, instead of ``window``. A budget
            that holds the whole prompt evicts nothing, tokens decoded later included.
    """

    sinks: Tokens = 4
    window: Tokens | None = None
    budget_bytes: Bytes | None = None
    budget_fraction: float | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget_bytes, self.budget_fraction)
        if self.sinks < 0:
            raise ValueError(f"sinks must be 0 or more, got {self.sinks}")
        if self.window is not None:
            if self.window < 1:
                raise ValueError(f"window must be 1 or more, got {self.window}")
            if self.budget_bytes is not None or self.budget_fraction is not None:
                raise ValueError("a budget sets window, so give one of them")


class SlidingWindow(CacheMethod[SlidingWindowConfig]):
    """Sinks and the last W tokens; the rest is overwritten as decoding goes on."""

    name = "sliding_window"
    stays = "the first tokens (sinks) and the last W tokens, decoded ones included"
    saves = "bytes and reads are constant in the length; what leaves the window is lost"
    source = "Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"
    cost = "resident = read = sinks + W tokens a layer, W = min(8192, max(128, N/64)) unless set"
    saving_kind = "freed"
    spans_devices = True
    through_decode = True
    kv_refusal = "each step's token takes the place of the oldest one, and a packed page is written as a whole"
    Config = SlidingWindowConfig

    def unsupported(self, shape: ModelShape, device: torch.device | str) -> list[str]:
        reasons = self.unsupported_kv(shape, device)
        if not shape.unknown_rotation_layers:
            return reasons
        layers = ", ".join(map(str, shape.unknown_rotation_layers))
        return [*reasons, f"the position encoding of layers {layers} cannot be undone, which cache-relative sinks need"]

    def window_tokens(self, n_tokens: int, shape: ModelShape | None) -> int:
        """Return W for a prompt of ``n_tokens``."""
        budgeted = budget_tokens(self.name, n_tokens, options=self.config, shape=shape)
        if budgeted is None:
            return default_recency_tokens(n_tokens) if self.config.window is None else self.config.window
        if self.config.budget_fraction is not None and budgeted >= n_tokens:
            return _ENDLESS_TOKENS  # all of it, of a prompt of no more tokens than sinks, too
        # The sinks have pages of their own, so in whole pages they cost a page, not four tokens.
        sink_pages = shape.pages(self.config.sinks) * shape.page_tokens if shape else self.config.sinks
        taken = sink_pages if self.config.budget_bytes is not None else self.config.sinks
        if budgeted <= taken:
            raise UsageError(
                f"Method 'sliding_window': the budget holds {budgeted} of {n_tokens} tokens and the sinks take "
                f"{taken}, so no window is left; raise the budget."
            )
        return _ENDLESS_TOKENS if budgeted - taken >= n_tokens - self.config.sinks else budgeted - taken

    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        # The first query's own token is in the window, too.
        return self.config.sinks + self.window_tokens(n_tokens, shape) > n_tokens

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        W = self.window_tokens(n_tokens, shape)
        n_total = n_tokens + n_new_tokens
        n_sinks = min(self.config.sinks, n_tokens)
        n_resident = n_sinks + min(n_total - n_sinks, W)
        kv_bytes = shape.paged_kv_bytes(n_sinks) + shape.paged_kv_bytes(min(n_total - n_sinks, W))
        return Footprint(
            kv_bytes=kv_bytes + shape.stock_kv_bytes(n_tokens, n_new_tokens),
            bytes_read_per_step=shape.read_bytes(n_resident) + shape.stock_read_bytes(n_total),
            attention_flops_per_step=shape.attention_flops(n_resident) + shape.stock_attention_flops(n_total),
        )

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        window_tokens = self.window_tokens(n_tokens, shape)
        return {
            "sinks": min(self.config.sinks, n_tokens),
            "window": None if window_tokens == _ENDLESS_TOKENS else window_tokens,
            "budget_bytes": self.config.budget_bytes,
            "budget_fraction": self.config.budget_fraction,
        }

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        return StreamingSequence(
            prompt,
            torch.device(device),
            sinks=min(self.config.sinks, prompt.n_tokens),
            window_tokens=self.window_tokens(prompt.n_tokens, prompt.shape),
            reserve_tokens=reserve_tokens,
        )
