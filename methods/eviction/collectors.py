"""Scores of prompt tokens, made in the one prefill that all methods share.

Every collector leaves [H, N] in fp32 in host memory, or [1, N] where all heads go by the same; +inf where a token stays
whatever its score. Positions are those of the tokens the method starts behind: where it starts at the question, the
last query is the last one before the question.

Shapes: N prompt tokens, Q query heads, H KV heads, G = Q/H, W queries of a window, S tokens of a chunk, D head size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from kvscope.methods.base import AttentionCall, Collector
from kvscope.methods.eviction.weights import attention_weights

Pooling = Literal["avg", "max"]
#: Most logits written out at once, so that a long prompt's attention does not fill the device: 64 MiB in fp32.
MOST_LOGITS = 2**24


class ScoreCollector(Collector):
    """What the collectors below share. A prompt of no tokens leaves an empty tensor."""

    def __init__(self, name: str, layer: int) -> None:
        self.name, self.layer = name, layer
        self._n_tokens = 0
        self._scores: torch.Tensor | None = None

    def begin(self, n_tokens: int) -> None:
        self._n_tokens = n_tokens

    def chunk(self, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, hidden_BSM: torch.Tensor, *, start_tokens: int) -> None:
        """Most go by attention alone."""

    def finish(self) -> torch.Tensor:
        if self._scores is None:
            if self._n_tokens:
                raise ValueError(f"the prefill of this model's cache does not say what '{self.name}' goes by")
            return torch.empty(0)
        found, self._scores = self._scores.cpu(), None
        return found


class WindowScores(ScoreCollector):
    """SnapKV's: what the last W tokens attend to, mean over them, pooled along the tokens, mean over a head's group."""

    hears_attention = True

    def __init__(self, layer: int, *, window_tokens: int, pooling: Pooling, kernel_size: int) -> None:
        super().__init__(f"window_attention_{window_tokens}_{pooling}_{kernel_size}", layer)
        self._window, self._pooling, self._kernel = window_tokens, pooling, kernel_size
        self._queries_QWD: torch.Tensor | None = None

    def attention(self, call: AttentionCall, *, start_tokens: int) -> None:
        end = start_tokens + call.query.shape[2]
        first = self._n_tokens - self._window
        if end <= first:
            return
        # A copy: the window's queries may come in two chunks, and outlive what the first computed.
        part_QSD = call.query[0, :, max(0, first - start_tokens) :].clone()
        held = self._queries_QWD
        self._queries_QWD = part_QSD if held is None else torch.cat([held, part_QSD], 1)
        if end == self._n_tokens:
            self._scores = window_scores(
                self._queries_QWD, call.key[0], call=call, pooling=self._pooling, kernel_size=self._kernel
            )
            self._queries_QWD = None


def window_scores(
    q_QWD: torch.Tensor, k_HND: torch.Tensor, *, call: AttentionCall, pooling: Pooling, kernel_size: int
) -> torch.Tensor:
    """Return SnapKV's scores [H, N] (section 4 of the paper), +inf for the window, the last W of the N tokens.

    A head's score is the mean over its group, as kvpress has it: the authors' code stores a key for each query head.
    The pooling is theirs: over the tokens before the window alone, zeros (or nothing, ``max``) beyond both ends.
    """
    (H, N, _), W = k_HND.shape, q_QWD.shape[1]
    found_HN = torch.full((H, N), torch.inf, device=k_HND.device)
    if N <= W:
        return found_HN
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    for head, q_GWD in enumerate(q_QWD.view(H, -1, *q_QWD.shape[1:])):
        mean_GN = attention_weights(q_GWD, k_HND[head], call=call, head=head)[..., : N - W].mean(1)
        pooled_GN = pool(mean_GN, kernel_size, stride=1, padding=kernel_size // 2)
        found_HN[head, : N - W] = pooled_GN.mean(0)
    return found_HN


class KeyNorms(ScoreCollector):
    """The negative L2 norm of each key, which rotation does not change."""

    def __init__(self, layer: int) -> None:
        super().__init__("negative_key_norm", layer)
        self._parts: list[torch.Tensor] = []

    def chunk(self, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, hidden_BSM: torch.Tensor, *, start_tokens: int) -> None:
        self._parts.append(-k_BHSD[0].float().norm(dim=-1).cpu())

    def finish(self) -> torch.Tensor:
        if self._parts:
            self._scores = torch.cat(self._parts, 1)
            self._parts.clear()
        return super().finish()


class LastQueryScores(ScoreCollector):
    """TOVA's: the weights of the last query alone, mean over all heads of the layer, [1, N]."""

    hears_attention = True

    def __init__(self, layer: int) -> None:
        super().__init__("last_query_attention", layer)

    def attention(self, call: AttentionCall, *, start_tokens: int) -> None:
        if start_tokens + call.query.shape[2] < self._n_tokens:
            return
        k_HND = call.key[0]
        q_HGSD = call.query[0, :, -1:].view(len(k_HND), -1, 1, call.query.shape[3])
        weights = [
            attention_weights(q_GSD, k_ND, call=call, head=head)
            for head, (q_GSD, k_ND) in enumerate(zip(q_HGSD, k_HND, strict=True))
        ]
        self._scores = torch.stack(weights).mean((0, 1, 2))[None]


class AccumulatedScores(ScoreCollector):
    """H2O's: the sum of every query's weights, and over a KV head's group. All attention is computed for it once more.

    It is written out in tiles of ``MOST_LOGITS`` and summed at once, so it adds time and hardly any bytes.
    """

    hears_attention = True

    def __init__(self, layer: int) -> None:
        super().__init__("accumulated_attention", layer)

    def attention(self, call: AttentionCall, *, start_tokens: int) -> None:
        k_HTD = call.key[0]
        H, T, _ = k_HTD.shape
        if self._scores is None:
            self._scores = torch.zeros((H, self._n_tokens), device=k_HTD.device)
        q_HGSD = call.query[0].view(H, -1, *call.query.shape[2:])
        G, S = q_HGSD.shape[1:3]
        tile = max(1, MOST_LOGITS // (G * T))
        for head in range(H):
            for first in range(0, S, tile):
                q_GSD = q_HGSD[head, :, first : first + tile]
                n_seen = T - S + first + q_GSD.shape[1]
                weights_GST = attention_weights(q_GSD, k_HTD[head, :n_seen], call=call, head=head)
                self._scores[head, :n_seen] += weights_GST.sum((0, 1))
