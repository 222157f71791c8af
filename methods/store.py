"""Where K and V live: the prefilled prompt in host pages, and page pools on the device.

Shapes: H KV heads, P tokens a page, D head size. One layer's pages are one tensor [pages, H, 2, P, D].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from kvscope.methods.attention import paged_attention
from kvscope.methods.call import AttentionCall
from kvscope.methods.joined import Read
from kvscope.methods.kv_format import PagePacking
from kvscope.methods.pinned import empty_pinned
from kvscope.methods.shape import ModelShape, tensor_bytes

TokenRange = tuple[int, int]
"""Tokens start (included) to end (excluded)."""


@dataclass(kw_only=True)
class PromptKV:
    """A prefilled prompt: read only, opened by every method. It is the host mirror of methods that recall.

    Attributes:
        shape: of the model that made it.
        n_tokens: prompt tokens prefilled (0 is legal: a prompt of one token, which is decode step 0).
        pages: managed layer -> [pages, H, 2, P, D] in host memory, pinned when the model is on a GPU. The unused end
            of the last page is zero. The layers of a synthetic prompt may share memory.
        stock: sliding-window layer -> its stock cache layer, on the layer's device.
        last_hidden: decoder layer -> [B, M], hidden state of the last prefilled token entering it.
        metadata: collector name -> managed layer -> tensor.
        dtype: of K and V.
        seed: of the sample; methods that draw mix it in.
        prompt_sha256: of the token ids.
        prefill_s: wall-clock seconds of the prefill.
        scores_s: seconds of these that collectors took over its attention; None where none heard it.
        peak_device_kv_bytes: K and V held on the device at once while prefilling: one layer, and the stock layers.
        packed: mirrors in fewer bits that methods asked for (``packed_mirror``), made once for all of them.
    """

    shape: ModelShape
    n_tokens: int
    pages: dict[int, torch.Tensor]
    dtype: torch.dtype
    stock: dict[int, Any] = field(default_factory=dict)
    last_hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    seed: int = 0
    prompt_sha256: str = ""
    prefill_s: float = 0.0
    scores_s: float | None = None
    peak_device_kv_bytes: int = 0
    packed: dict[PagePacking, dict[int, torch.Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host pages."""
        return tensor_bytes(self.pages.values())

    def stored_as(self, shape: ModelShape) -> PromptKV:
        """Return the same prompt for a store of another format: ``shape`` says which."""
        return self if shape == self.shape else replace(self, shape=shape)


def empty_host_pages(shape: ModelShape, n_tokens: int, *, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    """Return one layer's uninitialised host pages for ``n_tokens``, the end of the last page zeroed.

    Raises:
        MemoryError: they cannot be mapped or, ``pinned``, locked.
    """
    n_pages = shape.pages(n_tokens)
    size = page_shape(shape, n_pages)
    pages = empty_pinned(size, dtype=dtype) if pinned else torch.empty(size, dtype=dtype)
    if n_pages * shape.page_tokens > n_tokens:
        pages[-1].zero_()
    return pages


class PagePool:
    """Resident pages of every managed layer on the device, filled in order, appended to, grown page by page.

    Each layer's pages are on the layer's device. Tokens are packed: whatever is kept of the prompt comes first, in
    order, then what is decoded. Attention does not mind, since rotation was applied at a token's own position before it
    was stored.
    """

    def __init__(self, shape: ModelShape, *, n_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate pages for ``n_tokens`` in every managed layer.

        Memory is zeroed: a weight of zero on stale memory that happens to hold NaN would still be NaN.
        """
        self.shape = shape
        self.dtype = dtype
        self.pages = {
            layer: torch.zeros(
                page_shape(shape, shape.pages(n_tokens)), dtype=dtype, device=shape.device_of(layer, device)
            )
            for layer in shape.layers
        }
        self.lengths = dict.fromkeys(shape.layers, 0)
        self._n_bytes: int | None = None

    def load(self, prompt: PromptKV, ranges: Iterable[TokenRange]) -> None:
        """Copy the prompt's tokens in ``ranges`` (ascending, disjoint) into the pool, packed."""
        ranges = [(start, end) for start, end in ranges if end > start]
        n_tokens = sum(end - start for start, end in ranges)
        P = self.shape.page_tokens
        whole_pages = all(start % P == 0 for start, _ in ranges)
        whole_pages &= all((end - start) % P == 0 for start, end in ranges[:-1])
        for layer, pool in self.pages.items():
            host = prompt.pages[layer]
            if n_tokens and whole_pages:
                # Whole pages in place: one contiguous copy a range, which on a GPU is one DMA.
                at = 0
                for start, end in ranges:
                    n_pages = self.shape.pages(end - start)
                    pool[at : at + n_pages].copy_(host[start // P : start // P + n_pages], non_blocking=True)
                    at += n_pages
                # The last page may bring tokens beyond the range along: what is dropped is not kept out of sight.
                pool[at - 1, :, :, (n_tokens - 1) % P + 1 :] = 0
            elif n_tokens:
                packed = range_pages(host, ranges, self.shape)
                pool[: packed.shape[0]].copy_(packed)
            self.lengths[layer] = n_tokens
        for device in {pages.device for pages in self.pages.values()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the host pages may go away once this returns

    def load_heads(self, prompt: PromptKV, kept: Mapping[int, torch.Tensor]) -> None:
        """Copy tokens that differ from KV head to KV head, packed.

        Args:
            kept: of each layer of the pool [H, n]: the positions each head keeps, n of them everywhere.
        """
        for layer, pool in self.pages.items():
            n_tokens = kept[layer].shape[1]
            if n_tokens:
                packed = head_pages(prompt.pages[layer], kept[layer], self.shape)
                pool[: packed.shape[0]].copy_(packed)
            self.lengths[layer] = n_tokens

    def append(self, layer: int, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        """Store one token behind the last."""
        if self.lengths[layer] == self.pages[layer].shape[0] * self.shape.page_tokens:
            self._grow(layer)
        self.write(layer, self.lengths[layer], k_BH1D, v_BH1D)
        self.lengths[layer] += 1

    def reserve(self, n_tokens: int) -> bool:
        """Make room for ``n_tokens`` in every layer; return whether pages moved for it."""
        moved = False
        for layer, pages in self.pages.items():
            while self.pages[layer].shape[0] * self.shape.page_tokens < n_tokens:
                self._grow(layer)
            moved |= self.pages[layer] is not pages
        return moved

    def write(self, layer: int, index: int, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        """Overwrite the token at packed position ``index``."""
        slot, offset = divmod(index, self.shape.page_tokens)
        page = self.pages[layer][slot, :, :, offset]
        page[:, 0] = k_BH1D[0, :, 0]
        page[:, 1] = v_BH1D[0, :, 0]

    def write_heads(self, layer: int, index_H: torch.Tensor, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        """Overwrite one token of each KV head, at packed positions [H] that the device knows."""
        P = self.shape.page_tokens
        head_H = torch.arange(len(index_H), device=index_H.device)
        self.pages[layer][index_H // P, head_H, :, index_H % P] = torch.stack((k_BH1D[0, :, 0], v_BH1D[0, :, 0]), 1)

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Attend one query to every token; the call and the result are ``paged_attention``'s."""
        return paged_attention(call, self.pages[layer], n_tokens=self.lengths[layer])

    def read(self, layer: int, *, turn_tokens: int = 0) -> Read:
        """Return every token of a layer as what a query attends to."""
        return Read(pages=self.pages[layer], n_tokens=self.lengths[layer], turn_tokens=turn_tokens)

    def keys(self, layer: int, start_tokens: int, end_tokens: int) -> torch.Tensor:
        """Return the keys [H, T, D] of tokens start to end (excluded); copies those pages only."""
        P = self.shape.page_tokens
        first = start_tokens // P
        k_HTD = self.pages[layer][first : -(-end_tokens // P), :, 0].transpose(0, 1).flatten(1, 2)
        return k_HTD[:, start_tokens - first * P : end_tokens - first * P]

    @property
    def n_bytes(self) -> int:
        """Bytes of the live pages. Asked at every step of every sequence, so counted when they change."""
        if self._n_bytes is None:
            self._n_bytes = tensor_bytes(self.pages.values())
        return self._n_bytes

    def clear(self) -> None:
        """Free the pages."""
        self.pages.clear()
        self._n_bytes = None

    def _grow(self, layer: int) -> None:
        old = self.pages[layer]
        self._n_bytes = None
        self.pages[layer] = torch.cat([old, old.new_zeros((1, *old.shape[1:]))])


def page_shape(shape: ModelShape, n_pages: int) -> tuple[int, int, int, int, int]:
    """Return the size of one layer's pages, [n_pages, H, 2, P, D]."""
    return (n_pages, shape.n_kv_heads, 2, shape.page_tokens, shape.head_dim)


def range_pages(
    host: torch.Tensor, ranges: list[TokenRange], shape: ModelShape, *, first: int = 0, last: int | None = None
) -> torch.Tensor:
    """Gather tokens of one layer's host pages into pages, packed in order; the end of the last page is zero.

    Args:
        host: [pages, H, 2, P, D].
        ranges: ascending, disjoint.
        first, last: of the pages of these tokens, the ones wanted (``last`` excluded); all of them.
    """
    P = shape.page_tokens
    if len(ranges) == 1 and last is not None and ranges[0][0] % P == 0 and ranges[0][0] + last * P <= ranges[0][1]:
        begin = ranges[0][0] // P  # whole pages of the prompt, as they lie there
        return host[begin + first : begin + last]
    tokens = [torch.arange(start, end) for start, end in ranges]
    token_N = torch.cat(tokens) if tokens else torch.arange(0)
    return head_pages(host, token_N.expand(shape.n_kv_heads, -1), shape, first=first, last=last)


def head_pages(
    host: torch.Tensor, token_HN: torch.Tensor, shape: ModelShape, *, first: int = 0, last: int | None = None
) -> torch.Tensor:
    """The same of tokens that differ from KV head to KV head, [H, N], equally many of each."""
    P, H = shape.page_tokens, shape.n_kv_heads
    token_HN = token_HN[:, first * P : None if last is None else last * P]
    packed = host.new_empty(page_shape(shape, n_pages := shape.pages(token_HN.shape[1])))
    # A token's K and V are a row each: rows are copied whole, which indexing several dimensions at once does not do.
    rest = n_pages * P - token_HN.shape[1]
    token_HSP = F.pad(token_HN, (0, rest)).view(H, n_pages, P)
    page_SHP, offset_SHP = (x.transpose(0, 1) for x in (token_HSP // P, token_HSP % P))
    row_SHP = (page_SHP * H + torch.arange(H)[:, None]) * 2 * P + offset_SHP
    row_SH2P = torch.stack((row_SHP, row_SHP + P), 2)
    torch.index_select(host.reshape(-1, host.shape[-1]), 0, row_SH2P.flatten(), out=packed.view(-1, host.shape[-1]))
    if rest:
        packed[-1, :, :, P - rest :] = 0
    return packed
