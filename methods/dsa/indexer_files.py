"""Folders of lightning indexers, and which one belongs to a model. The rest is ``methods.indexer_files``."""

from pathlib import Path

from kvscope.methods.dsa.lightning import Lightning, LightningConfig
from kvscope.methods.indexer_files import IndexerFiles, listed, owner_mismatch
from kvscope.methods.shape import ModelShape

HOW_TO_TRAIN = "train one with kvscope lsa collect --token-samples and kvscope dsa train, and pass indexer=FOLDER"
FILES = IndexerFiles(
    kind="dsa",
    config_type=LightningConfig,
    module_type=Lightning,
    shipped_folder=Path(__file__).parent / "indexers",
    how_to_train=HOW_TO_TRAIN,
)


def mismatch(config: LightningConfig, shape: ModelShape) -> str | None:
    """Return why an indexer does not fit a model, naming both sides; None when it does."""
    if (why := owner_mismatch(config, shape)) is not None:
        return why
    if set(config.layers) != set(shape.layers):
        return (
            f"it has layers {listed(config.layers)}, and kvscope manages {listed(shape.layers)} in this model: every "
            "layer needs its own"
        )
    if config.hidden_size != shape.hidden_size:
        return f"it takes hidden states of {config.hidden_size}, this model has {shape.hidden_size}"
    return None
