"""The indexer of the released FlashMemory-DeepSeek-V4: lookahead queries over the model's own compressed keys.

arXiv 2606.09079. DeepSeek-V4 keeps one indexer key for every compressed entry (four tokens), so only the query side is
learned (``compressed_query`` has its equations). An entry's score is the maximum over the indexed layers.

Keys are turned by the same (orthonormal) Hadamard matrix before they are rounded to fp8 with one fp32 scale each: it
spreads outliers over the dimensions and leaves every product as it was.

Shapes: M hidden size, R rank, I heads, E key size, n entries, P pairs that rotate (half the rotated dims).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvscope.methods.compressed_flops import refresh_flops
from kvscope.methods.fp8_keys import dequantize, quantize
from kvscope.methods.lsa.compressed_query import EntryLayer, QueryWeights, hadamard
from kvscope.methods.lsa.indexer import Indexer
from kvscope.methods.lsa.rule import Rule
from kvscope.methods.lsa.selection import ScoringSelector


@dataclass(frozen=True, kw_only=True)
class CompressedIndexer:
    """The query sides of all indexed layers; the memory side is the model's own key of a compressed entry."""

    encoder: ClassVar[str] = "compressed_key"
    layers: dict[int, QueryWeights]

    def to(self, device: torch.device) -> "CompressedIndexer":
        """Return the indexer on a device."""
        return CompressedIndexer(layers={layer: weights.to(device) for layer, weights in self.layers.items()})

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, which serve every sequence."""
        return sum(weights.n_bytes for weights in self.layers.values())

    def metadata_bytes(self, n_entries: int, *, element_bytes: int) -> int:
        """Return the device bytes kept of one sequence: keys of the candidate entries, and the states to score with."""
        return sum(
            n_entries * key_bytes(weights.key_dim) + weights.w_dq_RM.shape[1] * element_bytes
            for weights in self.layers.values()
        )

    def refresh_bytes(self, n_entries: int) -> int:
        """Return the bytes one refresh reads: every key with its scale, and the weights."""
        return self.weight_bytes + sum(n_entries * key_bytes(weights.key_dim) for weights in self.layers.values())

    def scoring_flops(self, n_entries: int) -> int:
        """FLOPs of one refresh (a MAC is two): projections, Hadamard transform, products and their weighted sum."""
        return sum(
            refresh_flops(
                n_weights=weights.w_dq_RM.numel() + weights.w_iuq_OR.numel() + weights.w_w_IM.numel(),
                heads=weights.heads,
                key_dim=weights.key_dim,
                n_entries=n_entries,
            )
            for weights in self.layers.values()
        )

    def logits(
        self,
        hidden_M: dict[int, torch.Tensor],
        cos_P: torch.Tensor,
        sin_P: torch.Tensor,
        keys: dict[int, tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Return every entry's score before the sigmoid, maximum over the indexed layers, fp32 [n].

        Args:
            hidden_M: indexed layer -> hidden state.
            keys: indexed layer -> what ``stored_keys`` gave.
        """
        per_layer = []
        for layer, weights in self.layers.items():
            keys_nE = dequantize(*keys[layer])
            per_layer.append(weights.logits(hidden_M[layer][None], cos_P[None], sin_P[None], keys_nE)[0])
        best_n: torch.Tensor = torch.stack(per_layer).amax(0)
        return best_n

    @classmethod
    def of(cls, indexer: Indexer) -> "CompressedIndexer":
        """Return a trained indexer as it is scored with.

        Raises:
            ValueError: it reads no compressed keys.
        """
        layers = {layer: indexer.layer(layer) for layer in indexer.config.layers}
        found = {layer: each.weights() for layer, each in layers.items() if isinstance(each, EntryLayer)}
        if len(found) < len(layers):
            raise ValueError(f"encoder {indexer.config.encoder!r} makes keys of its own")
        return cls(layers=found)

    @classmethod
    def random(
        cls, layers: tuple[int, ...], *, hidden_size: int, rank: int, heads: int, key_dim: int, seed: int
    ) -> "CompressedIndexer":
        """Return an indexer of random weights: right bytes and times, choices that mean nothing."""
        draws = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            drawn: torch.Tensor = torch.randn(rows, columns, generator=draws) * columns**-0.5
            return drawn

        return cls(
            layers={
                layer: QueryWeights(
                    w_dq_RM=matrix(rank, hidden_size),
                    norm_R=torch.ones(rank),
                    w_iuq_OR=matrix(heads * key_dim, rank),
                    w_w_IM=matrix(heads, hidden_size),
                )
                for layer in layers
            }
        )


def stored_keys(k_nE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the model's indexer keys as they are kept to be scored: turned, fp8 [n, E], and scales [n]."""
    return quantize(hadamard(k_nE.float()))


def key_bytes(key_dim: int) -> int:
    """Return the bytes of one stored key: 132 for 128 entries."""
    return key_dim + 4


Angles = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


class CompressedSelector(ScoringSelector):
    """Chooses among the candidate entries of one sequence by a compressed indexer."""

    def __init__(
        self,
        indexer: CompressedIndexer,
        keys: dict[int, torch.Tensor],
        states: dict[int, torch.Tensor],
        *,
        rule: Rule,
        n_tokens: int,
        angles: Angles,
    ) -> None:
        """Store the candidates' keys as they are scored.

        Args:
            indexer: on the device of ``keys``.
            keys: indexed layer -> the model's own indexer keys of the candidate entries [n, E].
            states: indexed layer -> hidden state of the last prefilled token entering attention [B, M]; may be empty
                where there is no candidate.
            rule: which scores are enough.
            n_tokens: of the prompt: the states are those of token ``n_tokens - 1``.
            angles: position -> cosine and sine of the layers' rotation [P].
        """
        self._indexer, self._rule, self._angles = indexer, rule, angles
        n_entries = len(next(iter(keys.values())))
        self._keys = {layer: stored_keys(k_nE) for layer, k_nE in keys.items()} if n_entries else {}
        # Written by each step in place: a captured one has fixed addresses.
        self._states = {layer: hidden_BM[0].clone() for layer, hidden_BM in states.items()}
        self._position = n_tokens - 1
        self.n_chosen = rule.n_chunks if n_entries else 0
        if n_entries:
            self.metadata_bytes = sum(k.nbytes + scale.nbytes for k, scale in self._keys.values()) + sum(
                state.nbytes for state in self._states.values()
            )
            self.refresh_bytes = indexer.refresh_bytes(n_entries)
            self.refresh_flops = indexer.scoring_flops(n_entries)

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        if self._keys:
            self._states[layer].copy_(hidden_BM[0])

    def end_step(self) -> None:
        self._position += 1

    def logits(self) -> torch.Tensor:
        cos_P, sin_P = self._angles(self._position)
        return self._indexer.logits(self._states, cos_P, sin_P, self._keys)[None]

    def choose(self) -> torch.Tensor:
        if not self._keys:
            return torch.empty(0, dtype=torch.long)
        return self._rule.of_logits(self.watch(self.logits())[0])

    def close(self) -> None:
        self._keys, self._states = {}, {}
