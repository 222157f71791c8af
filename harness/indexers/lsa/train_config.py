"""How an indexer of lsa is trained: every option of ``kvscope lsa train``."""

from dataclasses import dataclass
from typing import Literal

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.label_choice import LabelChoice
from kvscope.harness.indexers.training import TrainingOptions
from kvscope.methods.lsa.indexer_config import ENCODER_FEATURES, EncoderKind

#: Decode steps a label looks ahead (docs/lsa-study.md), and segments that one lends its score to.
DEFAULT_TAU, DEFAULT_NEIGHBOURS = 4, 8


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainingOptions, LabelChoice):
    """How to train, beside what every indexer and every use of labels asks.

    Attributes:
        tau: decode steps a label looks ahead.
        chunk_tokens: tokens of a chunk, a multiple of the collections'; None: theirs.
        layers: of the collection's indexed layers, those to train; None: all.
        gamma, negatives: focal loss, random negatives a positive.
        least_negatives: negatives of a row however few positives it has: rows that need nothing teach, too.
        rank: of the queries; None: half the model's width. ``heads`` and ``key_dim`` are the model's, at most 128.
        start: begin at this indexer (a folder or a shipped name) of the same shape, without a warm start; a larger
            chunk may be put together from its segments.
        encoder, encoder_width: memory side; None: ``pooled`` if the collection holds every key, else ``stats``.
        segment_tokens: tokens that share a key; None: a chunk.
        neighbours: segments on either side that one lends its score to, at a learned price; None: those of ``start``,
            else 8.
        lookback: states scored a refresh: the token before an answer says little of what the question asked.
        revive: gradient that a head's product below zero still gets where that would raise it (``rectified``), so that
            a golden chunk which no head matches comes back (docs/log.md); 0: none.
        keep: which epoch is kept: the one of the lowest held-out ``loss``, or of the highest ``recall`` of golden
            chunks by the best tenth at refreshes. The loss is lowest early, while the ranking goes on improving: that
            is for those who set the threshold afterwards (``target_recall``) or use a budget.
        target_recall: held-out golden recall that threshold 0.5 is set to (a shift of the bias); None: left alone.
    """

    tau: int = DEFAULT_TAU
    chunk_tokens: int | None = None
    layers: tuple[int, ...] | None = None
    epochs: int = 4
    lr: float = 1e-3
    gamma: float = 2.0
    negatives: int = 8
    least_negatives: int = 3
    rank: int | None = None
    start: str | None = None
    encoder: EncoderKind | None = None
    encoder_width: int = 64
    segment_tokens: int | None = None
    neighbours: int | None = None
    lookback: int = 16
    revive: float = 0.1
    keep: Literal["loss", "recall"] = "recall"
    patience: int = 2
    target_recall: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(1, "tau", "negatives", "encoder_width", "lookback", "rank", "segment_tokens")
        self.check_least(0, "neighbours", "sink_tokens", "recency_tokens")
        self.check_not_negative("gamma", "revive")
        if self.keep not in ("loss", "recall"):
            raise UsageError(f"keep must be loss or recall, got {self.keep!r}.")
        if self.target_recall is not None and not 0 < self.target_recall < 1:
            raise UsageError(f"target_recall must lie between 0 and 1, both excluded, got {self.target_recall}.")
        if self.encoder is not None and self.encoder not in ENCODER_FEATURES:
            raise UsageError(f"encoder must be {', '.join(ENCODER_FEATURES)}, got {self.encoder!r}.")
