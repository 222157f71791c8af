"""Decode attention of many sequences in one launch, each with pages, tables and counts of its own.

``kernel.paged_decode`` takes one tensor of pages for all sequences; here every sequence keeps its own, so that each is
freed by itself. Where they are is written into a table on the device once; the step that is captured reads it.

Shapes: B sequences, X stores a sequence (one or two), Q query heads, H KV heads, D head size, P tokens a page.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from kvscope.methods.kernels.grid import launches_beside, launches_dependents, n_sms
from kvscope.methods.kernels.paged_decode.inputs import MAX_STORES, PagedKV, TokenPlace
from kvscope.methods.kernels.paged_decode.kernel import DEFAULT, MIN_TILES, Tuning, merge_options, tile_size
from kvscope.methods.kernels.paged_decode.rows_kernel import (
    CAPACITY,
    COUNT,
    COUNT_STRIDE,
    FIELDS,
    HAS_TABLE_KIND,
    HAS_TOKENS_KIND,
    KINDS,
    OFFSET,
    PAGE_TOKENS,
    PAGES,
    SLOT,
    TABLE,
    TABLE_STRIDE,
    TOKENS,
    TOKENS_STRIDE,
    append_rows_kernel,
    merge_rows_kernel,
    split_rows_kernel,
)

_LOG2E = 1.4426950408889634
#: Programs that a row is counted to have where its result must not depend on other rows: 16 parts are joined at once.
ALIKE_MERGE_PROGRAMS = 14


class RowTable:
    """One layer's stores of every sequence of a step.

    Tables, token lists and counts are read when the kernels run, so that a captured step replays with what was written
    into them since. The tensors themselves are held: they cannot be freed while the table names them.
    """

    def __init__(
        self,
        stores: Sequence[Sequence[PagedKV]],
        places: Sequence[TokenPlace],
        *,
        tuning: Tuning = DEFAULT,
        part_tokens: int | None = None,
    ) -> None:
        """Write the table.

        Args:
            stores: of each sequence one or two, each of one sequence: indices begin with [1, ...] and are int32.
            places: where each sequence's token goes: into the pages of its first store.
            part_tokens: cut each row by itself into parts of about as many tokens, so that its result has the same bits
                whatever the other rows are; None: programs share all rows evenly.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        _check(stores, places)
        pages = stores[0][0].pages
        self._held = (tuple(map(tuple, stores)), tuple(places))
        self._tuning, self._n = tuning, len(stores)
        self._two = any(len(each) == MAX_STORES for each in stores)
        self._H, self._D = pages.shape[1], pages.shape[4]
        device = pages.device
        self._anchor = pages.new_zeros(16)
        self._ints = torch.zeros(16, dtype=torch.int32, device=device)  # the first is a count of no tokens
        self._counts: list[torch.Tensor] = []
        rows = [self._fields(each[0], place) for each, place in zip(stores, places, strict=True)]
        if self._two:
            rows += [self._fields(each[1], None) if len(each) == MAX_STORES else _no_store() for each in stores]
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        flat = [store for each in stores for store in each]
        self._has_table = any(store.page_table is not None for store in flat)
        self._has_tokens = any(store.tokens is not None for store in flat)
        sizes = {store.pages.shape[3] for store in flat}
        self._page_tokens = sizes.pop() if len(sizes) == 1 else 0
        self._tile_tokens = min(tile_size(store, tuning) for store in flat)
        shared = all(store.n_tokens.shape[1] == 1 for store in flat if isinstance(store.n_tokens, torch.Tensor))
        self._rows_each = self._H if shared else 1
        self._n_counts = len(rows) * self._H // self._rows_each
        #: Tiles of a part; 0: an even share of all tiles.
        self._part = 0 if part_tokens is None else max(1, part_tokens // self._tile_tokens)
        line_tokens = self._tile_tokens * max(1, self._part)
        capacity = sum(-(-store.capacity_tokens // line_tokens) for store in flat) * self._H
        most = tuning.programs_per_sm * n_sms(device)
        self._programs = max(1, capacity if self._part else min(most, -(-capacity // MIN_TILES)))

    def _fields(self, store: PagedKV, place: TokenPlace | None) -> list[int]:
        row = [0] * FIELDS
        row[PAGES] = _distance(store.pages, self._anchor)
        row[PAGE_TOKENS], row[CAPACITY] = store.pages.shape[3], store.capacity_tokens
        count = store.n_tokens
        if isinstance(count, int):
            count = torch.full((1, 1), count, dtype=torch.int32, device=store.pages.device)
            self._counts.append(count)
        row[COUNT], row[COUNT_STRIDE] = _distance(count, self._ints), _head_stride(count)
        if store.page_table is not None:
            row[KINDS] |= HAS_TABLE_KIND
            row[TABLE] = _distance(store.page_table, self._ints)
            row[TABLE_STRIDE] = _head_stride(store.page_table)
        if store.tokens is not None:
            row[KINDS] |= HAS_TOKENS_KIND
            row[TOKENS], row[TOKENS_STRIDE] = _distance(store.tokens, self._ints), _head_stride(store.tokens)
        if place is not None:
            row[SLOT], row[OFFSET] = _distance(place.slot_1, self._ints), _distance(place.offset_1, self._ints)
        return row

    @launches_beside(1)
    def append(self, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        """Store the step's token of every sequence."""
        if k_BH1D.stride(3) != 1:
            k_BH1D = k_BH1D.contiguous()
        if v_BH1D.stride(3) != 1:
            v_BH1D = v_BH1D.contiguous()
        append_rows_kernel[(self._n, self._H)](
            k_BH1D, v_BH1D, self._anchor, self._ints, self._table, self._H,
            k_BH1D.stride(0), k_BH1D.stride(1), v_BH1D.stride(0), v_BH1D.stride(1),
            D=self._D, D_PAD=triton.next_power_of_2(self._D), num_warps=1,
        )  # fmt: skip

    @launches_beside(1)
    def attend(
        self,
        q_BQ1D: torch.Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
        turned_BQ1D: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend one query a sequence to its stores; arguments and result [B, Q, 1, D] as ``paged_decode``'s.

        Args:
            turned_BQ1D: the queries that second stores are read with, where they are not the same.

        Raises:
            ValueError: queries of another shape or dtype.
        """
        B, Q, _, D = q_BQ1D.shape
        if self._n != B or D != self._D or Q % self._H or q_BQ1D.dtype != self._anchor.dtype:
            raise ValueError(
                f"queries {tuple(q_BQ1D.shape)} of {q_BQ1D.dtype} do not fit {self._n} sequences of {self._H} KV heads "
                f"of {self._D} in {self._anchor.dtype}"
            )
        q_BQ1D = q_BQ1D.contiguous()
        turned = q_BQ1D if turned_BQ1D is None or not self._two else turned_BQ1D.contiguous()
        G, device = Q // self._H, q_BQ1D.device
        dependent = launches_dependents(device)
        common = {
            "G": G,
            "D": D,
            "D_PAD": max(16, triton.next_power_of_2(D)),
            "COUNTS": max(2, triton.next_power_of_2(self._n_counts)),
            "MIN_TILES": 1 if self._part else MIN_TILES,
            "DEPENDENT": dependent,
            **({"launch_pdl": True} if dependent else {}),
        }
        n_partials = (self._table.shape[0] * self._H + self._programs) * G
        out = torch.empty((n_partials, D), dtype=torch.float32, device=device)
        lse = torch.empty((n_partials,), dtype=torch.float32, device=device)
        split_rows_kernel[(self._programs,)](
            q_BQ1D, turned, self._anchor, self._ints, self._table, out, lse,
            scale if softcap is not None else scale * _LOG2E, 1.0 if softcap is None else softcap,
            self._n_counts, self._rows_each, self._H, B,
            G_PAD=max(16, triton.next_power_of_2(G)), P=self._page_tokens, HAS_TABLE=self._has_table,
            HAS_TOKENS=self._has_tokens, HAS_TURNED=turned is not q_BQ1D, HAS_SOFTCAP=softcap is not None,
            PRECISION="ieee", N=self._tile_tokens, PART=self._part, num_warps=self._tuning.num_warps,
            num_stages=self._tuning.num_stages, **common,
        )  # fmt: skip
        result = torch.empty((B, Q, 1, D), dtype=q_BQ1D.dtype, device=device)
        # The order in which parts are joined must not depend on how many rows there are, either.
        programs, rows = (ALIKE_MERGE_PROGRAMS, 1) if self._part else (self._programs, B * self._H)
        options = merge_options(programs, rows, common["D_PAD"])
        merge_rows_kernel[(B * Q, options["PARTS"])](
            result, result if sink_logits is None else sink_logits, out, lse, self._ints, self._table,
            self._n_counts, self._rows_each, self._H, B, self._programs,
            TWO_STORES=self._two, HAS_SINK=sink_logits is not None, N=self._tile_tokens * max(1, self._part), **options,
            **common,
        )  # fmt: skip
        return result


def _no_store() -> list[int]:
    """Return the row of a sequence without a second store: a count of no tokens."""
    row = [0] * FIELDS
    row[PAGE_TOKENS] = 1
    return row


def _distance(tensor: torch.Tensor, anchor: torch.Tensor) -> int:
    """Return how far a tensor's first element is behind the anchor's, in elements."""
    return (tensor.data_ptr() - anchor.data_ptr()) // anchor.element_size()


def _head_stride(index: torch.Tensor) -> int:
    return index.stride(1) if index.shape[1] > 1 else 0


def _check(stores: Sequence[Sequence[PagedKV]], places: Sequence[TokenPlace]) -> None:
    if not stores or len(stores) != len(places) or not all(1 <= len(each) <= MAX_STORES for each in stores):
        raise ValueError(f"one place and one to {MAX_STORES} stores a sequence, at least one sequence")
    first = stores[0][0].pages
    for each in stores:
        for store in each:
            pages = store.pages
            alike = pages.shape[1] == first.shape[1] and pages.shape[4] == first.shape[4]
            if not alike or pages.dtype != first.dtype or pages.device != first.device or not pages.is_contiguous():
                raise ValueError(f"pages {tuple(pages.shape)} of {pages.dtype} are unlike {tuple(first.shape)}")
            for name, index in (
                ("page_table", store.page_table),
                ("tokens", store.tokens),
                ("n_tokens", store.n_tokens),
            ):
                if not isinstance(index, torch.Tensor):
                    continue
                if index.dtype != torch.int32 or index.shape[0] != 1 or index.shape[1] not in (1, first.shape[1]):
                    raise ValueError(f"{name} must be int32 of one sequence, got {index.dtype}, {tuple(index.shape)}")
                if index.ndim == 3 and index.stride(2) != 1:
                    raise ValueError(f"{name} must be contiguous in its last dimension")
