"""The position encoding of each layer, measured rather than assumed.

One token alone attends to itself with weight one at any position, so all hidden states of a one-token forward are the
same at position 0 and at position 5, in every layer, and the queries of a layer differ by its rotation only. Its
embedding is random: a row of the model's own table may be zero, and a zero turns into itself under any rotation. Equal
queries: no positions in this layer. Queries the model's own rotation turns back: rotary. Anything else is reported as
unknown, and methods that re-place keys are unsupported on that layer.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kvscope.errors import KvscopeError, UsageError
from kvscope.harness.engine.configs import text_config
from kvscope.harness.engine.glue import (
    EngineCache,
    EngineLayer,
    cache_argument,
    called_attention,
    decoder_of,
    layers_of,
)
from kvscope.harness.engine.oom import is_oom
from kvscope.methods.base import AttentionCall
from kvscope.methods.shape import ModelShape

_PROBE_POSITION = 5


class RopeRotation:
    """Turns queries of layers that share one rotary table, with the model's own rotation function."""

    def __init__(self, rotary: Any, apply: Any, layer_type: str | None, device: torch.device, *, partial: bool) -> None:
        """Wrap a model's tables and its function.

        Args:
            device: of the layers; the tables may be elsewhere.
            partial: turn the first channels alone, as many as the tables have: the module splits heads itself.
        """
        self._rotary = rotary
        self._apply = apply
        self._layer_type = layer_type
        self._device = device
        self._partial = partial
        self._n_inputs = list(inspect.signature(apply).parameters).index("cos")
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
        return self.angles_at(torch.tensor([[n_tokens]], device=self._device))

    def angles_at(self, n_tokens_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for B turns, of positions [B, 1] that the device knows."""
        return self._tables(n_tokens_B1)

    def back_by(self, q_BQ1D: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return the query turned back by ``angles``; the product is taken in fp32."""
        return self._turned(q_BQ1D, cos, -sin)

    def undo(self, k_BHSD: torch.Tensor, *, start_tokens: int) -> torch.Tensor:
        """Return keys of positions ``start_tokens`` and up as they were before rotation; the product is in fp32."""
        position = torch.arange(start_tokens, start_tokens + k_BHSD.shape[2], device=k_BHSD.device)
        cos, sin = self._tables(position[None])
        return self._turned(k_BHSD, cos, -sin)

    def _turned(self, x_BHSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x_BHSD.float()
        width = cos.shape[-1] if self._partial else x.shape[-1]
        # q and k together in most models, one tensor at a time in some (Gemma 4).
        rotated = self._apply(*[x[..., :width]] * self._n_inputs, cos, sin)
        turned: torch.Tensor = rotated[0] if isinstance(rotated, tuple) else rotated
        if self._partial:
            turned = torch.cat([turned, x[..., width:]], -1)
        return turned.to(x_BHSD.dtype)

    def _tables(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.empty(1, dtype=torch.float32, device=self._device)
        extra = {} if self._layer_type is None else {"layer_type": self._layer_type}
        cos, sin = (table.to(self._device) for table in self._rotary(like, position, **extra))
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

    def angles_at(self, n_tokens_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise KvscopeError(f"The position encoding of layer {self._layer} cannot be undone.")

    def back_by(self, q_BQ1D: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        raise KvscopeError(f"The position encoding of layer {self._layer} cannot be undone.")

    def undo(self, k_BHSD: torch.Tensor, *, start_tokens: int) -> torch.Tensor:
        raise KvscopeError(f"The position encoding of layer {self._layer} cannot be undone.")


class _ProbeLayer(EngineLayer):
    """Records the calls of a one-token forward."""

    def __init__(self, index: int, position: int) -> None:
        super().__init__(index)
        self.recorded_tokens = position  # models without position_ids take the position from here
        self.calls: list[AttentionCall] = []

    def get_seq_length(self) -> int:
        return self.recorded_tokens or 0

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        return called_attention(call)


@torch.inference_mode()
def probe_rotations(model: Any, shape: ModelShape) -> dict[int, RopeRotation | UnknownRotation | None]:
    """Return how each decoder layer encodes positions: a rotation, None (not at all) or unknown.

    Raises:
        UsageError: a layer does not attend once by kvscope's attention, or keeps other K and V than the shape says.
    """
    at_zero, at_five = (_calls(model, position) for position in (0, _PROBE_POSITION))
    _check_calls(dict(enumerate(at_zero)), shape)
    shared: dict[tuple[int, str | None, torch.device], list[RopeRotation]] = {}
    found: dict[int, RopeRotation | UnknownRotation | None] = {}
    for layer, ([first], [later]) in enumerate(zip(at_zero, at_five, strict=True)):
        if _same(first.query, later.query):
            found[layer] = None
            continue
        rotations = _rotations_of(model, later, layer, shared)
        fits = (each for each in rotations if _turns_back(each, later.query, first.query))
        found[layer] = next(fits, UnknownRotation(layer))
    return found


@torch.inference_mode()
def try_attention(model: Any, shape: ModelShape) -> None:
    """Send one token through a model without storage and look at how its layers attend.

    Code that reads values (a router of experts, a rotation that grows) does not run without them: what it would show is
    found when the weights have loaded.

    Raises:
        KvscopeError: a layer does not attend once by kvscope's attention, asks it for what it does not do, or keeps
            other K and V than the shape says.
    """
    model.eval()
    probes = _probes(model, 0)
    try:
        _one_token(model, probes)
    except KvscopeError:
        raise
    except Exception:  # noqa: BLE001 - as said above: the layers that ran are looked at
        probes = [probe for probe in probes if probe.calls]
    _check_calls({probe.index: probe.calls for probe in probes}, shape)


def _check_calls(layers: Mapping[int, list[AttentionCall]], shape: ModelShape) -> None:
    missing = [layer for layer, calls in layers.items() if not calls]
    if missing:
        raise UsageError(f"its layers {missing} do not use transformers' attention interface.")
    twice = [layer for layer, calls in layers.items() if len(calls) > 1]
    if twice:
        raise UsageError(f"its layers {twice} attend more than once, so that their K and V are not all they read.")
    for layer, [call] in layers.items():
        n_queries, n_heads = call.query.shape[1], call.key.shape[1]
        k_width, v_width = call.key.shape[-1], call.value.shape[-1]
        if layer in shape.layers:
            found = (n_queries, n_heads, k_width, v_width)
            expected = (shape.n_q_heads, shape.n_kv_heads, shape.head_dim, shape.v_head_dim or shape.head_dim)
        else:
            found = (n_queries, n_heads, k_width + v_width, 0)
            own_heads = (shape.sliding_n_q_heads or shape.n_q_heads, shape.sliding_n_kv_heads or shape.n_kv_heads)
            expected = (*own_heads, shape.sliding_kv_width or 2 * shape.head_dim, 0)
        if found != expected or v_width > k_width:
            raise UsageError(
                f"its layer {layer} has {n_queries} query heads and keeps {n_heads} KV heads, K {k_width} and V "
                f"{v_width} wide, and its config says otherwise, so bytes would be wrong."
            )


def _calls(model: Any, position: int) -> list[list[AttentionCall]]:
    probes = _probes(model, position)
    try:
        _one_token(model, probes)
    except KvscopeError:
        raise
    except Exception as error:
        raise UsageError(f"its forward of one token fails ({type(error).__name__}: {error}).") from error
    return [probe.calls for probe in probes]


def _probes(model: Any, position: int) -> list[_ProbeLayer]:
    return [_ProbeLayer(index, position) for index in range(len(layers_of(decoder_of(model))))]


def _one_token(model: Any, probes: list[_ProbeLayer]) -> None:
    """Send one token through the model, at the position of the probes, which record the calls of their layers."""
    decoder = decoder_of(model)
    device = next(model.parameters()).device
    token, at = (torch.tensor([[value]], device=device) for value in (1, probes[0].recorded_tokens))
    with _random_embedding(model):
        decoder(input_ids=token, position_ids=at, use_cache=True, **{cache_argument(decoder): EngineCache(probes)})


@contextmanager
def _random_embedding(model: Any) -> Iterator[None]:
    """Have the model's embedding give random vectors, the same each time, whatever the token."""

    def replaced(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        return noise.to(out.device, out.dtype)

    handle = model.get_input_embeddings().register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = 1e-4 if a.dtype == torch.float32 else 4e-2
    return bool((a.float() - b.float()).norm() <= tolerance * b.float().norm())


def _turns_back(rotation: RopeRotation, later: torch.Tensor, first: torch.Tensor) -> bool:
    try:
        return _same(rotation.back(later, _PROBE_POSITION), first)
    except Exception as error:
        if is_oom(error):
            raise
        # The tables have another width than the heads, or there are none for this type of layer.
        return False


def _takes_tables(apply: Callable[..., Any]) -> bool:
    """Whether a function turns what comes first by a cosine and a sine behind it, in this order (not GPT-J's)."""
    names = list(inspect.signature(apply).parameters)
    return "cos" in names[1:] and names[names.index("cos") + 1 :][:1] == ["sin"]


def _rotations_of(
    model: Any, call: AttentionCall, layer: int, shared: dict[tuple[int, str | None, torch.device], list[RopeRotation]]
) -> list[RopeRotation]:
    """Return the model's own rotation on whole heads, and on their first part where the module splits them.

    Layers on one device that turn alike share theirs.
    """
    rotary = getattr(decoder_of(model), "rotary_emb", None)
    apply = getattr(sys.modules[type(call.module).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or apply is None or not _takes_tables(apply):
        return []
    layer_type = None
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        layer_type = text_config(model.config).layer_types[layer]
    device = call.query.device
    key = (id(apply), layer_type, device)
    if key not in shared:
        shared[key] = [RopeRotation(rotary, apply, layer_type, device, partial=partial) for partial in (False, True)]
    return shared[key]
