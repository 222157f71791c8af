"""A dense decode over compressed entries that is watched: what a backend hands to those who make training data.

Shapes: L observed layers, M hidden size, C compressed-sparse layers, Q query heads, n entries of the prompt, P pairs
that rotate.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class EntryStep:
    """One decode step.

    Attributes:
        hidden_LM: states that entered the observed layers.
        attention_CQn: attention of every head to each entry of the prompt, fp32.
        index_Cn: softmax of the native indexer's scores over all entries, those of the prompt; the rest of 1 went to
            decoded ones.
    """

    hidden_LM: torch.Tensor
    attention_CQn: torch.Tensor
    index_Cn: torch.Tensor


@runtime_checkable
class WatchedEntries(Protocol):
    """A sequence that was opened to be watched."""

    def take(self) -> EntryStep:
        """Return what the last step left, and forget it."""

    def keys(self, layer: int) -> torch.Tensor:
        """Return the model's indexer keys of the prompt's entries in a layer, [n, E]."""

    def state_before(self, layer: int) -> torch.Tensor:
        """Return the state of the prompt's last token entering a layer, [M]."""

    def angles(self, position: int) -> torch.Tensor:
        """Return cosine and sine of the compressed layers' rotation, [2, P] in fp32."""
