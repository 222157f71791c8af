"""TOVA (arXiv 2401.06104): a cache of fixed size, which drops the token that the last query attends to least."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvscope.methods.base import AttentionCall, SequenceCache
from kvscope.methods.eviction.budget import PAPER_BUDGET_TOKENS, EvictionConfig
from kvscope.methods.eviction.choice import top_tokens
from kvscope.methods.eviction.collectors import LastQueryScores, ScoreCollector
from kvscope.methods.eviction.stepwise import StepwiseEviction, StepwiseSequence, key_scan
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.store import PromptKV


@dataclass(frozen=True, kw_only=True)
class TovaConfig(EvictionConfig):
    """Options of ``tova``.

    Attributes:
        budget_tokens: most tokens a KV head holds, the one being decoded included; none: min(2048, max(128, length /
            16)).
        budget_fraction: the same as a fraction of the prompt's tokens; 1 evicts nothing, decoded tokens included.
    """


class Tova(StepwiseEviction[TovaConfig]):
    """The same tokens for all heads of a layer, by the mean of their weights."""

    name = "tova"
    stays = "as many tokens as the budget: at every step the one that the last query attends to least leaves"
    saves = "bytes are constant, however long the answer; what a query attended to least is lost"
    reads = "every resident token; where the budget is full, the keys once more to choose what leaves"
    source = "Oren et al., Transformers are Multi-State RNNs, arXiv 2401.06104"
    cost = "resident = B tokens a layer, decoded ones included, B = min(2048, max(128, N/16)) unless set; read = 1.5 B"
    paper_options: ClassVar[dict[str, Any]] = {"budget_tokens": PAPER_BUDGET_TOKENS}
    Config = TovaConfig

    def collector(self, layer: int) -> ScoreCollector:
        return LastQueryScores(layer)

    def choosing(self, shape: ModelShape, *, held_tokens: int, room_tokens: int, capacity: int) -> Footprint:
        places = Footprint(metadata_bytes=len(shape.layers) * shape.n_kv_heads * 8)
        return places + key_scan(shape, held_tokens) if held_tokens == capacity else places

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        return TovaSequence(self, prompt, torch.device(device), reserve_tokens=reserve_tokens)


class TovaSequence(StepwiseSequence):
    """One sequence under TOVA."""

    def __init__(self, method: Tova, prompt: PromptKV, device: torch.device, *, reserve_tokens: int) -> None:
        n_kept, H = method.n_kept_tokens(prompt.n_tokens), prompt.shape.n_kv_heads
        capacity = method.capacity_tokens(prompt.n_tokens)
        kept, least = {}, {}
        for layer in prompt.shape.layers:
            kept[layer] = torch.arange(n_kept).expand(H, -1)
            if n_kept and capacity is not None:
                scores_1N = method.scores(prompt, layer)
                token_1N = top_tokens(scores_1N, n_kept)
                kept[layer] = token_1N.expand(H, -1)
                least[layer] = scores_1N.gather(1, token_1N).argmin(1)
        super().__init__(method, prompt, device, kept=kept, reserve_tokens=reserve_tokens)
        for layer, place_1 in least.items():
            self._places[layer].copy_(place_1.expand(H))

    def _weighed(self, layer: int, call: AttentionCall, *, is_full: bool) -> None:
        if is_full:
            mean_T = self._weights(layer, call).mean((0, 1))
            self._places[layer].fill_(mean_T.argmin())
