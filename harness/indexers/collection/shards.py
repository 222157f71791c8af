"""What ``lsa collect`` stores, on disk: safetensors shards with a manifest. No model is loaded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvscope.errors import UsageError
from kvscope.files import whole_file
from kvscope.harness.indexers.collection.document import CollectionInfo, Document, DocumentInfo

FORMAT = 2
MANIFEST = "manifest.json"
NATIVE = "native"
"""Folder of the model's own indexer, beside shards of compressed entries."""
_TENSORS = (
    "features",
    "hidden",
    "steps",
    "segments",
    "indptr",
    "indices",
    "voters",
    "values",
    "rest",
    "mass",
    "queries",
)
_TOKEN_TENSORS = ("tokens", "token_weights", "token_states", "token_keys", "token_mass", "step_mass")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        UsageError: missing, unreadable, or of a format this kvscope does not know.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
    except FileNotFoundError:
        raise UsageError(f"'{folder}' is no collection: {MANIFEST} is missing; give a folder of lsa collect.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"'{path}' cannot be read ({error}); collect again into a new folder.") from error
    if version != FORMAT:
        raise UsageError(f"'{path}' has format {version}, this kvscope knows {FORMAT}; collect again.")
    return manifest


def collection_info(manifest: Mapping[str, Any], folder: Path) -> CollectionInfo:
    """Return the collection's description from its manifest.

    Raises:
        UsageError: keys are missing or unknown.
    """
    older = {"answers": "reference", "chat_template": None, "kept_bytes_per_token": 0}
    values = {**older, **manifest.get("collection", {})}
    names = {field.name for field in fields(CollectionInfo)}
    if set(values) != names:
        odd = ", ".join(sorted(names ^ set(values)))
        raise UsageError(f"'{folder / MANIFEST}' is damaged ({odd}); collect again into a new folder.")
    for key in ("layers", "label_layers", "tasks", "lengths_tokens"):
        values[key] = tuple(values[key])
    return CollectionInfo(**values)


def check_shard(path: Path, *, size_bytes: int, info: CollectionInfo) -> None:
    """Check that a shard is whole and belongs to a collection, without reading its tensors.

    Raises:
        UsageError: it is not.
    """
    mend = "delete it and run the same kvscope lsa collect again"
    if not path.is_file():
        raise UsageError(f"Shard '{path}' is missing; {mend}.")
    found_bytes = path.stat().st_size
    if found_bytes != size_bytes:
        raise UsageError(
            f"Shard '{path}' is truncated or was changed: {found_bytes:,} bytes, the manifest says {size_bytes:,}; "
            f"{mend}."
        )
    try:
        with safe_open(path, framework="pt") as file:
            owner = (file.metadata() or {}).get("collection")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"Shard '{path}' is not a safetensors file ({error}); {mend}.") from error
    if owner != info.id:
        raise UsageError(
            f"Shard '{path}' belongs to collection {owner}, its folder to {info.id}: shards of two collections were "
            f"mixed; {mend}."
        )


def write_shard(path: Path, documents: Sequence[Document], info: CollectionInfo) -> int:
    """Write a shard; it appears whole or not at all. Returns its bytes.

    Raises:
        EnvironmentProblem: the disk is full, or files may not be so large.
    """
    tensors = {
        f"{number}/{name}": getattr(document, name).contiguous()
        for number, document in enumerate(documents)
        for name in _tensor_names(info)
    }
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"collection": info.id})
    return path.stat().st_size


def read_document(path: Path, number: int, document: DocumentInfo, info: CollectionInfo) -> Document:
    """Read one document of a shard; large tensors are mapped, not copied, until they are used.

    Raises:
        UsageError: the shard cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(f"{number}/{name}") for name in _tensor_names(info)}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"Shard '{path}' cannot be read ({error}); delete it and run collect again.") from error
    return Document(info=document, **tensors)


def _tensor_names(info: CollectionInfo) -> tuple[str, ...]:
    return (*_TENSORS, *(_TOKEN_TENSORS if info.token_samples else ()), *(("angles",) if info.of_entries else ()))


def write_manifest(folder: Path, info: CollectionInfo, shards: Sequence[Mapping[str, Any]], *, complete: bool) -> None:
    """Write the manifest; it appears whole or not at all. Errors as ``write_shard``."""
    manifest = {"format": FORMAT, "complete": complete, "collection": asdict(info), "shards": list(shards)}
    with whole_file(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
