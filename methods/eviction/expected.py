"""Scores of expected attention (arXiv 2510.00636): the queries of a prompt, as a Gaussian, asked behind the prompt.

Shapes: N prompt tokens, Q query heads, H KV heads, G = Q/H, S tokens of a chunk, F future positions, D head size.
"""

from __future__ import annotations

import torch

from kvscope.methods.call import AttentionCall, Rotation
from kvscope.methods.eviction.collectors import ScoreCollector


class ExpectedScores(ScoreCollector):
    """Mean and covariance of the unrotated queries as the prompt passes; the scores at its end."""

    hears_attention = True

    def __init__(
        self, layer: int, *, future_tokens: int, sink_tokens: int, covariance: bool, value_norm: bool, epsilon: float
    ) -> None:
        """Make a collector; arguments as the options of ``expected_attention``."""
        settings = (future_tokens, sink_tokens, covariance, value_norm, epsilon)
        super().__init__("_".join(map(str, ("expected_attention", *settings))), layer)
        self._future, self._sinks = future_tokens, sink_tokens
        self._covariance, self._value_norm, self._epsilon = covariance, value_norm, epsilon
        self._moments: _Moments | None = None

    def attention(self, call: AttentionCall, *, start_tokens: int) -> None:
        q_QSD = call.query
        if call.rotation is not None:
            q_QSD = call.rotation.undo(q_QSD, start_tokens=start_tokens)
        q_QSD = q_QSD[0, :, max(0, self._sinks - start_tokens) :].float()
        if q_QSD.shape[1]:
            if self._moments is None:
                self._moments = _Moments(q_QSD, covariance=self._covariance)
            self._moments.add(q_QSD)
        if start_tokens + call.query.shape[2] == self._n_tokens:
            self._scores = self._at_the_end(call)
            self._moments = None

    def _at_the_end(self, call: AttentionCall) -> torch.Tensor:
        k_HND, v_HND = call.key[0], call.value[0]
        H, N, _ = k_HND.shape
        found_HN = torch.full((H, N), torch.inf, device=k_HND.device)
        if self._moments is None:
            return found_HN
        mean_QD, cov_QDD = self._moments.mean(), self._moments.covariance()
        if call.rotation is not None:
            mean_QD, cov_QDD = _averaged(call.rotation, mean_QD, cov_QDD, first=N, n_future=self._future)
        G = len(mean_QD) // H
        for head in range(H):
            k_TD = k_HND[head, self._sinks :].float()
            total_T = k_TD.new_zeros(len(k_TD))
            for query in range(head * G, head * G + G):
                logits_T = k_TD @ mean_QD[query] * call.scale
                if cov_QDD is not None:
                    logits_T += (k_TD @ cov_QDD[query] * k_TD).sum(-1) * (call.scale**2 / 2)
                total_T += torch.softmax(logits_T, -1)
            score_T = total_T / G
            if self._value_norm:
                score_T = (score_T + self._epsilon) * v_HND[head, self._sinks :].float().norm(dim=-1)
            found_HN[head, self._sinks :] = score_T
        return found_HN


class _Moments:
    """Sums of queries and of their products, about a point among them: far from it, differences would cancel."""

    def __init__(self, q_QSD: torch.Tensor, *, covariance: bool) -> None:
        self._about_Q1D = q_QSD.mean(1, keepdim=True)
        Q, _, D = q_QSD.shape
        self._n = 0
        self._sum_QD = q_QSD.new_zeros((Q, D))
        self._products_QDD = q_QSD.new_zeros((Q, D, D)) if covariance else None

    def add(self, q_QSD: torch.Tensor) -> None:
        apart_QSD = q_QSD - self._about_Q1D
        self._n += q_QSD.shape[1]
        self._sum_QD += apart_QSD.sum(1)
        if self._products_QDD is not None:
            self._products_QDD += apart_QSD.transpose(1, 2) @ apart_QSD

    def mean(self) -> torch.Tensor:
        """Return [Q, D]."""
        return self._about_Q1D[:, 0] + self._sum_QD / self._n

    def covariance(self) -> torch.Tensor | None:
        """Return [Q, D, D], divided by the count; None where it was not asked for."""
        if self._products_QDD is None:
            return None
        mean_QD = self._sum_QD / self._n
        return self._products_QDD / self._n - mean_QD[:, :, None] * mean_QD[:, None, :]


def _averaged(
    rotation: Rotation, mean_QD: torch.Tensor, cov_QDD: torch.Tensor | None, *, first: int, n_future: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return mean and covariance turned by the mean of the rotations of positions ``first`` and up (section 3.2).

    A rotation is linear in its tables, so the mean rotation is the one by mean tables.
    """
    position_F1 = torch.arange(first, first + n_future, device=mean_QD.device)[:, None]
    cos, sin = (table.mean(0, keepdim=True) for table in rotation.angles_at(position_F1))

    def turned(x_QSD: torch.Tensor) -> torch.Tensor:
        return rotation.back_by(x_QSD[None], cos, -sin)[0]

    mean_QD = turned(mean_QD[:, None])[:, 0]
    if cov_QDD is not None:
        cov_QDD = turned(turned(cov_QDD).transpose(1, 2))
    return mean_QD, cov_QDD
