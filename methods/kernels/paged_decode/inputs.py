"""What decode attention reads: one store of pages, the tokens of it that count, and in which order.

Shapes: B sequences, Q query heads, H KV heads, D head size, S slots (pages), P tokens a page, T tokens of a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvscope.methods.kv_format import PagePacking

MAX_STORES = 2


@dataclass(frozen=True, kw_only=True)
class PagedKV:
    """Pages of one layer shared by all sequences, and what each of them reads.

    Attributes:
        pages: [S, H, 2, P, D], index 2 being K and V.
        n_tokens: tokens read: an int for all sequences, or int32 on the device, [B or 1, H or 1]; the device's is read
            when the kernel runs, so that a CUDA graph can replay with another count. They fill the table's pages (or
            the token list) in order. Past the capacity nothing is read.
        page_table: slots to read in order, [B or 1, H or 1, pages], int32 or int64; None: slots 0, 1, ...
        tokens: token numbers to read instead of a run from 0, [B or 1, H or 1, T], int32 or int64; token t is in page
            t // P of the table. None: the first ``n_tokens`` tokens.
        packing: how pages are packed; they are bytes [S, H, R] then, and ``tokens`` is None.
    """

    pages: torch.Tensor
    n_tokens: "int | torch.Tensor"
    page_table: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    packing: PagePacking | None = None

    @property
    def page_tokens(self) -> int:
        """P."""
        return self.pages.shape[3] if self.packing is None else self.packing.page_tokens

    @property
    def capacity_tokens(self) -> int:
        """Most tokens one sequence can read."""
        if self.tokens is not None:
            return self.tokens.shape[2]
        n_pages = self.pages.shape[0] if self.page_table is None else self.page_table.shape[2]
        return n_pages * self.page_tokens


@dataclass(frozen=True, kw_only=True)
class TokenPlace:
    """Where a step's token goes, known to the device.

    Attributes:
        pages: [S, H, 2, P, D].
        slot_1, offset_1: its page and its place in it, int32 [1].
    """

    pages: torch.Tensor
    slot_1: torch.Tensor
    offset_1: torch.Tensor


def check_inputs(q_BQ1D: torch.Tensor, stores: Sequence[PagedKV]) -> None:
    """Check shapes and devices.

    Raises:
        ValueError: what does not fit, and what would.
    """
    if q_BQ1D.ndim != 4 or q_BQ1D.shape[2] != 1:
        raise ValueError(f"queries must be [B, Q, 1, D], got {tuple(q_BQ1D.shape)}")
    if not 1 <= len(stores) <= MAX_STORES:
        raise ValueError(f"one store of pages or {MAX_STORES}, got {len(stores)}")
    B, Q, _, D = q_BQ1D.shape
    n_heads = {store.pages.shape[1] for store in stores}
    if len(n_heads) > 1:
        raise ValueError(f"stores must have the same KV heads, got {sorted(n_heads)}")
    for store in stores:
        pages = store.pages
        if store.packing is not None:
            _check_packed(q_BQ1D, store)
        elif pages.ndim != 5 or pages.shape[2] != 2 or pages.shape[4] != D or Q % pages.shape[1]:
            raise ValueError(f"pages {tuple(pages.shape)} do not fit queries {tuple(q_BQ1D.shape)}")
        elif pages.dtype != q_BQ1D.dtype or pages.device != q_BQ1D.device or not pages.is_contiguous():
            raise ValueError(
                f"pages must be contiguous and like the queries ({q_BQ1D.dtype}, {q_BQ1D.device}), got {pages.dtype}, "
                f"{pages.device}"
            )
        H = pages.shape[1]
        for name, index, ndim in (
            ("page_table", store.page_table, 3),
            ("tokens", store.tokens, 3),
            ("n_tokens", store.n_tokens, 2),
        ):
            if not isinstance(index, torch.Tensor):
                continue
            if index.ndim != ndim or index.shape[0] not in (1, B) or index.shape[1] not in (1, H):
                raise ValueError(f"{name} must begin with [{B} or 1, {H} or 1], got {tuple(index.shape)}")
            if index.device != pages.device or index.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name} must be int32 or int64 on {pages.device}, got {index.dtype}, {index.device}")
            if ndim == 3 and index.stride(2) != 1:
                raise ValueError(f"{name} must be contiguous in its last dimension")
        if isinstance(store.n_tokens, int) and not 0 <= store.n_tokens <= store.capacity_tokens:
            raise ValueError(f"{store.n_tokens} tokens do not fit a capacity of {store.capacity_tokens}")


def _check_packed(q_BQ1D: torch.Tensor, store: PagedKV) -> None:
    pages, packing = store.pages, store.packing
    assert packing is not None
    fits = pages.ndim == 3 and pages.shape[2] == packing.record_bytes and packing.head_dim == q_BQ1D.shape[3]
    if not fits or q_BQ1D.shape[1] % pages.shape[1] or store.tokens is not None:
        raise ValueError(
            f"packed pages must be [S, H, {packing.record_bytes}] of heads of {packing.head_dim}, with no token list, "
            f"got {tuple(pages.shape)} for queries {tuple(q_BQ1D.shape)}"
        )
    if pages.dtype != torch.uint8 or pages.device != q_BQ1D.device or not pages.is_contiguous():
        raise ValueError(f"packed pages must be contiguous bytes on {q_BQ1D.device}, got {pages.dtype}, {pages.device}")


def index_strides(index: torch.Tensor) -> tuple[int, int]:
    """Return the strides of an index over sequences and KV heads; a size of 1 serves all, so its stride is 0."""
    return tuple(index.stride(i) if index.shape[i] > 1 else 0 for i in (0, 1))  # type: ignore[return-value]
