"""SnapKV chosen anew every n steps while decoding, which is what kvpress's DecodingPress does.

Between two choices the cache grows by a token a step; then the last queries score it, and it is cut to the budget.

Shapes: Q query heads, H KV heads, W queries of a window, T tokens held, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kvscope.methods.base import AttentionCall
from kvscope.methods.eviction.choice import top_tokens
from kvscope.methods.eviction.collectors import Pooling, window_scores
from kvscope.methods.eviction.kept import KeptSequence
from kvscope.methods.shape import Footprint, ModelShape, tensor_bytes
from kvscope.methods.store import PagePool, PromptKV


@dataclass(frozen=True, kw_only=True)
class Reapplied:
    """When a choice is made, and by what.

    Attributes:
        interval_steps: decode steps from one choice to the next.
        budget_tokens: tokens a KV head holds after one.
        window_tokens: last queries that score, no more than ``interval_steps``.
        pooling, kernel_size: as in ``window_scores``.
    """

    interval_steps: int
    budget_tokens: int
    window_tokens: int
    pooling: Pooling
    kernel_size: int

    def held_tokens(self, n_kept: int, n_steps: int) -> tuple[int, int]:
        """Return the tokens a KV head holds ``n_steps`` after it kept ``n_kept`` of a prompt, and the most it held."""
        n_choices, n_since = divmod(n_steps, self.interval_steps)
        held = most = n_kept
        for _ in range(n_choices):
            most = max(most, held + self.interval_steps)
            held = min(held + self.interval_steps, self.budget_tokens)
        return held + n_since, max(most, held + n_since)

    def queries(self, shape: ModelShape) -> Footprint:
        """Return what the window's queries take: an element is as large as one of K."""
        elements = len(shape.layers) * shape.n_q_heads * self.window_tokens * shape.head_dim
        return Footprint(metadata_bytes=elements * shape.element_bytes)


class ReappliedSequence(KeptSequence):
    """As ``KeptSequence``; every so many steps each layer keeps what its last queries attend to."""

    def __init__(
        self,
        prompt: PromptKV,
        device: torch.device,
        *,
        kept: Mapping[int, torch.Tensor],
        rule: Reapplied,
        reserve_tokens: int = 0,
    ) -> None:
        n_kept = kept[prompt.shape.layers[0]].shape[1]
        _, most = rule.held_tokens(n_kept, reserve_tokens)
        super().__init__(prompt, device, kept=kept, reserve_tokens=most - n_kept)
        self._rule = rule
        self._n_prompt = prompt.n_tokens
        self._fed = dict.fromkeys(self.shape.layers, 0)
        size = (self.shape.n_q_heads, rule.window_tokens, self.shape.head_dim)
        self._queries_QWD = {
            layer: torch.zeros(size, dtype=prompt.dtype, device=self.shape.device_of(layer, device))
            for layer in self.shape.layers
        }

    @property
    def n_tokens(self) -> int:
        return self._n_prompt + self._fed[self.shape.layers[-1]]

    def static_reasons(self) -> list[str]:
        return ["what stays is chosen anew every interval_steps"]

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        attended = super().attend(layer, call)
        rule, queries_QWD = self._rule, self._queries_QWD[layer]
        queries_QWD[:, self._fed[layer] % rule.window_tokens] = call.query[0, :, 0]
        self._fed[layer] += 1
        if self._fed[layer] % rule.interval_steps == 0:
            self._choose(layer, call)
        return attended

    def _choose(self, layer: int, call: AttentionCall) -> None:
        rule, pool = self._rule, self._pool_of[layer]
        n_held, n_kept, P = pool.lengths[layer], rule.budget_tokens, self.shape.page_tokens
        if n_held <= n_kept:
            return
        assert isinstance(pool, PagePool)  # ``SnapKV`` refuses packed ones
        pages = pool.pages[layer]
        # The ring's oldest query is where the next one would go.
        q_QWD = self._queries_QWD[layer].roll(-(self._fed[layer] % rule.window_tokens), 1)
        k_HTD = pages[:, :, 0].transpose(0, 1).flatten(1, 2)[:, :n_held]
        scores_HT = window_scores(q_QWD, k_HTD, call=call, pooling=rule.pooling, kernel_size=rule.kernel_size)
        token_HN = top_tokens(scores_HT, n_kept)
        head_H1 = torch.arange(len(token_HN), device=pages.device)[:, None]
        packed = pages[token_HN // P, head_H1, :, token_HN % P]
        pages.zero_()  # what left is not kept out of sight
        to = torch.arange(n_kept, device=pages.device)
        pages[to // P, head_H1, :, to % P] = packed
        pool.lengths[layer] = n_kept

    def managed_footprint(self) -> Footprint:
        return replace(super().managed_footprint(), metadata_bytes=tensor_bytes(self._queries_QWD.values()))

    def close(self) -> None:
        self._queries_QWD.clear()
        super().close()
