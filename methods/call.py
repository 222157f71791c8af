"""What one layer's attention is called with: the same for prefill, for the model's own layers and for every method.

Shapes: B sequences, S new tokens, Q query heads, H KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Rotation(Protocol):
    """The position encoding of one layer, able to move a query back."""

    def back(self, q_BQ1D: torch.Tensor, n_tokens: int) -> torch.Tensor:
        """Return the query as it would be ``n_tokens`` positions earlier."""
        ...

    def angles(self, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine of a turn by ``n_tokens`` positions, new tensors of the same shapes every time."""
        ...

    def angles_at(self, n_tokens_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``angles`` of B turns, their positions (int64) on the device; ``back_by`` takes them for B queries."""
        ...

    def back_by(self, q_BQ1D: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """``back``, by angles that are on the device already."""
        ...

    def undo(self, k_BHSD: torch.Tensor, *, start_tokens: int) -> torch.Tensor:
        """Return keys or queries of positions ``start_tokens`` and up as they were before rotation."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionCall:
    """One call of one layer's attention. A method sees one sequence and one new token: B = S = 1.

    Attributes:
        query: [B, Q, S, D], rotation applied.
        key, value: of the new tokens [B, H, S, D]; of all tokens where a layer has put them together.
        scale: factor on the logits.
        window: the layer's own window in tokens; always None on the layers a method manages.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        sink_logits: one learned logit a query head [Q] that takes mass and gives no value (gpt-oss).
        rotation: how to move a query back; None on a layer without rotary positions.
        module: the model's attention module that calls.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    rotation: Rotation | None = None
    module: torch.nn.Module | None = None

    def row(self, index: int) -> AttentionCall:
        """Return the call of one sequence of the batch; its tensors are views."""
        at = slice(index, index + 1)
        # Asked at every layer of every step: ``replace`` looks at each field anew, and takes three times as long.
        return AttentionCall(
            query=self.query[at],
            key=self.key[at],
            value=self.value[at],
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sink_logits=self.sink_logits,
            rotation=self.rotation,
            module=self.module,
        )

    def first(self, n: int) -> AttentionCall:
        """Return the call of the first sequences of the batch; its tensors are views."""
        return replace(self, query=self.query[:n], key=self.key[:n], value=self.value[:n])

    def at(self, rows: torch.Tensor) -> AttentionCall:
        """Return the call of some sequences of the batch, int64 [n]."""
        return replace(self, query=self.query[rows], key=self.key[rows], value=self.value[rows])

    def over(self, key: torch.Tensor, value: torch.Tensor) -> AttentionCall:
        """Return the call with K and V of all tokens [B, H, T, D] in the place of the new ones."""
        return replace(self, key=key, value=value)
