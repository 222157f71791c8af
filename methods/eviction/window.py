"""Options of the methods that go by SnapKV's scores, and their observation window."""

from dataclasses import dataclass
from typing import Any, TypeVar

from kvscope.methods.eviction.budget import EvictionConfig
from kvscope.methods.eviction.collectors import Pooling, ScoreCollector, WindowScores
from kvscope.methods.eviction.kept import Eviction
from kvscope.methods.shape import ModelShape
from kvscope.units import Tokens


@dataclass(frozen=True, kw_only=True)
class WindowConfig(EvictionConfig):
    """Options of every method that goes by SnapKV's scores.

    Attributes:
        window_tokens: last tokens of the prompt, whose queries score the others; they stay.
        kernel_size: tokens that scores are pooled over, an odd number.
        pooling: avg or max.
    """

    window_tokens: Tokens = 32
    kernel_size: Tokens = 5
    pooling: Pooling = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_tokens < 1:
            raise ValueError(f"window_tokens must be 1 or more, got {self.window_tokens}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd number, 1 or more, got {self.kernel_size}")


WindowConfigT = TypeVar("WindowConfigT", bound=WindowConfig)


class ByWindow(Eviction[WindowConfigT]):
    """Scores by an observation window at the end of the prompt, which always stays."""

    @property
    def least_tokens(self) -> int:
        return self.config.window_tokens

    @property
    def least(self) -> str:
        return "the observation window (window_tokens)"

    def collector(self, layer: int) -> ScoreCollector:
        config = self.config
        return WindowScores(
            layer, window_tokens=config.window_tokens, pooling=config.pooling, kernel_size=config.kernel_size
        )

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        config = self.config
        window = {"window_tokens": config.window_tokens, "kernel_size": config.kernel_size, "pooling": config.pooling}
        return {**super().effective_config(n_tokens, shape), **window}
