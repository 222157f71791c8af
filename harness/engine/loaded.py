"""A loaded model, as everything behind loading sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvscope.harness.engine.backend import Backend, ReadyModel


@dataclass(frozen=True, kw_only=True)
class LoadedModel(ReadyModel):
    """A model ready to prefill and decode, in eval mode.

    Attributes:
        spec: what the user asked for.
        name: what rows call it: ``reference``, a hub id, or a folder's name.
        tokenizer: the transformers tokenizer; None for presets, and for models wrapped in tests.
        backend: its kind of cache.
        max_length_tokens: longest prompt plus answer.
        revision: the hub commit, or for a folder ``sha256:`` of its config and of samples of its weights.
        eos_ids: token ids that end an answer.
    """

    spec: str
    name: str
    tokenizer: Any
    backend: Backend[Any]
    max_length_tokens: int
    revision: str
    eos_ids: frozenset[int]
