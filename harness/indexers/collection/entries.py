"""What a collection of compressed entries says of itself, and the model's own indexer that lies beside it."""

from pathlib import Path
from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.indexers.collection.document import CollectionInfo
from kvscope.methods.lsa.compressed_query import EntryLayer
from kvscope.methods.lsa.indexer import Indexer
from kvscope.methods.lsa.indexer_config import COMPRESSED_KEY, IndexerConfig
from kvscope.methods.lsa.indexer_files import save_indexer


def entries_of(loaded: LoadedModel, *, chunk_tokens: int | None, token_samples: int) -> dict[str, Any]:
    """Return what a collection of compressed entries says of its chunks.

    Raises:
        UsageError: an option that is one of tokens.
    """
    entry_tokens = loaded.shape.page_tokens
    if chunk_tokens not in (None, entry_tokens):
        raise UsageError(
            f"chunk_tokens is {chunk_tokens}, and a chunk of model '{loaded.name}' is one of its entries of "
            f"{entry_tokens} tokens: give --chunk-tokens {entry_tokens}."
        )
    if token_samples:
        raise UsageError(f"Model '{loaded.name}' keeps compressed entries, no tokens: leave --token-samples out.")
    kept, all_of_it = loaded.shape.bytes_per_token()
    return {
        "kv_bytes_per_token": all_of_it, "kept_bytes_per_token": kept, "features": "entries",
        "chunk_tokens": entry_tokens, "state_tokens": 1,
    }  # fmt: skip


def save_native(loaded: LoadedModel, info: CollectionInfo, folder: Path) -> None:
    """Write the model's own indexer beside the shards: training begins there, without the model."""
    native = loaded.backend.native_indexer(loaded.model, info.layers)
    assert native is not None
    first = next(iter(native.layers.values()))
    config = IndexerConfig(
        model=info.model, model_revision=info.model_revision, layers=info.layers, chunk_tokens=info.chunk_tokens, tau=1,
        hidden_size=info.hidden_size, key_features=info.key_features, heads=first.heads, key_dim=first.key_dim,
        rank=len(first.norm_R), encoder=COMPRESSED_KEY,
    )  # fmt: skip
    indexer = Indexer(config)
    for layer, weights in native.layers.items():
        found = indexer.layer(layer)
        assert isinstance(found, EntryLayer)
        found.take(weights)
    save_indexer(indexer, folder)
