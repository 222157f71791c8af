"""Shared by the tests of lsa: prompts with what a method collects, steps, and indexers of random weights in folders."""

from dataclasses import replace
from pathlib import Path

import torch
from sessions import Single

from kvscope.harness.engine.prefill import prefill
from kvscope.methods.base import union_collectors
from kvscope.methods.lsa.indexer import Indexer, IndexerConfig
from kvscope.methods.lsa.indexer_files import save_indexer


def prefilled(loaded, ids, method, **options):
    """A prompt with what ``method`` collects."""
    assert method.unsupported(loaded.shape, loaded.device) == []
    return prefill(loaded, ids, collectors=union_collectors([method], loaded.shape.layers), **options)


def run_steps(loaded, method, prompt, tokens, **options):
    """Logits of every step, the sequence's record and its last footprint."""
    with Single(loaded, method, prompt, reserve_tokens=len(tokens), **options) as session:
        logits = torch.stack([session.step(token) for token in tokens])
        return logits, session.sequence.residency(), session.sequence.footprint()


def random_indexer(folder: Path, shape, *, chunk_tokens=16, seed=0, **changes) -> Path:
    """Write an indexer of random weights for a model's shape."""
    config = IndexerConfig(
        model="tiny", model_revision=shape.revision, layers=shape.layers, chunk_tokens=chunk_tokens, tau=64,
        hidden_size=shape.hidden_size, key_features=shape.n_kv_heads * shape.head_dim, heads=4, key_dim=8, rank=8,
        encoder_width=16,
    )  # fmt: skip
    indexer = Indexer.untrained(replace(config, **changes), seed=seed)
    save_indexer(indexer, folder)
    return folder
