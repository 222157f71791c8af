"""Dense decode of DeepSeek-V4 that notes attention to entries and the native indexer's scores, step by step.

Hooks are in the model while a sequence is open, and none of them changes what it computes.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from kvscope.harness.backends.deepseek_v4.methods import DenseEntries
from kvscope.harness.backends.deepseek_v4.prefill import KEEPS_WEIGHTS, CompressedPrompt
from kvscope.harness.backends.deepseek_v4.sequence import CompressedSequence
from kvscope.harness.backends.deepseek_v4.shape import CompressedModelShape
from kvscope.methods.lsa.compressed import CompressedIndexer
from kvscope.methods.lsa.compressed_query import QueryWeights
from kvscope.methods.lsa.observed import EntryStep
from kvscope.methods.shape import ModelShape


class WatchedDense(DenseEntries):
    """The dense method, watched."""

    def __init__(self, model: Any, shape: CompressedModelShape, layers: tuple[int, ...]) -> None:
        super().__init__(shape=shape)
        self._model, self._layers = model, layers

    def observed_layers(self, shape: ModelShape) -> tuple[int, ...]:
        del shape
        return self._layers

    def open_entries(
        self, prompt: CompressedPrompt, device: torch.device, *, reserve_tokens: int
    ) -> CompressedSequence:
        fixed = torch.arange(prompt.n_entries)
        return WatchedSequence(
            prompt, device, fixed=fixed, reserve_tokens=reserve_tokens, model=self._model, layers=self._layers
        )


class WatchedSequence(CompressedSequence):
    """Every entry resident; what a step attends to and scores is kept until it is taken."""

    def __init__(
        self,
        prompt: CompressedPrompt,
        device: torch.device,
        *,
        fixed: torch.Tensor,
        reserve_tokens: int,
        model: Any,
        layers: tuple[int, ...],
    ) -> None:
        super().__init__(prompt, device, fixed=fixed, reserve_tokens=reserve_tokens)
        self._watched = layers
        self._hidden: dict[int, torch.Tensor] = {}
        self._scores: dict[int, torch.Tensor] = {}
        self._weights: dict[int, torch.Tensor] = {}
        self._hooks = ExitStack()
        for layer in self._shape.layers:
            attention = model.model.layers[layer].self_attn
            self._hooks.enter_context(_heard(attention, self._scores, self._weights, layer))

    def static_reasons(self) -> list[str]:
        return ["its attention is watched step by step"]

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        self._hidden[layer] = hidden_BM[0].clone()

    def take(self) -> EntryStep:
        """See ``WatchedEntries``."""
        n, attention, index = self._prompt.n_entries, [], []
        for layer in self._shape.layers:
            scores_n = self._scores[layer][0, -1].float()
            weights_QT = self._weights[layer][0, :, -1].float()
            # Entries stand behind the window, those of the prompt first.
            attention.append(weights_QT[:, weights_QT.shape[1] - len(scores_n) :][:, :n])
            index.append(torch.softmax(scores_n, 0)[:n])
        hidden_LM = torch.stack([self._hidden[layer] for layer in self._watched])
        for each in (self._hidden, self._scores, self._weights):
            each.clear()
        return EntryStep(hidden_LM, torch.stack(attention), torch.stack(index))

    def keys(self, layer: int) -> torch.Tensor:
        """See ``WatchedEntries``."""
        return self._prompt.host[layer]["indexer"][0]

    def state_before(self, layer: int) -> torch.Tensor:
        """See ``WatchedEntries``."""
        return self._prompt.last_hidden[layer][0]

    def angles(self, position: int) -> torch.Tensor:
        """See ``WatchedEntries``."""
        return torch.stack([each.float() for each in self._prompt.angles(position)])

    def close(self) -> None:
        self._hooks.close()
        super().close()


@contextmanager
def _heard(
    attention: Any, scores: dict[int, torch.Tensor], weights: dict[int, torch.Tensor], layer: int
) -> Iterator[None]:
    """Within it, a layer's index scores and attention weights of the last forward are left in two dictionaries."""

    def on_scores(module: Any, args: Any, out: torch.Tensor) -> None:
        scores[layer] = out

    def on_weights(weights_BQST: torch.Tensor) -> None:
        weights[layer] = weights_BQST

    handle = attention.compressor.indexer.scorer.register_forward_hook(on_scores)
    setattr(attention, KEEPS_WEIGHTS, on_weights)
    try:
        yield
    finally:
        handle.remove()
        delattr(attention, KEEPS_WEIGHTS)


def native_indexer(model: Any, layers: tuple[int, ...]) -> CompressedIndexer:
    """Return the model's own indexer of some layers, in the form that lsa's have: its scores are the same.

    Only the keys' rounding to fp8, and the norm's epsilon, tell the two apart.
    """
    found = {}
    for layer in layers:
        attention = model.model.layers[layer].self_attn
        indexer = attention.compressor.indexer
        matrices = (
            attention.q_a_proj.weight, attention.q_a_norm.weight, indexer.q_b_proj.weight,
            indexer.scorer.weights_proj.weight,
        )  # fmt: skip
        w_dq, norm, w_iuq, w_w = (each.detach().float().cpu().clone() for each in matrices)
        found[layer] = QueryWeights(w_dq_RM=w_dq, norm_R=norm, w_iuq_OR=w_iuq, w_w_IM=w_w)
    return CompressedIndexer(layers=found)
