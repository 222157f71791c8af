"""The position encoding of each layer, measured rather than assumed.

One token alone attends to itself with weight one at any position, so all hidden states of a one-token forward are the
same at position 0 and at position 5, in every layer, and the queries of a layer differ by its rotation only. Equal
queries: no positions in this layer. Queries the model's own rotation turns back: rotary. Anything else is reported as
unknown, and methods that re-place keys are unsupported on that layer.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from kvscope.errors import KvscopeError, UsageError
from kvscope.harness.engine.configs import text_config
from kvscope.harness.engine.glue import EngineCache, EngineLayer, cache_argument, called_attention, decoder_of
from kvscope.methods.base import AttentionCall

_PROBE_POSITION = 5


class RopeRotation:
    """Turns queries of layers that share one rotary table, with the model's own rotation function."""

    def __init__(self, rotary: Any, apply: Any, layer_type: str | None, device: torch.device) -> None:
        self._rotary = rotary
        self._apply = apply
        self._layer_type = layer_type
        self._device = device
        self._last: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def back(self, q_BQ1D: torch.Tensor, n_tokens: int) -> torch.Tensor:
        """Return the query as it would be ``n_tokens`` positions earlier; the product is taken in fp32."""
        # Layers of one step ask for the same angle one after another, so the last one is worth keeping.
        if self._last is None or self._last[0] != n_tokens:
            self._last = (n_tokens, *self.angles(n_tokens))
        _, cos, sin = self._last
        return self.back_by(q_BQ1D, cos, sin)

    def angles(self, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine of a turn by ``n_tokens`` positions, fp32."""
        return self._tables(torch.tensor([[n_tokens]], device=self._device))

    def back_by(self, q_BQ1D: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return the query turned back by ``angles``; the product is taken in fp32."""
        q = q_BQ1D.float()
        turned: torch.Tensor = self._apply(q, q, cos, -sin)[0]
        return turned.to(q_BQ1D.dtype)

    def undo(self, k_BHSD: torch.Tensor, *, start_tokens: int) -> torch.Tensor:
        """Return keys of positions ``start_tokens`` and up as they were before rotation; the product is in fp32."""
        position = torch.arange(start_tokens, start_tokens + k_BHSD.shape[2], device=k_BHSD.device)
        cos, sin = self._tables(position[None])
        k = k_BHSD.float()
        turned: torch.Tensor = self._apply(k, k, cos, -sin)[1]
        return turned.to(k_BHSD.dtype)

    def _tables(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.empty(1, dtype=torch.float32, device=self._device)
        extra = {} if self._layer_type is None else {"layer_type": self._layer_type}
        cos, sin = self._rotary(like, position, **extra)
        # Scaled tables (YaRN's attention factor) would scale the query a second time.
        length = torch.sqrt(cos**2 + sin**2)
        return cos / length, sin / length


class UnknownRotation:
    """Stands in for a position encoding that could not be understood; using it is an error."""

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def back(self, q_BQ1D: torch.Tensor, n_tokens: int) -> torch.Tensor:
        raise KvscopeError(f"The position encoding of layer {self._layer} cannot be undone.")

    def angles(self, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise KvscopeError(f"The position encoding of layer {self._layer} cannot be undone.")

    def back_by(self, q_BQ1D: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        raise KvscopeError(f"The position encoding of layer {self._layer} cannot be undone.")

    def undo(self, k_BHSD: torch.Tensor, *, start_tokens: int) -> torch.Tensor:
        raise KvscopeError(f"The position encoding of layer {self._layer} cannot be undone.")


class _ProbeLayer(EngineLayer):
    """Records the query of a one-token forward."""

    query: torch.Tensor | None = None
    attention: torch.nn.Module | None = None

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.query, self.attention = call.query, call.module
        return called_attention(call)


@torch.inference_mode()
def probe_rotations(model: Any) -> dict[int, RopeRotation | UnknownRotation | None]:
    """Return how each decoder layer encodes positions: a rotation, None (not at all) or unknown.

    Raises:
        UsageError: a layer never called kvscope's attention, so nothing about it could be measured or managed.
    """
    at_zero, at_five = (_queries(model, position) for position in (0, _PROBE_POSITION))
    missing = [layer for layer, probe in enumerate(at_zero) if probe.query is None]
    if missing:
        raise UsageError(f"its layers {missing} do not use transformers' attention interface.")
    shared: dict[tuple[int, str | None], RopeRotation] = {}
    found: dict[int, RopeRotation | UnknownRotation | None] = {}
    for layer, (first, later) in enumerate(zip(at_zero, at_five, strict=True)):
        assert first.query is not None
        assert later.query is not None
        if _same(first.query, later.query):
            found[layer] = None
            continue
        rotation = _rotation_of(model, later.attention, layer, shared)
        undone = None if rotation is None else rotation.back(later.query, _PROBE_POSITION)
        found[layer] = rotation if undone is not None and _same(undone, first.query) else UnknownRotation(layer)
    return found


def _queries(model: Any, position: int) -> list[_ProbeLayer]:
    decoder = decoder_of(model)
    probes = [_ProbeLayer(index) for index in range(len(decoder.layers))]
    device = next(model.parameters()).device
    token = torch.tensor([[1]], device=device)
    at = torch.tensor([[position]], device=device)
    decoder(input_ids=token, position_ids=at, use_cache=True, **{cache_argument(decoder): EngineCache(probes)})
    return probes


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = 1e-4 if a.dtype == torch.float32 else 4e-2
    return bool((a.float() - b.float()).norm() <= tolerance * b.float().norm())


def _rotation_of(
    model: Any, attention: Any, layer: int, shared: dict[tuple[int, str | None], RopeRotation]
) -> RopeRotation | None:
    rotary = getattr(decoder_of(model), "rotary_emb", None)
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        return None
    layer_type = None
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        layer_type = text_config(model.config).layer_types[layer]
    key = (id(apply), layer_type)
    if key not in shared:
        shared[key] = RopeRotation(rotary, apply, layer_type, next(model.parameters()).device)
    return shared[key]
