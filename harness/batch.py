"""Decoding several sequences of one method together: one forward of the model a step, attention sequence by sequence.

The weights are read once a step for the whole batch, as a server reads them; each sequence keeps and reads its own
cache, as under batch 1. All sequences open the same prompt.

Shapes: B batch, Q query heads, H KV heads, D head size, M hidden size.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch

from kvscope.harness.glue import EngineCache, EngineLayer, observing
from kvscope.harness.models import LoadedModel
from kvscope.methods.base import AttentionExtras, CacheMethod, Footprint, Rotation, SequenceCache
from kvscope.methods.store import PromptKV
from kvscope.results.errors import UsageError


class _BatchLayer(EngineLayer):
    """One managed layer of a batch: each sequence attends with its own row of queries."""

    def __init__(self, index: int, sequences: list[SequenceCache], rotation: Rotation | None) -> None:
        super().__init__(index)
        self._sequences = sequences
        self._rotation = rotation

    def get_seq_length(self) -> int:
        return self._sequences[0].n_tokens

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        s_aux: torch.Tensor | None,
    ) -> torch.Tensor:
        self._refuse_window(window)
        extras = AttentionExtras(softcap=softcap, sink_logits=s_aux, rotation=self._rotation)
        out = [
            sequence.attend(self.index, query[b : b + 1], key[b : b + 1], value[b : b + 1], scale=scale, extras=extras)
            for b, sequence in enumerate(self._sequences)
        ]
        return torch.cat(out)


class BatchSession:
    """Sequences of one method on one prompt. Use as a context manager; they are closed at the end."""

    def __init__(self, loaded: LoadedModel, method: CacheMethod[Any], prompt: PromptKV, *, reserve_tokens: int) -> None:
        """Begin with no sequence.

        Args:
            reserve_tokens: steps to preallocate for, per sequence.

        Raises:
            UsageError: the model has sliding-window layers, whose stock cache holds one sequence here.
        """
        if loaded.shape.sliding_layers:
            raise UsageError(
                f"Model '{loaded.name}' has sliding-window layers, which are not decoded in batches here: "
                "take another model."
            )
        self.sequences: list[SequenceCache] = []
        self._loaded, self._method, self._prompt = loaded, method, prompt
        self._reserve_tokens = reserve_tokens
        layers = [_BatchLayer(layer, self.sequences, loaded.rotations[layer]) for layer in loaded.shape.layers]
        self._cache = EngineCache(layers)
        self._observed = method.observed_layers(loaded.shape)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.callback(self.clear)
        if self._observed:
            self._stack.enter_context(observing(self._loaded.model, self._observed, self._observe))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        for b, sequence in enumerate(self.sequences):
            sequence.observe(layer, hidden_BM[b : b + 1])

    def add(self) -> None:
        """Open one more sequence. All have to be at the same step; add before the first."""
        self.sequences.append(self._method.open(self._prompt, self._loaded.device, reserve_tokens=self._reserve_tokens))

    def clear(self) -> None:
        """Close every sequence."""
        while self.sequences:
            self.sequences.pop().close()

    def footprint(self) -> Footprint:
        """Return the bytes of all sequences on the device; host bytes are of the one mirror they share."""
        found = [sequence.footprint() for sequence in self.sequences]
        total = sum(found, Footprint())
        host_bytes = max((footprint.host_bytes for footprint in found), default=0)
        return Footprint(
            kv_bytes=total.kv_bytes,
            metadata_bytes=total.metadata_bytes,
            host_bytes=host_bytes,
            bytes_read_per_step=total.bytes_read_per_step,
            attention_flops_per_step=total.attention_flops_per_step,
        )

    @torch.inference_mode()
    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Feed one token to every sequence and return the most likely next ones, [B]."""
        positions = [[sequence.n_tokens] for sequence in self.sequences]
        out = self._loaded.model(
            input_ids=tokens_B[:, None],
            position_ids=torch.tensor(positions, device=self._loaded.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        next_B: torch.Tensor = out.logits[:, -1].argmax(-1)
        return next_B
