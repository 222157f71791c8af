"""What listens to the shared prefill for a method: a collector of one layer.

Shapes: B batch (1), S new tokens, Q query heads, H KV heads, D head size, M hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from kvscope.methods.call import AttentionCall

if TYPE_CHECKING:
    import torch


class Collector(ABC):
    """Reads K, V and hidden states of one layer as the shared prefill passes, and leaves one metadata tensor.

    Attributes:
        name: what it collects, with its settings (``"chunk_mean_64"``); collectors of equal name and layer run once.
        layer: the layer it listens to.
        unrotated_keys: K comes with the layer's rotation undone.
        hears_attention: it goes by queries, too, and ``attention`` is called.
    """

    name: str
    layer: int
    unrotated_keys: bool = False
    hears_attention: bool = False

    def begin(self, n_tokens: int) -> None:  # noqa: B027 - most collectors do the same at any length
        """Learn the prompt's length before its first chunk: settings may depend on it."""

    def attention(self, call: AttentionCall, *, start_tokens: int) -> None:  # noqa: B027 - most go by keys alone
        """Take the queries of the next chunk, before ``chunk``, where ``hears_attention``.

        Args:
            call: of one prompt: queries [1, Q, S, D], rotation applied; K and V of every token up to the chunk's last.
            start_tokens: position of the chunk's first token.
        """

    @abstractmethod
    def chunk(self, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, hidden_BSM: torch.Tensor, *, start_tokens: int) -> None:
        """Take the next chunk of the prompt, beginning at token ``start_tokens``.

        K comes as the cache holds it, rotation applied, unless ``unrotated_keys``.
        """

    @abstractmethod
    def finish(self) -> torch.Tensor:
        """Return the metadata tensor: on the device the chunks were on or, what grows with the prompt, in host memory.

        A prompt of no tokens had no chunk: the tensor is empty then, of any shape.
        """
