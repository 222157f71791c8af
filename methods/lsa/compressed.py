"""The indexer of the released FlashMemory-DeepSeek-V4: lookahead queries over the model's own compressed keys.

arXiv 2606.09079. DeepSeek-V4 keeps one indexer key for every compressed entry (four tokens), so only the query side is
learned. For each indexed layer, from the hidden state h entering attention at position p:

    q = Hadamard(RoPE_p(W_IUQ RMSNorm(W_DQ h)))    RoPE on the last dims of each head, YaRN frequencies, interleaved
    w = W_w h * I^-0.5 * E^-0.5
    logit(entry) = sum_h w_h relu(q_h . k_entry),   score = sigmoid(logit), maximum over the indexed layers

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
from kvscope.methods.lsa.selection import Rule, Selector

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class QueryWeights:
    """The query side of one indexed layer, fp32.

    Attributes:
        w_dq_RM: down projection.
        norm_R: weight of the RMS norm behind it.
        w_iuq_OR: up projection, O = I * E.
        w_w_IM: head weights.
    """

    w_dq_RM: torch.Tensor
    norm_R: torch.Tensor
    w_iuq_OR: torch.Tensor
    w_w_IM: torch.Tensor

    def __post_init__(self) -> None:
        R, M = (*self.w_dq_RM.shape, 0, 0)[:2]
        heads, rows = (each.shape[0] if each.dim() else 0 for each in (self.w_w_IM, self.w_iuq_OR))
        fits = self.norm_R.shape == (R,) and self.w_iuq_OR.shape == (rows, R) and self.w_w_IM.shape == (heads, M)
        if self.w_dq_RM.shape != (R, M) or not fits or 0 in (R, M, heads, rows):
            raise ValueError(
                f"W_DQ {tuple(self.w_dq_RM.shape)}, norm {tuple(self.norm_R.shape)}, W_IUQ "
                f"{tuple(self.w_iuq_OR.shape)} and W_w {tuple(self.w_w_IM.shape)} do not fit together"
            )
        if rows % heads:
            raise ValueError(f"W_IUQ has {rows} rows, which {heads} heads do not divide")
        if self.key_dim & (self.key_dim - 1):
            raise ValueError(f"keys of {self.key_dim} entries have no Hadamard matrix of this kind: a power of two is")

    @property
    def heads(self) -> int:
        """I."""
        return self.w_w_IM.shape[0]

    @property
    def key_dim(self) -> int:
        """E."""
        return self.w_iuq_OR.shape[0] // self.heads

    def to(self, device: torch.device) -> "QueryWeights":
        """Return the weights on a device."""
        return QueryWeights(
            w_dq_RM=self.w_dq_RM.to(device), norm_R=self.norm_R.to(device), w_iuq_OR=self.w_iuq_OR.to(device),
            w_w_IM=self.w_w_IM.to(device),
        )  # fmt: skip

    @property
    def n_bytes(self) -> int:
        """Bytes of the four matrices."""
        return sum(matrix.nbytes for matrix in (self.w_dq_RM, self.norm_R, self.w_iuq_OR, self.w_w_IM))

    def queries(
        self, hidden_M: torch.Tensor, cos_P: torch.Tensor, sin_P: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries [I, E], rotated and turned, and head weights [I] with both scales in them; fp32.

        Args:
            hidden_M: entering attention (normed, streams collapsed).
            cos_P, sin_P: of the hidden state's position, one a rotating pair.
        """
        h = hidden_M.float()
        low_R = self.w_dq_RM @ h
        low_R = low_R * torch.rsqrt(low_R.square().mean() + NORM_EPS) * self.norm_R
        q_IE = hadamard(rotate_last(
            (self.w_iuq_OR @ low_R).view(self.heads, self.key_dim), cos_P.float(), sin_P.float()
        ))  # fmt: skip
        return q_IE, self.w_w_IM @ h * (self.heads * self.key_dim) ** -0.5


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
            q_IE, w_I = weights.queries(hidden_M[layer], cos_P, sin_P)
            per_layer.append(w_I @ torch.relu(q_IE @ dequantize(*keys[layer]).T))
        best_n: torch.Tensor = torch.stack(per_layer).amax(0)
        return best_n

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


def rotate_last(x_IE: torch.Tensor, cos_P: torch.Tensor, sin_P: torch.Tensor) -> torch.Tensor:
    """Rotate the last 2P entries of each row, pair by neighbouring pair; the others stay."""
    n = 2 * len(cos_P)
    even, odd = x_IE[:, -n::2], x_IE[:, x_IE.shape[1] - n + 1 :: 2]
    turned = torch.stack((even * cos_P - odd * sin_P, odd * cos_P + even * sin_P), -1).flatten(-2)
    return torch.cat((x_IE[:, :-n], turned), -1)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Multiply the last dimension (a power of two) by the orthonormal Hadamard matrix of Sylvester's construction."""
    size = x.shape[-1]
    shape, width = x.shape, 1
    while width < size:
        x = x.view(*shape[:-1], -1, 2, width)
        x = torch.stack((x[..., 0, :] + x[..., 1, :], x[..., 0, :] - x[..., 1, :]), -2).reshape(shape)
        width *= 2
    scaled: torch.Tensor = x * size**-0.5
    return scaled


Angles = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


class CompressedSelector(Selector):
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
        self._states = {layer: hidden_BM[0] for layer, hidden_BM in states.items()}
        self._incoming: dict[int, torch.Tensor] = {}
        self._position = n_tokens - 1
        if n_entries:
            self.metadata_bytes = sum(k.nbytes + scale.nbytes for k, scale in self._keys.values()) + sum(
                state.nbytes for state in self._states.values()
            )
            self.refresh_bytes = indexer.refresh_bytes(n_entries)
            self.refresh_flops = indexer.scoring_flops(n_entries)

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        self._incoming[layer] = hidden_BM[0]

    def end_step(self) -> None:
        self._states, self._incoming = self._incoming, {}
        self._position += 1

    def choose(self) -> torch.Tensor:
        if not self._keys:
            return torch.empty(0, dtype=torch.long)
        cos_P, sin_P = self._angles(self._position)
        return self._rule.of_logits(self.watch(self._indexer.logits(self._states, cos_P, sin_P, self._keys)))

    def close(self) -> None:
        self._keys, self._states, self._incoming = {}, {}, {}
