"""Documents of several collections, one after another: which train, which measure, and what is said of them."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.reading import Collection

Place = tuple[Collection, int]
"""A document of a collection."""


def places_of(collections: Sequence[Collection]) -> list[Place]:
    """Return every document, in order."""
    return [(collection, index) for collection in collections for index in range(len(collection))]


def split(where: Sequence[Place], *, share: float) -> tuple[list[Place], list[Place]]:
    """Split documents into training and held-out ones, by hash of their names, in every task and length alike.

    Raises:
        UsageError: a single document cannot be split.
    """

    def key(place: Place) -> str:
        collection, index = place
        return hashlib.sha256(f"{collection.info.seed}/{collection.documents[index].name}".encode()).hexdigest()

    ordered = sorted(where, key=key)
    n_held_out = max(1, round(share * len(ordered)))
    if n_held_out >= len(ordered):
        raise UsageError(f"{len(ordered)} documents are too few to train on and to measure with; collect more.")
    held_out = set(ordered[:n_held_out])
    return [place for place in where if place not in held_out], [place for place in where if place in held_out]


def note_unfinished(collections: Sequence[Collection], note: Callable[[str], None]) -> None:
    """Say which collections are not whole."""
    for collection in collections:
        if not collection.complete:
            note(f"note: collection '{collection.folder}' is unfinished; its {len(collection)} documents are used.")


def data_record(collections: Sequence[Collection]) -> list[dict[str, Any]]:
    """Return what an indexer's configuration says of the data it was trained on."""
    return [
        {
            "id": collection.id,
            "tasks": list(collection.info.tasks),
            "lengths_tokens": list(collection.info.lengths_tokens),
            "samples": collection.info.samples,
            "seed": collection.info.seed,
            "chat_template": collection.info.chat_template,
        }
        for collection in collections
    ]
