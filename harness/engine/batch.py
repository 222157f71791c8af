"""Decoding several sequences of one method together: one forward of the model a step, attention sequence by sequence.

The weights are read once a step for the whole batch, as a server reads them; each sequence keeps and reads its own
cache, as under batch 1. All sequences open the same prompt. The step of a batch can be a CUDA graph as that of one
sequence can: launched one by one, the kernels of many sequences take several times as long as they run.

Shapes: B batch, Q query heads, H KV heads, D head size, M hidden size.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import torch

from kvscope.errors import UsageError
from kvscope.harness.engine.decode_graph import (
    EAGER,
    GRAPH,
    DecodeGraph,
    StaticStep,
    capture_failed,
    graph_demanded,
    graph_reasons,
    static_reasons,
)
from kvscope.harness.engine.glue import EngineCache, EngineLayer, observing
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.methods.base import AttentionExtras, CacheMethod, Footprint, Rotation, SequenceCache
from kvscope.methods.store import PromptKV


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
    """Sequences of one method on one prompt. Use as a context manager; they are closed at the end.

    Attributes:
        step_backend: how steps run, known from the first one: ``cuda graph``, ``eager``, or ``eager: `` and why.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        method: CacheMethod[Any],
        prompt: PromptKV,
        *,
        reserve_tokens: int,
        decode_graph: DecodeGraph | Literal["uncaptured"] = "off",
    ) -> None:
        """Begin with no sequence.

        Args:
            reserve_tokens: steps to preallocate for, per sequence.
            decode_graph: as ``DecodeSession``; the capture is made before the first step.

        Raises:
            UsageError: the model has sliding-window layers, whose stock cache holds one sequence here; or steps cannot
                be a graph although ``on`` asked for it (raised by ``add`` or ``step``).
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
        self._decode_graph, self._static = decode_graph, decode_graph != "off"
        self._step: StaticStep | None = None
        self.step_backend = EAGER

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
        """Open one more sequence. All have to be at the same step; add before the first.

        Where that fails (memory ends, a graph is demanded and cannot be had) the batch is as it was.
        """
        sequence = self._method.open(self._prompt, self._loaded.device, reserve_tokens=self._reserve_tokens)
        try:
            if self._static:
                self._make_static(sequence)
        except BaseException:
            sequence.close()
            raise
        self.sequences.append(sequence)

    def _make_static(self, sequence: SequenceCache) -> None:
        """Fix a new sequence's addresses, here so that what it takes counts in how many fit; or note why not."""
        captured = self._decode_graph != "uncaptured"
        reasons = (graph_reasons if captured else static_reasons)(self._loaded, sequence)
        if reasons:
            self._go_eager(reasons)
        else:
            sequence.make_static()

    def clear(self) -> None:
        """Close every sequence."""
        if self._step is not None:
            self._step.release()
            self._step = None
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

    def bytes_recalled(self) -> int:
        """Return the bytes that all sequences copied from the host."""
        for sequence in self.sequences:
            sequence.residency()  # enters what was left to the device
        return sum(sequence.bytes_recalled for sequence in self.sequences)

    def _go_eager(self, reasons: list[str]) -> None:
        if self._decode_graph != "auto":
            raise graph_demanded(reasons, self._method.label)
        self._static, self.step_backend = False, f"{EAGER}: {'; '.join(reasons)}"

    def _capture(self) -> None:
        """Make the step of fixed addresses; where the forward cannot be captured, open all anew as they were."""
        captured = self._decode_graph != "uncaptured"
        step = StaticStep(self._loaded, self.sequences, self._cache, before=lambda position: None, captured=captured)
        try:
            step.prepare()
        except RuntimeError as error:
            step.release()
            if self._decode_graph != "auto":
                raise
            self._go_eager([capture_failed(error)])
            n_open = len(self.sequences)
            self.clear()
            for _ in range(n_open):
                self.add()
        else:
            self._step, self.step_backend = step, GRAPH if captured else EAGER

    @torch.inference_mode()
    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Feed one token to every sequence and return the most likely next ones, [B]."""
        if self._static and self._step is None:
            self._capture()
        if self._step is not None:
            found_B: torch.Tensor = self._step(tokens_B).argmax(-1)
            return found_B
        for sequence in self.sequences:
            sequence.begin_step()
        positions = [[sequence.n_tokens] for sequence in self.sequences]
        out = self._loaded.model(
            input_ids=tokens_B[:, None],
            position_ids=torch.tensor(positions, device=self._loaded.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for sequence in self.sequences:
            sequence.end_step()
        next_B: torch.Tensor = out.logits[:, -1].argmax(-1)
        return next_B
