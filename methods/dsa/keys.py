"""Index keys of every token: collected in the shared prefill, kept on the device, appended while decoding.

Shapes: S tokens of a prefill chunk, N tokens, E key size, I index heads, M hidden size.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from kvscope.methods.base import Collector
from kvscope.methods.dsa.lightning import LightningConfig, LightningLayer
from kvscope.methods.fp8_keys import KEY_DTYPE, quantize, unpack
from kvscope.methods.shape import tensor_bytes
from kvscope.methods.store import PromptKV
from kvscope.methods.summaries import MetadataStore


class TokenKeys(Collector):
    """Encodes every token's hidden state. Its metadata is on the host: a sequence copies it over."""

    def __init__(self, name: str, layer: int, *, encode: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        """Make a collector; ``encode`` is (layer, hidden [S, M]) -> packed keys [S, E + 4]."""
        self.name, self.layer, self._encode = name, layer, encode
        self._rows: list[torch.Tensor] = []

    def chunk(self, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, hidden_BSM: torch.Tensor, *, start_tokens: int) -> None:
        self._rows.append(self._encode(self.layer, hidden_BSM[0]).cpu())

    def finish(self) -> torch.Tensor:
        """Return [N, E + 4] bytes on the host; [0] for an empty prompt."""
        return torch.cat(self._rows) if self._rows else torch.empty(0)


class Index(NamedTuple):
    """What one query of a layer is scored with.

    Attributes:
        config: of the indexer.
        q_IE, weight_I: of the current token.
        keys_NE, scale_N: fp8 keys and fp32 scales of the tokens before it.
    """

    config: LightningConfig
    q_IE: torch.Tensor
    weight_I: torch.Tensor
    keys_NE: torch.Tensor
    scale_N: torch.Tensor


class TokenKeyStore(MetadataStore):
    """The keys of one sequence, in room for whole pages as K and V have it."""

    def __init__(
        self,
        indexers: Mapping[int, LightningLayer],
        prompt: PromptKV,
        *,
        config: LightningConfig,
        name: str,
        reserve_tokens: int,
    ) -> None:
        """Copy the prompt's keys and make room for ``reserve_tokens`` more.

        Args:
            indexers: layer -> its indexer, on the layer's device: keys are there, too.
            config: theirs.
            name: the collectors'.

        Raises:
            ValueError: the prompt was prefilled without this indexer's collectors.
        """
        shape, n_tokens = prompt.shape, prompt.n_tokens
        self._indexers, self._config, self._page_tokens = indexers, config, shape.page_tokens
        n_room = shape.pages(n_tokens + reserve_tokens) * shape.page_tokens
        self._keys: dict[int, torch.Tensor] = {}
        self._scales: dict[int, torch.Tensor] = {}
        self._lengths = dict.fromkeys(config.layers, n_tokens)
        self._queries: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._count_11: torch.Tensor | None = None
        for layer, indexer in indexers.items():
            device = indexer.weights.weight.device
            self._keys[layer] = torch.zeros((n_room, config.key_dim), dtype=KEY_DTYPE, device=device)
            self._scales[layer] = torch.zeros(n_room, device=device)
            if n_tokens:
                packed = prompt.metadata.get(name, {}).get(layer)
                if packed is None:
                    raise ValueError("the prompt was prefilled without this method's collectors (see union_collectors)")
                keys, scale = unpack(packed)
                self._keys[layer][:n_tokens], self._scales[layer][:n_tokens] = keys.to(device), scale.to(device)

    def make_static(self, count_11: torch.Tensor) -> None:
        self._count_11 = count_11

    def end_step(self) -> None:
        for layer in self._lengths:
            self._lengths[layer] += 1

    def make_room(self, n_tokens: int) -> None:
        for layer, keys in self._keys.items():
            if n_tokens > len(keys):
                self._grow(layer)
                self.moves += 1

    def _grow(self, layer: int) -> None:
        self._keys[layer] = _grown(self._keys[layer], self._page_tokens)
        self._scales[layer] = _grown(self._scales[layer], self._page_tokens)

    @torch.inference_mode()
    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        hidden_BM = hidden_BM.to(self._scales[layer].device)  # it comes from the layer before
        if self._count_11 is not None:
            self._observe_static(layer, hidden_BM, self._count_11)
            return
        indexer, at = self._indexers[layer], self._lengths[layer]
        if at == len(self._scales[layer]):
            self._grow(layer)
        q_XIE, weight_XI = indexer.queries(hidden_BM)
        self._queries[layer] = q_XIE[0], weight_XI[0]
        keys, scale = quantize(indexer.keys(hidden_BM))
        self._keys[layer][at], self._scales[layer][at] = keys[0], scale[0]
        self._lengths[layer] = at + 1

    def _observe_static(self, layer: int, hidden_BM: torch.Tensor, count_11: torch.Tensor) -> None:
        indexer, at_1 = self._indexers[layer], count_11[0].long() - 1
        q_XIE, weight_XI = indexer.queries(hidden_BM)
        self._queries[layer] = q_XIE[0], weight_XI[0]
        keys, scale = quantize(indexer.keys(hidden_BM))
        # As bytes: an index of fp8 is not written everywhere.
        self._keys[layer].view(torch.uint8).index_copy_(0, at_1, keys.view(torch.uint8))
        self._scales[layer].index_copy_(0, at_1, scale)

    def before(self, layer: int, n_blocks: int) -> Index:
        if self._count_11 is not None:
            return Index(self._config, *self._queries[layer], self._keys[layer], self._scales[layer])
        assert self._lengths[layer] == n_blocks + 1, "the current token was observed before it is attended to"
        keys, scales = self._keys[layer][:n_blocks], self._scales[layer][:n_blocks]
        return Index(self._config, *self._queries[layer], keys, scales)

    @property
    def n_bytes(self) -> int:
        return tensor_bytes([*self._keys.values(), *self._scales.values()])

    def clear(self) -> None:
        self._keys.clear()
        self._scales.clear()
        self._queries.clear()


def _grown(old: torch.Tensor, n_more: int) -> torch.Tensor:
    grown = old.new_zeros((len(old) + n_more, *old.shape[1:]))
    grown[: len(old)] = old
    return grown
