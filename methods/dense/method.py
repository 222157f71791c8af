"""Dense attention over preallocated pages: the baseline every other method is paired with."""

from dataclasses import dataclass
from typing import Any

from kvscope.methods.resident import StaticResidency
from kvscope.methods.shape import ModelShape
from kvscope.methods.store import PromptKV, TokenRange


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Dense has nothing to set."""


class Dense(StaticResidency[DenseConfig]):
    """Every token resident, every token read."""

    name = "dense"
    stays = "every token"
    saves = "nothing: the baseline in bytes, time and accuracy"
    source = "Vaswani et al., Attention Is All You Need, arXiv 1706.03762"
    cost = "resident = read = N tokens a layer"
    saving_kind = "resident"
    kv_refusal = ""
    Config = DenseConfig

    def n_resident_tokens(self, n_tokens: int, shape: ModelShape | None) -> int:
        return n_tokens

    def resident_ranges(self, prompt: PromptKV) -> list[TokenRange]:
        return [(0, prompt.n_tokens)]

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return {}
