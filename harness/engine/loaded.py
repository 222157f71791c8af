"""A loaded model, as everything behind loading sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvscope.harness.engine.rotation import RopeRotation, UnknownRotation
from kvscope.methods.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to prefill and decode.

    Attributes:
        spec: what the user asked for.
        name: what rows call it: ``reference``, a hub id, or a folder's name.
        model: the transformers model, in eval mode, its attention switched to kvscope's.
        tokenizer: the transformers tokenizer; None for presets, and for models wrapped in tests.
        shape: what the methods count with.
        max_length_tokens: longest prompt plus answer.
        revision: the hub commit, or for a folder ``sha256:`` of its config and of samples of its weights.
        attention_backend: what computes attention, for the row.
        rotations: decoder layer -> its rotation, None without positions or where no method may ask for it.
        eos_ids: token ids that end an answer.
    """

    spec: str
    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    shape: ModelShape
    max_length_tokens: int
    revision: str
    attention_backend: str
    rotations: dict[int, RopeRotation | UnknownRotation | None]
    eos_ids: frozenset[int]
