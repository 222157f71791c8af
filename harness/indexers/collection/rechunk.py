"""A collection seen in larger chunks: what was recorded once serves every multiple of its chunk size.

Shapes: n whole chunks of a prompt, n' with the incomplete last one, f small chunks in a large one, L indexed layers, C
tokens a small chunk, F features a key.
"""

from dataclasses import replace

import torch

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.document import CollectionInfo, Document


def serves(info: CollectionInfo, chunk_tokens: int) -> bool:
    """Return whether a collection can be seen in chunks of this size."""
    return chunk_tokens == info.chunk_tokens or (
        info.features == "tokens" and chunk_tokens > 0 and chunk_tokens % info.chunk_tokens == 0
    )


def chunk_factor(info: CollectionInfo, chunk_tokens: int | None) -> int:
    """Return how many recorded chunks make one of ``chunk_tokens``; None: 1.

    Raises:
        UsageError: no multiple, or a collection that kept less than every key.
    """
    if chunk_tokens is None or chunk_tokens == info.chunk_tokens:
        return 1
    if chunk_tokens < 1 or chunk_tokens % info.chunk_tokens:
        raise UsageError(
            f"chunk_tokens is {chunk_tokens}, and the collection's chunks of {info.chunk_tokens} tokens do not make "
            "such ones; give a multiple, or collect again with smaller chunks."
        )
    if info.features != "tokens":
        raise UsageError(
            f"chunk_tokens is {chunk_tokens}, and a collection made with --features {info.features} serves its own "
            f"chunks of {info.chunk_tokens} tokens alone; collect again with --features tokens."
        )
    return chunk_tokens // info.chunk_tokens


def rechunked(document: Document, factor: int) -> Document:
    """Return a document with ``factor`` chunks joined into one; masses add up.

    Masses that were too small to be stored are missing from the sums. ``mass``, the strongest layer's, becomes a sum of
    maxima: what one layer gave to the large chunk if the same layer is strongest throughout it, and else more.
    """
    L, n, C, F = document.features.shape
    whole = n // factor
    features = document.features[:, : whole * factor].reshape(L, whole, factor * C, F)
    rows, n_chunks = document.mass.shape
    n_voters = document.rest.shape[1]
    mass = torch.nn.functional.pad(document.mass.float(), (0, -n_chunks % factor)).view(rows, -1, factor).sum(2)
    # (row, voter, chunk) as one number, so that equal ones are found by sorting.
    row = torch.repeat_interleave(torch.arange(rows), document.indptr.long().diff())
    joined = mass.shape[1]
    key = (row * n_voters + document.voters.long()) * joined + document.indices.long() // factor
    unique, where = torch.unique(key, return_inverse=True)
    values = torch.zeros(len(unique)).index_add_(0, where, document.values.float())
    counts = torch.bincount(unique // (joined * n_voters), minlength=rows)
    return replace(
        document,
        features=features,
        mass=mass.half(),
        indptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        indices=(unique % joined).int(),
        voters=(unique // joined % n_voters).to(document.voters.dtype),
        values=values.half(),
    )
