"""Where an indexer comes from: its record in ``config.json`` and those before it, and the collections it has seen."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvscope.methods.lsa.indexer_files import indexer_hash, read_indexer_config


def origin(folder: Path) -> dict[str, Any]:
    """Return the record of an indexer that another one is made from: its name and hash, and its own record."""
    return {"indexer": f"{folder.name}@{indexer_hash(folder)}", "trained": dict(read_indexer_config(folder).trained)}


def records(trained: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield an indexer's record, then that of the one it was made from, and so on."""
    record: Any = trained
    while isinstance(record, Mapping) and record:
        yield record
        start = record.get("start")
        record = start.get("trained") if isinstance(start, Mapping) else None


def data_ids(trained: Mapping[str, Any]) -> set[str]:
    """Return the collections that an indexer, or one before it, was trained on."""
    return {entry["id"] for record in records(trained) for entry in record.get("data", ())}


def calibration_ids(trained: Mapping[str, Any]) -> set[str]:
    """Return the collections that its threshold, or that of one before it, was set on."""
    return {entry["id"] for record in records(trained) for entry in record.get("calibration", {}).get("data", ())}
