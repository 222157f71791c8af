"""Expected attention (arXiv 2510.00636): the queries to come are a Gaussian; what they expect to attend to stays."""

from dataclasses import dataclass
from typing import Any

import torch

from kvscope.methods.eviction.budget import EvictionConfig
from kvscope.methods.eviction.collectors import ScoreCollector
from kvscope.methods.eviction.expected import ExpectedScores
from kvscope.methods.eviction.kept import KeptTokens
from kvscope.methods.shape import ModelShape
from kvscope.units import Tokens


@dataclass(frozen=True, kw_only=True)
class ExpectedAttentionConfig(EvictionConfig):
    """Options of ``expected_attention``.

    Attributes:
        budget_tokens: tokens kept in each KV head, sinks included; none: min(2048, max(128, length / 16)).
        budget_fraction: the same as a fraction of the prompt's tokens.
        future_tokens: positions behind the prompt that the queries' rotation is averaged over.
        sink_tokens: first tokens of the prompt, which always stay and are left out of the queries' statistics.
        covariance: whether the spread of the queries counts, beside their mean.
        value_norm: whether a score is multiplied by the norm of the token's value.
        epsilon: added to a score before that.
    """

    future_tokens: Tokens = 512
    sink_tokens: Tokens = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future_tokens < 1:
            raise ValueError(f"future_tokens must be 1 or more, got {self.future_tokens}")
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must be 0 or more, got {self.sink_tokens}")
        if not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon must be 0 or more, got {self.epsilon}")


class ExpectedAttention(KeptTokens[ExpectedAttentionConfig]):
    """Sinks, the tokens of highest expected attention, and every decoded token."""

    name = "expected_attention"
    stays = "of each KV head the tokens that queries to come are expected to attend to, sinks, decoded tokens"
    saves = "bytes and reads grow with the budget, not the prompt; what is not expected to be read is lost"
    source = (
        "Devoto et al., Expected Attention: KV Cache Compression by Estimating Attention from Future Queries "
        "Distribution, arXiv 2510.00636"
    )
    cost = "resident = read = B + decoded tokens a layer, B = min(2048, max(128, N/16)) unless set"
    Config = ExpectedAttentionConfig

    @property
    def least_tokens(self) -> int:
        return max(1, self.config.sink_tokens)

    @property
    def least(self) -> str:
        return "the set of sinks (sink_tokens)"

    def unsupported(self, shape: ModelShape, device: torch.device | str) -> list[str]:
        reasons = self.unsupported_kv(shape, device)
        if not shape.unknown_rotation_layers:
            return reasons
        layers = ", ".join(map(str, shape.unknown_rotation_layers))
        return [
            *reasons,
            f"the position encoding of layers {layers} cannot be undone, which the mean of the queries needs",
        ]

    def collector(self, layer: int) -> ScoreCollector:
        config = self.config
        return ExpectedScores(
            layer,
            future_tokens=config.future_tokens,
            sink_tokens=config.sink_tokens,
            covariance=config.covariance,
            value_norm=config.value_norm,
            epsilon=config.epsilon,
        )

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        keys = ("future_tokens", "sink_tokens", "covariance", "value_norm", "epsilon")
        return {**super().effective_config(n_tokens, shape), **{key: getattr(self.config, key) for key in keys}}
