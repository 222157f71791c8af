"""One summary vector or more for each block of keys: collected in the shared prefill, appended while decoding.

Shapes: H KV heads, S tokens of a chunk, N blocks, T tokens of a block, X vectors a summary, D head size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvscope.methods.base import Collector
from kvscope.methods.shape import ModelShape, tensor_bytes
from kvscope.methods.store import PromptKV

Summarise = Callable[[torch.Tensor], torch.Tensor]
"""Keys of whole blocks [H, N, T, D] -> summaries [N, H, X, D], in the dtype of the keys."""
Keys = Callable[[int, int, int], torch.Tensor]
"""Layer, first token, token behind the last -> the stored keys [H, T, D], unpacked where they are packed."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a method keeps of a block of keys.

    Attributes:
        name: of the collector, with every setting that decides its result.
        n_vectors: X.
        of_blocks: the function.
        block_tokens: prompt tokens -> tokens of a block.
    """

    name: str
    n_vectors: int
    of_blocks: Summarise
    block_tokens: Callable[[int], int]


class SummaryCollector(Collector):
    """Summarises every whole block of one layer's keys as the prompt passes.

    The last block is left out while it is not full: it is the current block of the queries to come, which read it
    without a score. Summaries leave the device chunk by chunk, so that the prefill holds those of no two layers.
    """

    def __init__(self, summary: Summary, layer: int) -> None:
        self.name = summary.name
        self.layer = layer
        self._summary = summary
        self._block = 0
        self._rest: torch.Tensor | None = None
        self._found: list[torch.Tensor] = []

    def begin(self, n_tokens: int) -> None:
        self._block = self._summary.block_tokens(n_tokens)

    def chunk(self, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, hidden_BSM: torch.Tensor, *, start_tokens: int) -> None:
        k_HSD = k_BHSD[0] if self._rest is None else torch.cat([self._rest, k_BHSD[0]], 1)
        n_blocks = k_HSD.shape[1] // self._block
        n_whole = n_blocks * self._block
        if n_blocks:
            H, _, D = k_HSD.shape
            k_HNTD = k_HSD[:, :n_whole].reshape(H, n_blocks, self._block, D)
            self._found.append(self._summary.of_blocks(k_HNTD).cpu())
        self._rest = k_HSD[:, n_whole:].clone()  # the keys are a view of a buffer that the next layer overwrites

    def finish(self) -> torch.Tensor:
        self._rest = None
        return torch.cat(self._found) if self._found else torch.zeros(0)


class MetadataStore(ABC):
    """What a method keeps beside K and V to choose with, of one sequence: a private copy, so that forks do not meet.

    Attributes:
        moves: how often its tensors moved because they grew.
    """

    moves: int = 0

    def make_room(self, n_tokens: int) -> None:  # noqa: B027 - most grow as blocks fill
        """Make room for ``n_tokens`` in all, before a step of fixed addresses writes the last of them."""

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:  # noqa: B027 - most are made of keys
        """Take the current token's hidden state entering a layer, before its K and V are appended."""

    def make_static(self, count_11: torch.Tensor) -> None:  # noqa: B027 - most are written between steps
        """From here on, ``observe`` runs at fixed addresses; ``count_11`` are the tokens, the step's included."""

    def end_step(self) -> None:  # noqa: B027 - most are made of keys
        """A step of fixed addresses has ended."""

    def appended(self, layer: int, keys: Keys, n_tokens: int) -> None:  # noqa: B027 - most: of keys alone
        """Take note that the layer's store holds ``n_tokens`` now; ``keys`` reads them."""

    @abstractmethod
    def before(self, layer: int, n_blocks: int) -> object:
        """Return what is kept of the first ``n_blocks`` blocks, and whatever else a score needs."""

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Bytes of the live metadata."""

    @abstractmethod
    def clear(self) -> None:
        """Free it."""


class SummaryStore(MetadataStore):
    """Summaries of the whole blocks of one sequence, each layer's on its device."""

    def __init__(
        self,
        summary: Summary,
        prompt: PromptKV,
        *,
        layers: tuple[int, ...],
        block_tokens: int,
        reserve_tokens: int,
        device: torch.device,
    ) -> None:
        """Copy the prompt's summaries and make room for ``reserve_tokens`` more tokens.

        Raises:
            ValueError: the prompt was prefilled without this summary's collectors.
        """
        self._summary = summary
        self._block = block_tokens
        shape = prompt.shape
        n_room = (prompt.n_tokens + reserve_tokens) // block_tokens
        n_found = prompt.n_tokens // block_tokens
        self.summaries: dict[int, torch.Tensor] = {}
        for layer in layers:
            room = torch.zeros(
                (n_room, shape.n_kv_heads, summary.n_vectors, shape.head_dim),
                dtype=prompt.dtype,
                device=shape.device_of(layer, device),
            )
            if n_found:
                collected = prompt.metadata.get(summary.name, {}).get(layer)
                if collected is None:
                    raise ValueError(
                        f"this prompt was prefilled without the collectors of '{summary.name}': pass "
                        "union_collectors(methods, layers) to prefill"
                    )
                room[:n_found] = collected
            self.summaries[layer] = room
        self._lengths = dict.fromkeys(layers, n_found)

    def appended(self, layer: int, keys: Keys, n_tokens: int) -> None:
        """The same; a block that was just filled gets its summary, once."""
        index = self._lengths[layer]
        if n_tokens % self._block or index == n_tokens // self._block:
            return
        old = self.summaries[layer]
        if index == old.shape[0]:
            self.summaries[layer] = torch.cat([old, old.new_zeros((1, *old.shape[1:]))])
            self.moves += 1
        k_HTD = keys(layer, n_tokens - self._block, n_tokens)
        self.summaries[layer][index] = self._summary.of_blocks(k_HTD[:, None])[0]
        self._lengths[layer] += 1

    def before(self, layer: int, n_blocks: int) -> torch.Tensor:
        return self.summaries[layer][:n_blocks]

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(self.summaries.values())

    def clear(self) -> None:
        self.summaries.clear()


def summary_bytes(shape: ModelShape, n_vectors: int, n_blocks: int) -> int:
    """Return the bytes of one layer's summaries of ``n_blocks`` blocks."""
    return n_blocks * shape.n_kv_heads * n_vectors * shape.head_dim * shape.element_bytes
