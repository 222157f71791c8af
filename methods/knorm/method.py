"""Key norm (arXiv 2406.11430): the keys of smallest L2 norm stay, chosen once, when the prompt ends."""

from dataclasses import dataclass

from kvscope.methods.eviction.budget import EvictionConfig
from kvscope.methods.eviction.collectors import KeyNorms, ScoreCollector
from kvscope.methods.eviction.kept import KeptTokens


@dataclass(frozen=True, kw_only=True)
class KNormConfig(EvictionConfig):
    """Options of ``knorm``.

    Attributes:
        budget_tokens: tokens kept in each KV head; none: min(2048, max(128, length / 16)).
        budget_fraction: the same as a fraction of the prompt's tokens.
    """


class KNorm(KeptTokens[KNormConfig]):
    """The tokens of the smallest keys, and every decoded token."""

    name = "knorm"
    stays = "of each KV head the tokens whose keys have the smallest norm, decoded tokens"
    saves = "bytes and reads grow with the budget, not the prompt; tokens of large keys are lost"
    source = "Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430"
    cost = "resident = read = B + decoded tokens a layer, B = min(2048, max(128, N/16)) unless set"
    Config = KNormConfig

    def collector(self, layer: int) -> ScoreCollector:
        return KeyNorms(layer)
