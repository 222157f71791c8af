"""What an indexer of ``lsa`` is, apart from its weights: sizes, the model it belongs to, and what it costs.

Letters are those of ``indexer``: M hidden size, R rank, I indexer heads, E key size, F features a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvscope.methods.fp8_keys import SCALE_BYTES
from kvscope.methods.lsa.layout import bound_of, bounds_error

Features = Literal["stats", "tokens", "entries"]
EncoderKind = Literal["mean", "stats", "pooled", "compressed_key"]
COMPRESSED_KEY: EncoderKind = "compressed_key"
ENCODER_FEATURES: dict[str, Features] = {
    "mean": "stats", "stats": "stats", "pooled": "tokens", COMPRESSED_KEY: "entries"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """What an indexer is, and which model it was trained for.

    Attributes:
        model: name of that model.
        model_revision: identity of its weights (``ModelShape.revision``).
        layers: indexed layers.
        chunk_tokens: tokens of a chunk.
        tau: decode steps the labels looked ahead.
        hidden_size: M.
        key_features: F.
        heads, key_dim, rank: I, E, R.
        encoder: memory side: ``mean`` (linear in the mean key), ``stats`` (that, and an MLP on mean, maximum and
            minimum), ``pooled`` (a linear map of every key, averaged with learned weights: which tokens of a chunk are
            ever asked for), ``compressed_key`` (none: the model's own key of a compressed entry, see
            ``compressed_query``).
        encoder_width: hidden width of those MLPs.
        lookback_tokens: hidden states scored at a refresh, the last ones; a chunk's score is the maximum. The paper
            uses one.
        segment_tokens: tokens that share a key, a part of ``chunk_tokens``; None: the whole chunk, as in the paper.
        neighbours: segments on either side that one lends its score to, over the borders of chunks as well; 0 in the
            paper, whose chunks are entries that the model itself compressed from overlapping windows.
        cap_tokens, cap_fraction: most prompt tokens that a threshold is to keep, sinks and window included: a number,
            or a fraction of the prompt where that is more; neither: whatever reaches it.
        least_tokens, least_fraction: least prompt tokens that stay, in the same way: where fewer reach the threshold,
            the best of the others fill up. The cap wins.
        kept_fraction: share of the candidate chunks it kept on held-out documents at threshold 0.5; None if unknown.
        trained: how it was trained, for the record.
    """

    model: str
    model_revision: str
    layers: tuple[int, ...]
    chunk_tokens: int
    tau: int
    hidden_size: int
    key_features: int
    heads: int = 8
    key_dim: int = 32
    rank: int = 64
    encoder: EncoderKind = "pooled"
    encoder_width: int = 64
    lookback_tokens: int = 1
    segment_tokens: int | None = None
    neighbours: int = 0
    cap_tokens: int | None = None
    cap_fraction: float | None = None
    least_tokens: int | None = None
    least_fraction: float | None = None
    kept_fraction: float | None = None
    trained: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "tau", "hidden_size", "key_features", "heads", "key_dim", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.layers:
            raise ValueError("at least one indexed layer is needed")
        if self.encoder not in ENCODER_FEATURES:
            raise ValueError(f"encoder must be one of {', '.join(ENCODER_FEATURES)}, got {self.encoder!r}")
        if self.encoder_width < 1 or self.lookback_tokens < 1:
            raise ValueError("encoder_width and lookback_tokens must be positive")
        if self.segment_tokens is not None and (self.segment_tokens < 1 or self.chunk_tokens % self.segment_tokens):
            raise ValueError(f"segment_tokens must divide {self.chunk_tokens}, got {self.segment_tokens}")
        if self.neighbours < 0:
            raise ValueError(f"neighbours must be 0 or more, got {self.neighbours}")
        if self.encoder == COMPRESSED_KEY and (self.neighbours or self.segment_tokens or self.lookback_tokens > 1):
            raise ValueError(f"encoder {COMPRESSED_KEY} has one key an entry and one state, and lends nothing")
        if error := bounds_error(
            cap_tokens=self.cap_tokens, cap_fraction=self.cap_fraction,
            least_tokens=self.least_tokens, least_fraction=self.least_fraction,
        ):  # fmt: skip
            raise ValueError(error)

    def cap(self, n_tokens: int) -> int | None:
        """Return the most tokens of a prompt of ``n_tokens`` that a threshold keeps; None: any number."""
        return bound_of(n_tokens, tokens=self.cap_tokens, fraction=self.cap_fraction)

    def least(self, n_tokens: int) -> int | None:
        """Return the least tokens of a prompt of ``n_tokens`` that stay by a threshold; None: whatever reaches it."""
        return bound_of(n_tokens, tokens=self.least_tokens, fraction=self.least_fraction)

    @property
    def segments_per_chunk(self) -> int:
        """Keys a chunk has in each indexed layer."""
        return 1 if self.segment_tokens is None else self.chunk_tokens // self.segment_tokens

    @property
    def chunk_key_bytes(self) -> int:
        """Bytes of one chunk's keys and scales over all indexed layers."""
        return len(self.layers) * self.segments_per_chunk * (self.key_dim + SCALE_BYTES)

    def scoring_flops(self, n_chunks: int) -> int:
        """FLOPs of one refresh over ``n_chunks`` (a MAC is two), relu and maxima left out as everywhere."""
        per_query = self.hidden_size * (self.rank + self.heads) + self.rank * self.heads * self.key_dim
        per_segment = self.heads * (self.key_dim + 1)
        n_segments = self.segments_per_chunk * n_chunks
        lending = 2 * self.neighbours * n_segments  # an addition each, once for all layers and states
        return 2 * len(self.layers) * self.lookback_tokens * (per_query + per_segment * n_segments) + lending


def default_sizes(hidden_size: int) -> tuple[int, int, int]:
    """Return heads, key size and rank for a model width.

    The paper's 128 heads x 128, rank 2048 belong to hidden 4096; wide models scale from there. Small ones take 8 x 32,
    rank 64.
    """
    if hidden_size < 1024:
        return 8, 32, 64
    return hidden_size // 32, 128, hidden_size // 2
