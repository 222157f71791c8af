"""The methods over compressed entries: what each keeps of a prompt, its bytes, and how it opens one.

The methods mean what they mean elsewhere, in units of entries (four tokens): ``dense`` keeps all of them, ``recency``
those that hold a token of the window, ``random`` these and drawn chunks, ``lsa`` those an indexer predicts, chosen
again every tau steps. Windows, HCA entries, pending tokens and what is decoded always stay.
"""

from abc import abstractmethod
from typing import Any

import torch

from kvscope.harness.backends.deepseek_v4.prefill import CompressedPrompt
from kvscope.harness.backends.deepseek_v4.sequence import CompressedSequence
from kvscope.harness.backends.deepseek_v4.shape import CompressedModelShape
from kvscope.methods.base import CacheMethod, Collector, SequenceCache
from kvscope.methods.dense.method import Dense
from kvscope.methods.random.method import RandomChunks
from kvscope.methods.recency.method import Recency
from kvscope.methods.resident import StaticResidency
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.store import PromptKV, TokenRange


class OverEntries(CacheMethod[Any]):
    """What the four methods share. Mixed in before the method's ordinary class, which resolves the options."""

    def __init__(self, config: Any = None, *, label: str | None = None, shape: CompressedModelShape) -> None:
        super().__init__(config, label=label)
        self.entry_shape = shape

    @abstractmethod
    def n_fixed(self, n_tokens: int) -> int:
        """Return how many entries of a prompt always stay."""

    def n_kept(self, n_tokens: int) -> int:
        """Return how many entries stay, chosen ones included; where that depends on the data, at most."""
        return self.n_fixed(n_tokens)

    def choosing(self, n_tokens: int) -> Footprint:
        """Return what choosing takes of a prompt: bytes on the device, and a step's share of bytes read and FLOPs."""
        del n_tokens
        return Footprint()

    def collectors(self, layer: int) -> list[Collector]:
        return []

    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        return self.n_kept(n_tokens) >= n_tokens // self.entry_shape.page_tokens

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        """Return the footprint, mean over the steps: windows, HCA entries and pending tokens grow as the model goes."""
        held = self.entry_shape.mean_step(n_tokens, n_new_tokens, n_kept=self.n_kept(n_tokens))
        return held + self.choosing(n_tokens)

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        values = super().effective_config(n_tokens, self.entry_shape)  # type: ignore[safe-super]
        return {**values, "tokens_per_entry": self.entry_shape.page_tokens}

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        """Open a prompt; ``reserve_tokens`` reserves CSA entries, the rest of the stock cache grows by itself."""
        assert isinstance(prompt, CompressedPrompt)
        return self.open_entries(prompt, torch.device(device), reserve_tokens=reserve_tokens)

    @abstractmethod
    def open_entries(
        self, prompt: CompressedPrompt, device: torch.device, *, reserve_tokens: int
    ) -> CompressedSequence:
        """Open a prompt; arguments as ``open``."""

    @staticmethod
    def _entries(ranges: list[TokenRange], prompt: CompressedPrompt) -> torch.Tensor:
        """Entries that hold any token of some ranges, ascending. An incomplete last one is among the pending tokens."""
        rate = prompt.shape.page_tokens
        keep = torch.zeros(prompt.n_entries, dtype=torch.bool)
        for start, end in ranges:
            keep[start // rate : -(-end // rate)] = True
        return keep.nonzero()[:, 0]


class FixedEntries(OverEntries, StaticResidency[Any]):
    """A residency chosen once, at opening: the entries that hold any token its method keeps."""

    def open_entries(
        self, prompt: CompressedPrompt, device: torch.device, *, reserve_tokens: int
    ) -> CompressedSequence:
        fixed = self._entries(self.resident_ranges(prompt), prompt)
        return CompressedSequence(prompt, device, fixed=fixed, reserve_tokens=reserve_tokens)


class DenseEntries(FixedEntries, Dense):
    """Every entry resident."""

    stays = "every compressed entry and indexer key"
    cost = "resident = the stock cache: N/4 entries and indexer keys a CSA layer, N/128 entries an HCA layer, windows"

    def n_fixed(self, n_tokens: int) -> int:
        return n_tokens // self.entry_shape.page_tokens


class RecencyEntries(FixedEntries, Recency):
    """The entries of the last tokens of the prompt."""

    stays = "CSA entries of the last tokens of the prompt and of every decoded token; HCA entries and windows"
    cost = "resident = R/4 entries and indexer keys a CSA layer + decoded, N/128 entries an HCA layer, windows"

    def n_fixed(self, n_tokens: int) -> int:
        rate = self.entry_shape.page_tokens
        window = self.n_resident_tokens(n_tokens, self.entry_shape)
        return n_tokens // rate - (n_tokens - window) // rate


class RandomEntries(FixedEntries, RandomChunks):
    """The same, and the entries of chunks drawn once a sequence."""

    stays = "CSA entries of the last tokens, of a random tenth of the chunks before and of decoded tokens; HCA, windows"
    cost = "resident = (R + fraction * (N - R))/4 entries and keys a CSA layer + decoded, N/128 an HCA layer, windows"

    def unsupported(self, shape: ModelShape, device: torch.device | str) -> list[str]:
        rate, C = self.entry_shape.page_tokens, self.config.chunk_tokens
        return [f"chunk_tokens={C} is not a multiple of the {rate} tokens of an entry"] if C % rate else []

    def n_fixed(self, n_tokens: int) -> int:
        rate = self.entry_shape.page_tokens
        if self.keeps_all(n_tokens, self.entry_shape):
            return n_tokens // rate
        recency_tokens, n_drawn, _ = self._split(n_tokens, self.entry_shape)
        window = n_tokens // rate - (n_tokens - recency_tokens) // rate
        drawn: int = n_drawn * self.config.chunk_tokens // rate
        return window + drawn
