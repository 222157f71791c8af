"""Shards in which the golden chunk of a step can be told from the hidden state: what training must find."""

from dataclasses import replace
from pathlib import Path

import torch

from kvscope.harness.indexers.collection.document import CollectionInfo, Document, DocumentInfo
from kvscope.harness.indexers.collection.shards import write_manifest, write_shard

INFO = CollectionInfo(
    model="ghost", model_revision="sha256:none", dtype="float32", hidden_size=24, key_features=12, query_heads=2,
    head_dim=6,
    kv_bytes_per_token=96, layers=(1, 3), label_layers=(1, 3), chunk_tokens=16, features="stats", top_p=0.6,
    voters="layer", least_mass=0.0, votes=1, state_tokens=4, tasks=("planted",), lengths_tokens=(640,), samples=1,
    seed=0,
)  # fmt: skip


def planted_document(info: CollectionInfo, sample: int, *, n_steps: int = 6, noise: float = 0.1) -> Document:
    """One document of 40 chunks: a chunk's mean key is a code, and a state holds the code of the chunk it needs."""
    draws = torch.Generator().manual_seed(1000 * info.seed + sample)
    n_tokens = info.lengths_tokens[0]
    n_chunks = n_tokens // info.chunk_tokens
    codes = torch.randn((n_chunks, info.key_features), generator=draws)
    rows = {"stats": 3, "tokens": info.chunk_tokens}[info.features]
    features = codes[:, None].expand(-1, rows, -1) + noise * torch.randn(
        (n_chunks, rows, info.key_features), generator=draws
    )
    golden = torch.randint(1, n_chunks - 9, (n_steps,), generator=draws)  # outside sinks and window
    hidden = torch.randn((info.state_tokens + n_steps, len(info.layers), info.hidden_size), generator=draws)
    # The state before step t is row state_tokens + t - 1: that is where the code of step t's chunk stands.
    at = info.state_tokens - 1 + torch.arange(n_steps)
    hidden[at, :, : info.key_features] = 3 * codes[golden][:, None]
    mass = torch.full((n_steps, n_chunks), 0.001)
    mass[torch.arange(n_steps), golden] = 0.7
    return Document(
        info=DocumentInfo(
            task="planted", question_type="planted", length_tokens=n_tokens, sample=sample, prompt_tokens=n_tokens,
            n_steps=n_steps,
        ),
        features=features.expand(len(info.layers), -1, -1, -1).bfloat16(),
        hidden=hidden.bfloat16(),
        steps=torch.arange(n_steps, dtype=torch.int32),
        segments=torch.zeros(n_steps, dtype=torch.int32),
        indptr=torch.arange(n_steps + 1, dtype=torch.int32),
        indices=golden.int(),
        voters=torch.zeros(n_steps, dtype=torch.int16),
        values=torch.full((n_steps,), 0.7).half(),
        rest=torch.full((n_steps, 2 + 2 * 2), 0.2).half(),
        mass=mass.half(),
        queries=hidden[info.state_tokens :, :, :12].bfloat16(),
    )  # fmt: skip


def planted_collection(folder: Path, *, documents: int = 60, per_shard: int = 20, **changes) -> Path:
    """Write a collection of planted documents."""
    info = replace(INFO, samples=documents, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, documents, per_shard):
        made = [planted_document(info, sample) for sample in range(start, min(documents, start + per_shard))]
        name = f"shard-{len(shards):05d}.safetensors"
        size_bytes = write_shard(folder / name, made, info)
        shards.append({"file": name, "bytes": size_bytes, "documents": [vars(each.info) for each in made]})
    write_manifest(folder, info, shards, complete=True)
    return folder
