"""A pool of packed pages: what is older in few bits, and the newest tokens at the model's precision, the residual.

The residual is a ring of whole raw pages at addresses that stay. Where it is full and a token comes, its oldest page is
packed behind the packed ones and takes the token. So what is packed follows from the count of tokens alone.

Shapes: L layers, S packed pages, W pages of the residual, H KV heads, P tokens a page, D head size, R bytes a record.
Packed pages of a layer are one tensor of bytes [S, H, R].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from kvscope.methods.attention import stored_attention
from kvscope.methods.call import AttentionCall
from kvscope.methods.kernels.paged_decode.inputs import PagedKV, TokenPlace
from kvscope.methods.kv_format import PagePacking, residual_pages
from kvscope.methods.packing import pack_pages, unpack_tokens
from kvscope.methods.pinned import empty_pinned
from kvscope.methods.shape import ModelShape, tensor_bytes
from kvscope.methods.step_batch import StepReads
from kvscope.methods.step_counters import StepCounters
from kvscope.methods.store import PromptKV, TokenRange, head_pages, page_shape, range_pages

#: Raw bytes on the device at once while a prompt is packed: packing takes seven to nine times as many beside them, as
#: the driver sees. Large layers are packed in this many parts instead, or launches would take long.
_RAW_BYTES_AT_ONCE, _PARTS_OF_A_LAYER = 1 << 20, 64
Source = Callable[[int, int, int], torch.Tensor]
"""Layer, first page and page behind the last -> raw host pages of the tokens kept, packed in order."""


@dataclass(frozen=True, eq=False)
class _Residual:
    """The residual of the layers on one device.

    Attributes:
        layers: L of them.
        pages_LWH2PD: their raw pages.
        turns_WW: row w is the order of a ring whose oldest page is w.
    """

    layers: tuple[int, ...]
    pages_LWH2PD: torch.Tensor
    turns_WW: torch.Tensor


def _turns(n_pages: int, device: torch.device) -> torch.Tensor:
    turn_W = torch.arange(n_pages, dtype=torch.int32, device=device)
    return (turn_W[:, None] + turn_W) % n_pages


class PackedPool:
    """The pool of ``store.PagePool`` in fewer bits: same calls, same order of tokens.

    Attributes:
        pages: layer -> packed pages [S, H, R]; the first ``n_packed`` of them hold tokens.
        lengths: layer -> tokens held.
        dtype: of the residual.
    """

    def __init__(self, shape: ModelShape, *, n_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the residual, and packed pages for ``n_tokens``, in every managed layer."""
        self.shape, self.dtype = shape, dtype
        self.packing = shape.packing()
        self._W, self._P = residual_pages(shape.page_tokens), shape.page_tokens
        size = (shape.packed_pages(n_tokens), shape.n_kv_heads, self.packing.record_bytes)
        places: dict[torch.device, list[int]] = {}
        for layer in shape.layers:
            places.setdefault(shape.device_of(layer, device), []).append(layer)
        self.pages = {
            layer: torch.zeros(size, dtype=torch.uint8, device=place)
            for place, layers in places.items()
            for layer in layers
        }
        # One tensor a device, so that the oldest page of all its layers is packed at once.
        self._residuals = [
            _Residual(
                layers=tuple(layers),
                pages_LWH2PD=torch.zeros((len(layers), *page_shape(shape, self._W)), dtype=dtype, device=place),
                turns_WW=_turns(self._W, place),
            )
            for place, layers in places.items()
        ]
        self._place = {layer: (held, index) for held in self._residuals for index, layer in enumerate(held.layers)}
        self.n_packed = dict.fromkeys(shape.layers, 0)
        self._oldest = dict.fromkeys(shape.layers, 0)
        self.lengths = dict.fromkeys(shape.layers, 0)

    # -- the prompt

    def load(self, prompt: PromptKV, ranges: Iterable[TokenRange]) -> None:
        """Take the prompt's tokens in ``ranges`` (ascending, disjoint), packed in both senses."""
        ranges = [(start, end) for start, end in ranges if end > start]
        n_tokens = sum(end - start for start, end in ranges)
        self._load(
            lambda layer, first, last: range_pages(prompt.pages[layer], ranges, self.shape, first=first, last=last),
            dict.fromkeys(self.shape.layers, n_tokens),
        )

    def load_heads(self, prompt: PromptKV, kept: Mapping[int, torch.Tensor]) -> None:
        """Take tokens that differ from KV head to KV head; ``kept`` as ``PagePool.load_heads``."""
        self._load(
            lambda layer, first, last: head_pages(prompt.pages[layer], kept[layer], self.shape, first=first, last=last),
            {layer: kept[layer].shape[1] for layer in self.shape.layers},
        )

    def _load(self, source: Source, counts: Mapping[int, int]) -> None:
        for layer in self.shape.layers:
            n_tokens, pool = counts[layer], self.pages[layer]
            n_packed = self.shape.packed_pages(n_tokens)
            at_once = pages_at_once(n_packed, self.residual(layer)[0].nbytes)
            for first in range(0, n_packed, at_once):
                last = min(first + at_once, n_packed)
                raw = source(layer, first, last).to(pool.device)
                pool[first:last] = pack_pages(raw, self.packing)
            newest = source(layer, n_packed, self.shape.pages(n_tokens))
            self.residual(layer)[: len(newest)] = newest.to(pool.device)
            self.lengths[layer], self.n_packed[layer] = n_tokens, n_packed

    # -- what is decoded

    def append(self, layer: int, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        """Store one token behind the last; the oldest page of a full residual is packed for it."""
        if self.residual_tokens(layer) == self._W * self._P:
            if self.n_packed[layer] == len(self.pages[layer]):
                self._grow(layer)
            raw = self.residual(layer)[self._oldest[layer]]
            self.pages[layer][self.n_packed[layer]] = pack_pages(raw, self.packing)
            self._turn(layer)
        slot, offset = self.place(layer)
        page = self.residual(layer)[slot, :, :, offset]
        page[:, 0] = k_BH1D[0, :, 0]
        page[:, 1] = v_BH1D[0, :, 0]
        self.lengths[layer] += 1

    def make_room(self) -> bool:
        """Before a step of all layers: pack the oldest page of a full residual; return whether pages moved for it."""
        layers = self.shape.layers
        last = layers[-1]
        if self.residual_tokens(last) < self._W * self._P:
            return False
        moved = self.n_packed[last] == len(self.pages[last])
        if moved:
            for layer in layers:
                self._grow(layer)
        oldest = self._oldest[last]
        for held in self._residuals:
            packed_LHR = pack_pages(held.pages_LWH2PD[:, oldest], self.packing)
            for packed_HR, layer in zip(packed_LHR, held.layers, strict=True):
                self.pages[layer][self.n_packed[layer]] = packed_HR
                self._turn(layer)
        return moved

    def place(self, layer: int) -> tuple[int, int]:
        """Return the residual's page, and the place in it, of the next token."""
        slot, offset = divmod(self.residual_tokens(layer), self._P)
        return (self._oldest[layer] + slot) % self._W, offset

    def residual_tokens(self, layer: int) -> int:
        """Return the tokens at the model's precision."""
        return self.lengths[layer] - self.n_packed[layer] * self._P

    def _turn(self, layer: int) -> None:
        self.n_packed[layer] += 1
        self._oldest[layer] = (self._oldest[layer] + 1) % self._W

    def _grow(self, layer: int) -> None:
        old = self.pages[layer]
        self.pages[layer] = torch.cat([old, old.new_zeros((1, *old.shape[1:]))])

    # -- reading

    def residual(self, layer: int) -> torch.Tensor:
        """Return the residual's pages [W, H, 2, P, D]; ``residual_order`` says which is the oldest."""
        held, index = self._place[layer]
        return held.pages_LWH2PD[index]

    def residual_order(self, layer: int) -> torch.Tensor:
        """Return the residual's pages from the oldest to the newest, int32 [1, 1, W]."""
        held, _ = self._place[layer]
        return held.turns_WW[self._oldest[layer]][None, None]

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Attend one query to every token; the call and the result are ``paged_attention``'s."""
        return stored_attention(call, self.stores(layer))

    def stores(self, layer: int) -> list[PagedKV]:
        """Return what attention reads: packed pages where there are any, and the residual."""
        found = []
        n_packed = self.n_packed[layer]
        if n_packed:
            found.append(PagedKV(pages=self.pages[layer], n_tokens=n_packed * self._P, packing=self.packing))
        n_raw = self.residual_tokens(layer)
        if n_raw:
            order = self.residual_order(layer)
            found.append(PagedKV(pages=self.residual(layer), n_tokens=n_raw, page_table=order))
        return found

    def tokens(self, layer: int, token_HT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of single tokens [H, T], each [H, T, D] in fp32."""
        P, n_packed = self._P, self.n_packed[layer]
        head_H1 = torch.arange(len(token_HT), device=token_HT.device)[:, None]
        is_raw_HT = token_HT >= n_packed * P
        raw_HT = (token_HT - n_packed * P).clamp_min(0)
        slot_HT = (self._oldest[layer] + raw_HT // P) % self._W
        found_2HTD = self.residual(layer)[slot_HT, head_H1, :, raw_HT % P].permute(2, 0, 1, 3).float()
        if n_packed:
            at_HT = token_HT.clamp_max(n_packed * P - 1)
            packed_2HTD = unpack_tokens(self.pages[layer], self.packing, page_HT=at_HT // P, offset_HT=at_HT % P)
            found_2HTD = torch.where(is_raw_HT[None, :, :, None], found_2HTD, packed_2HTD)
        return found_2HTD[0], found_2HTD[1]

    def keys(self, layer: int, start_tokens: int, end_tokens: int) -> torch.Tensor:
        """Return the keys [H, T, D] of tokens start to end (excluded), as they are read back."""
        token_T = torch.arange(start_tokens, end_tokens, device=self.pages[layer].device)
        return self.tokens(layer, token_T.expand(self.shape.n_kv_heads, -1))[0].to(self.dtype)

    def make_step(self, counters: StepCounters) -> PackedStep:
        """Return what appends and reads at fixed addresses from here on."""
        return PackedStep(self, counters)

    # -- bytes

    @property
    def n_bytes(self) -> int:
        """Bytes of the live pages, scales, bases and residual included."""
        return tensor_bytes([*self.pages.values(), *(held.pages_LWH2PD for held in self._residuals)])

    def clear(self) -> None:
        """Free the pages."""
        self.pages.clear()
        self._residuals.clear()
        self._place.clear()


def pages_at_once(n_pages: int, page_bytes: int) -> int:
    """Return how many raw pages of a layer are on the device together while they are packed."""
    return max(_RAW_BYTES_AT_ONCE // page_bytes, n_pages // _PARTS_OF_A_LAYER, 1)


def packed_mirror(prompt: PromptKV, packing: PagePacking, device: torch.device) -> dict[int, torch.Tensor]:
    """Return the prompt's host pages packed, for methods that recall: layer -> [pages, H, 2, 1, R / 2] in host memory.

    A record is cut in halves where raw pages have K and V, so that what moves raw pages moves these. Whole prompts are
    packed, the unused end of the last page too; on a GPU it packs, block by block.

    Args:
        packing: its page is the unit of recall, and divides the prompt's pages.
    """
    found = prompt.packed.get(packing)
    if found is None:
        found = {layer: _packed_layer(pages, packing, device) for layer, pages in prompt.pages.items()}
        prompt.packed[packing] = found
    return found


def _packed_layer(raw: torch.Tensor, packing: PagePacking, device: torch.device) -> torch.Tensor:
    S, H, _, P, D = raw.shape
    parts, unit = P // packing.page_tokens, packing.page_tokens
    size = (S * parts, H, 2, 1, packing.record_bytes // 2)
    packed = empty_pinned(size, dtype=torch.uint8) if raw.is_pinned() else torch.empty(size, dtype=torch.uint8)
    at_once = pages_at_once(S, H * 2 * P * D * raw.itemsize)
    for first in range(0, S, at_once):
        block = raw[first : first + at_once].to(device)
        units = block.view(-1, H, 2, parts, unit, D).permute(0, 3, 1, 2, 4, 5)
        records = pack_pages(units, packing).view(-1, *size[1:])
        packed[first * parts : first * parts + len(records)] = records.cpu()
    return packed


class PackedStep:
    """``static_step.StepPages`` over a packed pool: the step's token goes to the residual, at addresses that stay.

    Between steps, where the residual is full, its oldest page is packed: a few launches every P steps, behind the steps
    before and ahead of those to come, with nothing to wait for.

    Attributes:
        version: changes when packed pages moved because they grew: what was captured must be captured again.
    """

    def __init__(self, pool: PackedPool, counters: StepCounters) -> None:
        self.version = 0
        self._pool = pool
        self._last = pool.shape.layers[-1]
        self._counters = [counters.take() for _ in range(4)]
        self._n_packed, self._n_raw, self._slot, self._offset = self._counters
        self._order_11W = pool.residual_order(self._last).clone()

    def place(self) -> None:
        """Before a step: make room for its token and tell the device where that is."""
        pool = self._pool
        self.version += pool.make_room()
        slot, offset = pool.place(self._last)
        self._slot.set(slot)
        self._offset.set(offset)
        self._n_raw.set(pool.residual_tokens(self._last) + 1)
        self._n_packed.set(pool.n_packed[self._last] * pool.shape.page_tokens)
        self._order_11W.copy_(pool.residual_order(self._last))

    def placed(self) -> None:
        """After a step: its token is stored in every layer."""
        for layer in self._pool.shape.layers:
            self._pool.lengths[layer] += 1

    def append(self, layer: int, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        """Store the step's token."""
        place = self.place_of(layer)
        place.pages[place.slot_1, :, :, place.offset_1] = torch.stack((k_BH1D[:, :, 0], v_BH1D[:, :, 0]), 2)

    def place_of(self, layer: int) -> TokenPlace:
        """Return where the step's token goes."""
        pages = self._pool.residual(layer)
        return TokenPlace(pages=pages, slot_1=self._slot.device_1, offset_1=self._offset.device_1)

    def stores(self, layer: int) -> tuple[PagedKV, ...]:
        """Return what attention reads, the step's token included."""
        pool = self._pool
        raw = PagedKV(pages=pool.residual(layer), n_tokens=self._n_raw.device_1[None], page_table=self._order_11W)
        if not len(pool.pages[layer]):
            return (raw,)
        count_11 = self._n_packed.device_1[None]
        return (PagedKV(pages=pool.pages[layer], n_tokens=count_11, packing=pool.packing), raw)

    def reads(self, layer: int) -> StepReads | None:
        """Return None: the launch for many sequences reads raw pages, so each attends by itself."""
        del layer
        return None

    def release(self) -> None:
        """Give the counters back, once."""
        while self._counters:
            self._counters.pop().release()
