"""Folders of lsa's indexers: which one belongs to a model and a chunk size. The rest is ``methods.indexer_files``."""

from pathlib import Path

from kvscope.methods.indexer_files import CONFIG_FILE, WEIGHTS_FILE, IndexerFiles, indexer_hash, owner_mismatch
from kvscope.methods.lsa.indexer import Indexer
from kvscope.methods.lsa.indexer_config import IndexerConfig
from kvscope.methods.shape import ModelShape

__all__ = [
    "CONFIG_FILE",
    "FILES",
    "HOW_TO_TRAIN",
    "WEIGHTS_FILE",
    "find_shipped",
    "indexer_folder",
    "indexer_hash",
    "load_indexer",
    "mismatch",
    "read_indexer_config",
    "save_indexer",
]

HOW_TO_TRAIN = "make one with kvscope lsa fit, and pass indexer=FOLDER"
FILES = IndexerFiles(
    kind="lsa",
    config_type=IndexerConfig,
    module_type=Indexer,
    shipped_folder=Path(__file__).parent / "indexers",
    how_to_train=HOW_TO_TRAIN,
)
indexer_folder = FILES.folder
read_indexer_config = FILES.read_config
load_indexer = FILES.load
save_indexer = FILES.save


def mismatch(config: IndexerConfig, shape: ModelShape, *, chunk_tokens: int | None) -> str | None:
    """Return why an indexer does not fit a model and chunk size, naming both sides; None when it does."""
    if (why := owner_mismatch(config, shape)) is not None:
        return why
    features = shape.indexed_features
    if (config.hidden_size, config.key_features) != (shape.hidden_size, features):
        return (
            f"it takes hidden states of {config.hidden_size} and keys of {config.key_features}, this model has "
            f"{shape.hidden_size} and {features}"
        )
    if chunk_tokens is not None and config.chunk_tokens != chunk_tokens:
        return f"it was trained for chunks of {config.chunk_tokens} tokens, chunk_tokens={chunk_tokens} was asked for"
    return None


def find_shipped(shape: ModelShape, *, chunk_tokens: int) -> Path | None:
    """Return the shipped indexer for a model and chunk size, if there is one."""
    return FILES.find_shipped(lambda config: mismatch(config, shape, chunk_tokens=chunk_tokens))
