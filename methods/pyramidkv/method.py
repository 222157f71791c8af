"""PyramidKV (arXiv 2406.02069): SnapKV's scores, and budgets that fall from the first layer to the last."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from kvscope.methods.eviction.budget import PAPER_BUDGET_TOKENS
from kvscope.methods.eviction.kept import KeptTokens
from kvscope.methods.eviction.window import ByWindow, WindowConfig
from kvscope.methods.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class PyramidKVConfig(WindowConfig):
    """Options of ``pyramidkv``.

    Attributes:
        budget_tokens: tokens kept in each KV head, mean over the layers, the window included; none: min(2048, max(128,
            length / 16)).
        budget_fraction: the same as a fraction of the prompt's tokens.
        window_tokens: last tokens of the prompt, whose queries score the others; they stay.
        kernel_size: tokens that scores are pooled over, an odd number.
        pooling: avg or max.
        beta: how steep the pyramid is: the last layer keeps 1 / beta of the mean, the window aside.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta must be 1 or more, got {self.beta}")


class PyramidKV(ByWindow[PyramidKVConfig], KeptTokens[PyramidKVConfig]):
    """As ``snapkv``, with a budget for each layer; the budgets' mean is that of ``snapkv``."""

    name = "pyramidkv"
    stays = "as snapkv, more in the first layers and less in the last; decoded tokens"
    saves = "bytes and reads grow with the budget, not the prompt; what the window did not attend to is lost"
    source = (
        "Cai et al., PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv 2406.02069"
    )
    cost = "resident = read = B + decoded tokens a layer, mean over layers, B = min(2048, max(128, N/16)) unless set"
    paper_options: ClassVar[dict[str, Any]] = {"budget_tokens": PAPER_BUDGET_TOKENS}
    Config = PyramidKVConfig

    def ends(self, n_tokens: int) -> tuple[int, int]:
        """Return the tokens that the first managed layer keeps of a prompt, and the last."""
        kept, window = self.n_kept_tokens(n_tokens), self.config.window_tokens
        if kept >= n_tokens:
            return n_tokens, n_tokens
        mean, room = kept - window, n_tokens - window
        least = mean // self.config.beta
        most = 2 * mean - least
        if most > room:
            most, least = room, 2 * mean - room
        return window + most, window + least

    def layer_tokens(self, n_tokens: int, n_layers: int) -> list[int]:
        most, least = self.ends(n_tokens)
        if n_layers == 1:
            return [self.n_kept_tokens(n_tokens)]
        # Rounding half to even, exactly, keeps the sum: what one layer gains, its opposite loses.
        return [round(most - Fraction(i * (most - least), n_layers - 1)) for i in range(n_layers)]

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        most, least = self.ends(n_tokens)
        ends = {"beta": self.config.beta, "first_layer_tokens": most, "last_layer_tokens": least}
        return {**super().effective_config(n_tokens, shape), **ends}
