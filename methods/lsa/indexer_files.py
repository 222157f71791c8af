"""Indexer folders: ``indexer.safetensors`` and ``config.json``; finding, checking, loading and writing them."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from kvscope.methods.lsa.indexer import Indexer, IndexerConfig, config_dict
from kvscope.methods.shape import ModelShape
from kvscope.results.errors import UsageError, did_you_mean

FORMAT = 1
WEIGHTS_FILE, CONFIG_FILE = "indexer.safetensors", "config.json"
SHIPPED_FOLDER = Path(__file__).parent / "indexers"
HOW_TO_TRAIN = "train one with kvscope lsa collect and kvscope lsa train, and pass indexer=FOLDER"


def shipped_names() -> list[str]:
    """Return the names of the indexers that come with kvscope."""
    return sorted(path.parent.name for path in SHIPPED_FOLDER.glob(f"*/{CONFIG_FILE}"))


def indexer_folder(spec: str) -> Path:
    """Return the folder of an indexer given as a path or a shipped name.

    Raises:
        UsageError: neither exists.
    """
    folder = Path(spec).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return folder
    if spec in shipped_names():
        return SHIPPED_FOLDER / spec
    if folder.is_dir():
        raise UsageError(
            f"Folder '{spec}' holds no indexer: {CONFIG_FILE} is missing; give the folder kvscope lsa train wrote."
        )
    if folder.suffix == ".safetensors" and folder.is_file():
        raise UsageError(
            f"'{spec}' is a file of weights, as deepseek_v4 models take it; on this model an indexer is a folder: "
            f"{HOW_TO_TRAIN}."
        )
    known = did_you_mean(spec, shipped_names()) if shipped_names() else ""
    raise UsageError(f"There is no indexer '{spec}': neither a folder nor a shipped name.{known}")


def read_indexer_config(folder: Path) -> IndexerConfig:
    """Read and check ``config.json``.

    Raises:
        UsageError: unreadable, of another format, or with values that make no sense.
    """
    path = folder / CONFIG_FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("format")
        if version != FORMAT:
            raise UsageError(f"Indexer '{folder}' has format {version}, this kvscope knows {FORMAT}; train it again.")
        values["layers"] = tuple(values["layers"])
        known = {f.name for f in dataclasses.fields(IndexerConfig)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown keys {', '.join(unknown)}")
        return IndexerConfig(**values)
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"'{path}' is not an indexer's configuration ({error}); train it again.") from error


def load_indexer(folder: Path) -> Indexer:
    """Load an indexer on the CPU, fp32, in eval mode.

    Raises:
        UsageError: files missing, truncated, or of other shapes than the configuration says.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_indexer_config(folder)
    path = folder / WEIGHTS_FILE
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"Indexer weights '{path}' cannot be read ({error}); train the indexer again.") from error
    with torch.device("meta"):
        indexer = Indexer(config)
    try:
        indexer.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"'{path}' does not fit its {CONFIG_FILE}: {reason}") from error
    return indexer.float().eval()


def save_indexer(indexer: Indexer, folder: Path) -> None:
    """Write an indexer; each file appears whole or not at all."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (WEIGHTS_FILE + ".tmp")
    save_file({name: value.contiguous() for name, value in indexer.state_dict().items()}, temporary)
    os.replace(temporary, folder / WEIGHTS_FILE)
    temporary = folder / (CONFIG_FILE + ".tmp")
    values = {"format": FORMAT, **config_dict(indexer.config)}
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / CONFIG_FILE)


def indexer_hash(folder: Path) -> str:
    """Return the first 12 hex digits of SHA-256 over configuration and weights: what a row names."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:12]


def mismatch(config: IndexerConfig, shape: ModelShape, *, chunk_tokens: int | None) -> str | None:
    """Return why an indexer does not fit a model and chunk size, naming both sides; None when it does."""
    if config.model_revision != shape.revision:
        return (
            f"it was trained for model '{config.model}' ({config.model_revision or 'no revision'}), this model is "
            f"{shape.revision or 'of no known revision'}"
        )
    foreign = sorted(set(config.layers) - set(shape.layers))
    if foreign:
        return (
            f"it reads layers {_list(config.layers)}, and of these kvscope does not manage {_list(foreign)} in this "
            f"model (it manages {_list(shape.layers)})"
        )
    features = shape.n_kv_heads * shape.head_dim
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
    for name in shipped_names():
        folder = SHIPPED_FOLDER / name
        if mismatch(read_indexer_config(folder), shape, chunk_tokens=chunk_tokens) is None:
            return folder
    return None


def _list(layers: "tuple[int, ...] | list[int]") -> str:
    return ", ".join(map(str, layers))
