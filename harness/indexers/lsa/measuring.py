"""How an indexer is measured on shards: by which labels, at what cost, and whether it belongs to them at all."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.document import CollectionInfo
from kvscope.harness.indexers.collection.label_choice import LabelChoice
from kvscope.harness.indexers.collection.reading import Collection, open_collections
from kvscope.harness.indexers.collection.rechunk import serves
from kvscope.harness.indexers.lsa.objective import Example
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.methods.lsa.indexer_config import ENCODER_FEATURES, IndexerConfig
from kvscope.methods.lsa.indexer_selection import metadata_bytes


@dataclass(frozen=True, kw_only=True)
class EvalConfig(LabelChoice):
    """What to evaluate. Golden are the chunks that the labels ask for.

    Attributes:
        tau: decode steps between refreshes; None: the indexer's.
        seed: of the random policy.
    """

    tau: int | None = None
    seed: int = 0


def measuring_options(indexer: IndexerConfig, config: EvalConfig) -> TrainConfig:
    """Return how documents are read and labelled to measure an indexer.

    Raises:
        UsageError: a value out of range.
    """
    return TrainConfig(
        tau=indexer.tau if config.tau is None else config.tau,
        layers=indexer.layers,
        lookback=indexer.lookback_tokens,
        **{field.name: getattr(config, field.name) for field in fields(LabelChoice)},
    )


@dataclass(frozen=True)
class Shares:
    """What an indexer keeps of one prompt, as shares of its KV bytes.

    Attributes:
        static: sinks and window, and what no method leaves out.
        chunk: one chosen chunk.
        metadata: the indexer's keys and states.
    """

    static: float
    chunk: float
    metadata: float


def shares_of(found: Example, info: CollectionInfo, config: IndexerConfig, options: TrainConfig) -> Shares:
    """Return what keeping a document's prompt costs."""
    layout = options.layout(found.document, info.chunk_tokens)
    element_bytes = 4 if info.dtype == "float32" else 2
    extra_bytes = metadata_bytes(config, layout.n_candidates, element_bytes=element_bytes)
    always = info.kept_bytes_per_token / info.kv_bytes_per_token
    return Shares(
        static=always + (1 - always) * layout.static_tokens / layout.n_tokens,
        chunk=(1 - always) * layout.chunk_tokens / layout.n_tokens,
        metadata=extra_bytes / (layout.n_tokens * info.kv_bytes_per_token),
    )


def matching_collections(folders: Sequence[str | Path], config: IndexerConfig, *, folder: str) -> list[Collection]:
    """Open the collections to measure an indexer on, seen in its chunks.

    Args:
        folder: of the indexer, for messages.

    Raises:
        UsageError: as ``check_match`` and ``open_collections``.
    """
    for each in folders:
        check_match(config, Collection(each).info, folder=folder)
    return open_collections(folders, chunk_tokens=config.chunk_tokens, layers=config.layers)


def check_match(config: IndexerConfig, info: CollectionInfo, *, folder: str) -> None:
    """Check that an indexer and a collection, as it was recorded, belong together.

    Raises:
        UsageError: they do not; the message names both.
    """
    chunk_tokens = config.chunk_tokens if serves(info, config.chunk_tokens) else info.chunk_tokens
    pairs = (
        ("model", f"{config.model} ({config.model_revision})", f"{info.model} ({info.model_revision})"),
        ("chunk_tokens", config.chunk_tokens, chunk_tokens),
        ("hidden_size", config.hidden_size, info.hidden_size),
        ("key_features", config.key_features, info.key_features),
        ("features", ENCODER_FEATURES[config.encoder], info.features),
    )
    for key, mine, theirs in pairs:
        if mine != theirs:
            raise UsageError(f"Indexer '{folder}' and the collection differ in {key}: {mine} against {theirs}.")
    foreign = sorted(set(config.layers) - set(info.layers))
    if foreign:
        raise UsageError(
            f"Indexer '{folder}' reads layers {', '.join(map(str, config.layers))}, the collection holds "
            f"{', '.join(map(str, info.layers))}."
        )
    if config.lookback_tokens > info.state_tokens:
        raise UsageError(
            f"Indexer '{folder}' scores the last {config.lookback_tokens} states, and the collection keeps "
            f"{info.state_tokens} before an answer; collect again with --states {config.lookback_tokens}."
        )


def ranks(score: torch.Tensor) -> torch.Tensor:
    """Return the place of every candidate by its score, from 0, [rows, n]; equal scores in order."""
    order = score.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))


def within_bounds(
    score: torch.Tensor, found: Example, config: IndexerConfig, options: TrainConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which candidates an indexer's cap leaves to a threshold, and which of them its least share keeps whatever
    the threshold, both bool [rows, n]."""
    layout = options.layout(found.document, config.chunk_tokens)
    cap_tokens, least_tokens = config.cap(layout.n_tokens), config.least(layout.n_tokens)
    n_most = layout.n_candidates if cap_tokens is None else layout.budgeted_chunks(cap_tokens)
    n_least = 0 if least_tokens is None else layout.budgeted_chunks(least_tokens)
    rank = ranks(score)
    return rank < n_most, rank < min(n_least, n_most)
