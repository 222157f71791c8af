"""What the shared prefill leaves behind for the indexer: one key a chunk or segment, and the last hidden states.

Shapes: S tokens of a prefill chunk, C tokens that share a key (a chunk, or a segment of one), n of these, H KV
heads, D head size, F = H * D, M hidden size.
"""

from collections.abc import Callable

import torch

from kvscope.methods.base import Collector


class ChunkKeys(Collector):
    """Encodes every whole chunk of the prompt. Its metadata is on the host: a sequence copies its candidates over."""

    unrotated_keys = True

    def __init__(
        self, name: str, layer: int, *, chunk_tokens: int, encode: Callable[[int, torch.Tensor], torch.Tensor]
    ) -> None:
        """Make a collector.

        Args:
            chunk_tokens: C.
            encode: (layer, keys [n, C, F]) -> one row a chunk [n, ...].
        """
        self.name, self.layer = name, layer
        self._chunk_tokens, self._encode = chunk_tokens, encode
        self._left: torch.Tensor | None = None
        self._rows: list[torch.Tensor] = []

    def chunk(self, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, hidden_BSM: torch.Tensor, *, start_tokens: int) -> None:
        k_SF = k_BHSD[0].transpose(0, 1).flatten(1)
        if self._left is not None:
            k_SF = torch.cat([self._left, k_SF])
        n_whole = len(k_SF) // self._chunk_tokens
        if n_whole:
            whole = k_SF[: n_whole * self._chunk_tokens].view(n_whole, self._chunk_tokens, -1)
            self._rows.append(self._encode(self.layer, whole).cpu())
        # A copy: the keys are views of a buffer that the next layer overwrites.
        self._left = k_SF[n_whole * self._chunk_tokens :].clone()

    def finish(self) -> torch.Tensor:
        """Return [n, ...] on the host; [0] for a prompt without a whole chunk."""
        return torch.cat(self._rows) if self._rows else torch.empty(0)


class LastStates(Collector):
    """Keeps the hidden states of the last tokens entering a layer."""

    def __init__(self, layer: int, *, n_states: int) -> None:
        self.name, self.layer, self._n_states = f"last_states_{n_states}", layer, n_states
        self._states: torch.Tensor | None = None

    def chunk(self, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, hidden_BSM: torch.Tensor, *, start_tokens: int) -> None:
        last = hidden_BSM[0, -self._n_states :]
        joined = last if self._states is None else torch.cat([self._states, last])[-self._n_states :]
        self._states = joined.clone()  # the hidden states are overwritten in place

    def finish(self) -> torch.Tensor:
        """Return at most ``n_states`` states, oldest first, [n, M], on the model's device."""
        return torch.empty(0) if self._states is None else self._states
