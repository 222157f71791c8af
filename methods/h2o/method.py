"""H2O (arXiv 2306.14048): a cache of fixed size: the tokens of most accumulated attention, and as many recent ones."""

from dataclasses import dataclass
from typing import Any

import torch

from kvscope.methods.base import AttentionCall, SequenceCache
from kvscope.methods.eviction.budget import EvictionConfig
from kvscope.methods.eviction.choice import top_tokens
from kvscope.methods.eviction.collectors import AccumulatedScores, ScoreCollector
from kvscope.methods.eviction.stepwise import StepwiseEviction, StepwiseSequence, key_scan
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.store import PromptKV


@dataclass(frozen=True, kw_only=True)
class H2OConfig(EvictionConfig):
    """Options of ``h2o``.

    Attributes:
        budget_tokens: most tokens a KV head holds, the one being decoded included; none: min(2048, max(128, length /
            16)).
        budget_fraction: the same as a fraction of the prompt's tokens; 1 evicts nothing, decoded tokens included.
        recent_fraction: share of the budget that the most recent tokens take.
    """

    recent_fraction: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent_fraction < 1:
            raise ValueError(f"recent_fraction must be 0 or more and below 1, got {self.recent_fraction}")


class H2O(StepwiseEviction[H2OConfig]):
    """Heavy hitters by the sum of all queries' weights, each KV head its own, and the recent tokens."""

    name = "h2o"
    stays = "of each KV head the tokens of most attention so far, as many recent ones; at every step the least leaves"
    saves = "bytes are constant, however long the answer; what drew little attention is lost"
    reads = "every resident token, and their keys, scores and positions once more to choose what leaves"
    source = "Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs, arXiv 2306.14048"
    cost = (
        "resident = B tokens a layer, decoded ones included, B = min(2048, max(128, N/16)) unless set, and 8 bytes a "
        "token and KV head; read = 1.5 B; the prefill writes out all attention once more"
    )
    Config = H2OConfig

    @property
    def least_tokens(self) -> int:
        return 2

    @property
    def least(self) -> str:
        return "a heavy hitter with a recent token"

    def recent_tokens(self, capacity: int) -> int:
        """Return how many recent tokens are safe, the one being decoded included."""
        return max(1, int(self.config.recent_fraction * capacity))

    def collector(self, layer: int) -> ScoreCollector:
        return AccumulatedScores(layer)

    def choosing(self, shape: ModelShape, *, held_tokens: int, room_tokens: int, capacity: int) -> Footprint:
        rows = len(shape.layers) * shape.n_kv_heads
        room = shape.pages(room_tokens) * shape.page_tokens
        held = Footprint(metadata_bytes=rows * (8 + 8 * room), bytes_read_per_step=rows * 8 * held_tokens)
        return held + key_scan(shape, held_tokens)

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        capacity = self.capacity_tokens(n_tokens)
        recent = None if capacity is None else self.recent_tokens(capacity)
        return {**super().effective_config(n_tokens, shape), "recent_tokens": recent}

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        return H2OSequence(self, prompt, torch.device(device), reserve_tokens=reserve_tokens)


class H2OSequence(StepwiseSequence):
    """One sequence under H2O: a score and a position beside each token held."""

    def __init__(self, method: H2O, prompt: PromptKV, device: torch.device, *, reserve_tokens: int) -> None:
        n_kept, N, H = method.n_kept_tokens(prompt.n_tokens), prompt.n_tokens, prompt.shape.n_kv_heads
        capacity = method.capacity_tokens(N)
        self._recent = 0 if capacity is None else method.recent_tokens(capacity)
        kept, scores = {}, {}
        for layer in prompt.shape.layers:
            kept[layer] = torch.arange(n_kept).expand(H, -1)
            if n_kept and capacity is not None:
                scores_HN = method.scores(prompt, layer)
                ranked_HN = scores_HN.clone()
                ranked_HN[:, max(0, N - self._recent) :] = torch.inf
                kept[layer] = top_tokens(ranked_HN, n_kept)
                scores[layer] = scores_HN.gather(1, kept[layer])
        super().__init__(method, prompt, device, kept=kept, reserve_tokens=reserve_tokens)
        self._scores: dict[int, torch.Tensor] = {}
        self._positions: dict[int, torch.Tensor] = {}
        if capacity is None:
            return
        for layer, pages in self._pool.pages.items():
            room = len(pages) * self.shape.page_tokens
            self._scores[layer] = torch.zeros((H, room), device=pages.device)
            self._positions[layer] = torch.zeros((H, room), dtype=torch.int32, device=pages.device)
            if n_kept:
                self._scores[layer][:, :n_kept] = scores[layer]
                self._positions[layer][:, :n_kept] = kept[layer]
            if n_kept == capacity:
                self._choose(layer)

    def _stored(self, layer: int, place_H: torch.Tensor) -> None:
        room = len(self._pool.pages[layer]) * self.shape.page_tokens
        for held in (self._scores, self._positions):
            old_HT = held[layer]
            if old_HT.shape[1] < room:
                held[layer] = torch.nn.functional.pad(old_HT, (0, room - old_HT.shape[1]))
        self._scores[layer].scatter_(1, place_H[:, None], 0.0)
        self._positions[layer].scatter_(1, place_H[:, None], self._lengths[layer] - 1)

    def _weighed(self, layer: int, call: AttentionCall, *, is_full: bool) -> None:
        self._scores[layer][:, : self._pool.lengths[layer]] += self._weights(layer, call).sum(1)
        if is_full:
            self._choose(layer)

    def _choose(self, layer: int) -> None:
        """Let the next token take the place of the least heavy hitter: the oldest recent token is one from then on."""
        n_held = self._pool.lengths[layer]
        is_recent_HT = self._positions[layer][:, :n_held] > self._lengths[layer] - self._recent
        score_HT = self._scores[layer][:, :n_held].masked_fill(is_recent_HT, torch.inf)
        self._places[layer].copy_(score_HT.argmin(1))

    def _metadata(self) -> list[torch.Tensor]:
        return [*super()._metadata(), *self._scores.values(), *self._positions.values()]

    def close(self) -> None:
        self._scores.clear()
        self._positions.clear()
        super().close()
