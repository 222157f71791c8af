"""Collections opened for reading, one or several together."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.document import Document, DocumentInfo
from kvscope.harness.indexers.collection.label_rule import LabelRule
from kvscope.harness.indexers.collection.rechunk import chunk_factor, rechunked
from kvscope.harness.indexers.collection.shards import check_shard, collection_info, read_document, read_manifest


class Collection:
    """A folder of shards, opened for reading; documents load one at a time.

    Attributes:
        id: of what was recorded, whatever chunk size it is seen in.
        info: its description, with the chunk size it is seen in.
        complete: whether it was collected to its end.
        documents: what it holds.
    """

    def __init__(self, folder: str | Path, *, chunk_tokens: int | None = None) -> None:
        """Check the manifest and every shard it lists.

        Args:
            chunk_tokens: see it in chunks of this size, a multiple of the recorded one.

        Raises:
            UsageError: no collection there, a shard that is missing, truncated or from another collection, or a chunk
                size it cannot be seen in.
        """
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        recorded = collection_info(manifest, self.folder)
        self.id = recorded.id
        self._factor = chunk_factor(recorded, chunk_tokens)
        self.info = replace(recorded, chunk_tokens=recorded.chunk_tokens * self._factor)
        self.complete = bool(manifest["complete"])
        self.documents: list[DocumentInfo] = []
        self._where: list[tuple[Path, int]] = []
        self._positives: dict[tuple[int, LabelRule, int], torch.Tensor] = {}
        for shard in manifest["shards"]:
            path = self.folder / shard["file"]
            check_shard(path, size_bytes=shard["bytes"], info=recorded)
            for index, values in enumerate(shard["documents"]):
                self.documents.append(DocumentInfo(**values))
                self._where.append((path, index))
        if not self.documents:
            raise UsageError(f"Collection '{folder}' holds no document yet; run kvscope lsa collect to its end.")

    def __len__(self) -> int:
        return len(self.documents)

    def positives(self, index: int, rule: LabelRule, *, tau: int) -> torch.Tensor:
        """Return a document's labels; they are worked out once."""
        key = (index, rule, tau)
        if key not in self._positives:
            self._positives[key] = self.load(index).positives(rule, self.info, tau=tau)
        return self._positives[key]

    def load(self, index: int) -> Document:
        """Read one document; large tensors are mapped, not copied, until they are used."""
        path, number = self._where[index]
        document = read_document(path, number, self.documents[index], self.info)
        return document if self._factor == 1 else rechunked(document, self._factor)


def open_collections(
    folders: Sequence[str | Path], *, chunk_tokens: int | None = None, layers: tuple[int, ...] | None = None
) -> list[Collection]:
    """Open collections that are to be used together.

    Args:
        chunk_tokens: see them in chunks of this size; None: as they were recorded.
        layers: the indexed layers that are wanted: all hold these, and may hold others; None: all hold the same.

    Raises:
        UsageError: as ``Collection``, or two of them hold the same documents or were made differently; the message
            names both.
    """
    if not folders:
        raise UsageError("Give at least one folder that kvscope lsa collect wrote: --data DIR.")
    opened = [Collection(folder, chunk_tokens=chunk_tokens) for folder in folders]
    by_id: dict[str, Path] = {}
    for each in opened:
        if each.id in by_id:
            both = f"'{by_id[each.id]}' and '{each.folder}'"
            raise UsageError(f"Collections {both} hold the same documents, which would count twice: give one of them.")
        by_id[each.id] = each.folder
    same = (
        *("model_revision", "label_layers", "chunk_tokens", "features", "hidden_size", "key_features"),
        *("query_heads", "head_dim", "chat_template"),
        *("top_p", "voters", "votes", "least_mass"),
        *(() if layers else ("layers",)),
    )
    for each in opened:
        foreign = sorted(set(layers or ()) - set(each.info.layers))
        if foreign:
            raise UsageError(
                f"Layers {', '.join(map(str, foreign))} are not in collection '{each.folder}', which holds "
                f"{', '.join(map(str, each.info.layers))}."
            )
    first = opened[0]
    for other in opened[1:]:
        for key in same:
            mine, theirs = getattr(first.info, key), getattr(other.info, key)
            if mine != theirs:
                raise UsageError(
                    f"Collections '{first.folder}' and '{other.folder}' cannot be mixed: {key} is {mine} in the one "
                    f"and {theirs} in the other."
                )
    return opened
