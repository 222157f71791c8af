# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Selection in Triton: marks, counts of blocks, scan, scatter. Lists and counts stay on the device.

Shapes: R rows of logits, n chunks, K entries a list has room for, S slots. README.md has the steps.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvscope.methods.kernels.grid import launches_beside

_BLOCK = 1024
_MOST_BLOCKS = 4096
_VARY = ["n", "n_rows", "n_sink", "n_recent", "capacity"]  # not worth a compilation for each divisibility
CHOSEN, MISSING, FREE = (tl.constexpr(i) for i in range(3))


@triton.jit
def _mark(
    at,
    n,
    logits_ptr,
    n_rows,
    stride_row,
    threshold_ptr,
    n_sink,
    n_recent,
    chosen_ptr,
    n_chosen_ptr,
    slot_of_chunk_ptr,
    chunk_of_slot_ptr,
    wanted_ptr,
    capacity,
    KIND: tl.constexpr,
):
    """Return which entries of a block go into the list, and what is written for them."""
    inside = at < n
    if KIND == 0:  # chunks at or over the threshold, sinks, recent ones
        best = tl.full(at.shape, float("-inf"), tl.float32)
        for row in range(n_rows):
            logit = tl.load(logits_ptr + row * stride_row + at, mask=inside, other=float("-inf"))
            best = tl.maximum(best, logit.to(tl.float32))
        marked = (best >= tl.load(threshold_ptr)) | (at < n_sink) | (at >= n - n_recent)
        value = at
    elif KIND == 1:  # chosen chunks that are in no slot
        inside = inside & (at < tl.minimum(tl.load(n_chosen_ptr), capacity))
        value = tl.load(chosen_ptr + at, mask=inside, other=0)
        marked = tl.load(slot_of_chunk_ptr + value, mask=inside, other=0) < 0
    else:  # slots whose chunk is not wanted, and empty ones
        chunk = tl.load(chunk_of_slot_ptr + at, mask=inside, other=-1)
        held = tl.load(wanted_ptr + chunk, mask=inside & (chunk >= 0), other=0)
        marked = held == 0
        value = at
    return marked & inside, value


@triton.jit(do_not_specialize=_VARY)
def _count_kernel(
    block_counts_ptr,
    n,
    logits_ptr,
    n_rows,
    stride_row,
    threshold_ptr,
    n_sink,
    n_recent,
    chosen_ptr,
    n_chosen_ptr,
    slot_of_chunk_ptr,
    chunk_of_slot_ptr,
    wanted_ptr,
    capacity,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the marked entries of one block."""
    block = tl.program_id(0)
    marked, _value = _mark(
        block * BLOCK + tl.arange(0, BLOCK),
        n,
        logits_ptr,
        n_rows,
        stride_row,
        threshold_ptr,
        n_sink,
        n_recent,
        chosen_ptr,
        n_chosen_ptr,
        slot_of_chunk_ptr,
        chunk_of_slot_ptr,
        wanted_ptr,
        capacity,
        KIND,
    )
    tl.store(block_counts_ptr + block, tl.sum(marked.to(tl.int32), 0))


@triton.jit(do_not_specialize=[*_VARY, "room"])
def _scatter_kernel(
    list_ptr,
    n_list_ptr,
    block_counts_ptr,
    room,
    n,
    logits_ptr,
    n_rows,
    stride_row,
    threshold_ptr,
    n_sink,
    n_recent,
    chosen_ptr,
    n_chosen_ptr,
    slot_of_chunk_ptr,
    chunk_of_slot_ptr,
    wanted_ptr,
    capacity,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write one block's marked entries behind those of the blocks before it; the list stays ascending."""
    block = tl.program_id(0)
    other = tl.arange(0, BLOCKS)
    counts = tl.load(block_counts_ptr + other, mask=other < tl.num_programs(0), other=0)
    before = tl.sum(tl.where(other < block, counts, 0), 0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    marked, value = _mark(
        at,
        n,
        logits_ptr,
        n_rows,
        stride_row,
        threshold_ptr,
        n_sink,
        n_recent,
        chosen_ptr,
        n_chosen_ptr,
        slot_of_chunk_ptr,
        chunk_of_slot_ptr,
        wanted_ptr,
        capacity,
        KIND,
    )
    place = before + tl.cumsum(marked.to(tl.int32), 0) - 1
    kept = marked & (place < room)
    tl.store(list_ptr + place, value, mask=kept)
    if KIND == 0:
        tl.store(wanted_ptr + at, kept.to(tl.int8), mask=at < n)
    if block == 0:
        tl.store(n_list_ptr, tl.sum(counts, 0))


@triton.jit
def _evict_kernel(
    slot_of_chunk_ptr,
    chunk_of_slot_ptr,
    wanted_ptr,
    n_slots,
    BLOCK: tl.constexpr,
):
    """Empty the slots of chunks no longer wanted. A slot belongs to one chunk, so programs do not meet."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_slots
    chunk = tl.load(chunk_of_slot_ptr + at, mask=inside, other=-1)
    held = tl.load(wanted_ptr + chunk, mask=inside & (chunk >= 0), other=1)
    gone = inside & (chunk >= 0) & (held == 0)
    tl.store(slot_of_chunk_ptr + chunk, -1, mask=gone)
    tl.store(chunk_of_slot_ptr + at, -1, mask=gone)


@triton.jit
def _fill_kernel(
    missing_ptr,
    n_missing_ptr,
    free_ptr,
    slot_of_chunk_ptr,
    chunk_of_slot_ptr,
    BLOCK: tl.constexpr,
):
    """Enter the i-th missing chunk into the i-th free slot."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(n_missing_ptr)
    chunk = tl.load(missing_ptr + at, mask=inside, other=0)
    slot = tl.load(free_ptr + at, mask=inside, other=0)
    tl.store(slot_of_chunk_ptr + chunk, slot, mask=inside)
    tl.store(chunk_of_slot_ptr + slot, chunk, mask=inside)


@triton.jit
def _table_kernel(
    chosen_ptr,
    n_chosen_ptr,
    slot_of_chunk_ptr,
    table_ptr,
    n_tokens_ptr,
    room,
    chunk_tokens,
    SLOTS_A_CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the page table and the count of tokens that attention reads."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n_chosen = tl.minimum(tl.load(n_chosen_ptr), room)
    place = at // SLOTS_A_CHUNK
    inside = place < n_chosen
    chunk = tl.load(chosen_ptr + place, mask=inside, other=0)
    slot = tl.load(slot_of_chunk_ptr + chunk, mask=inside, other=0)
    tl.store(table_ptr + at, slot * SLOTS_A_CHUNK + at % SLOTS_A_CHUNK, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(n_tokens_ptr, n_chosen * chunk_tokens)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A choice of chunks, on the device.

    Attributes:
        chunks_K: int32, ascending; the first ``n`` entries count.
        n: int32 [1], how many were chosen, also when they are more than K: then the first K are listed and wanted.
        wanted_n: int8, 1 for every chunk listed.
        block_counts: int32, scratch.
    """

    chunks_K: torch.Tensor
    n: torch.Tensor
    wanted_n: torch.Tensor
    block_counts: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SlotTable:
    """Which chunk is in which slot, both ways; -1: none. int32, on the device.

    Attributes:
        slot_of_chunk_n, chunk_of_slot_S: inverse to each other.
    """

    slot_of_chunk_n: torch.Tensor
    chunk_of_slot_S: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a choice takes: the i-th missing chunk goes into the i-th free slot.

    Attributes:
        missing_K: int32, chunks to load, ascending; the first ``n_missing`` count.
        n_missing: int32 [1].
        free_S: int32, slots to be had, ascending; the first ``n_free`` count.
        n_free: int32 [1]; never less than ``n_missing``.
        block_counts: int32, scratch.
    """

    missing_K: torch.Tensor
    n_missing: torch.Tensor
    free_S: torch.Tensor
    n_free: torch.Tensor
    block_counts: torch.Tensor


def empty_selection(n_chunks: int, capacity: int, device: torch.device) -> Selection:
    """Return room for a choice of up to ``capacity`` of ``n_chunks`` chunks."""
    return Selection(
        chunks_K=_ints(capacity, device),
        n=_ints(1, device),
        wanted_n=torch.zeros(n_chunks, dtype=torch.int8, device=device),
        block_counts=_ints(_blocks(n_chunks), device),
    )


def empty_slots(n_chunks: int, n_slots: int, device: torch.device) -> SlotTable:
    """Return a table of ``n_slots`` empty slots."""
    return SlotTable(slot_of_chunk_n=_ints(n_chunks, device, -1), chunk_of_slot_S=_ints(n_slots, device, -1))


def empty_delta(capacity: int, n_slots: int, device: torch.device) -> Delta:
    """Return room for the difference of a choice of up to ``capacity`` chunks to ``n_slots`` slots."""
    return Delta(
        missing_K=_ints(capacity, device),
        n_missing=_ints(1, device),
        free_S=_ints(n_slots, device),
        n_free=_ints(1, device),
        block_counts=_ints(_blocks(max(capacity, n_slots)), device),
    )


def select(
    logits_Rn: torch.Tensor,
    threshold: torch.Tensor,
    out: Selection,
    *,
    n_sink: int = 0,
    n_recent: int = 0,
) -> None:
    """Choose the chunks whose best logit over rows reaches the threshold, the first and the last ones.

    Args:
        logits_Rn: fp32, rows contiguous; NaN is not chosen.
        threshold: fp32 [1] on the device, so that a captured graph can be replayed with another.
        out: written in place.
        n_sink, n_recent: chunks at either end that are chosen whatever their logit.

    Raises:
        ValueError: shapes or devices that do not fit, or more than 4,194,304 chunks.
    """
    n = logits_Rn.shape[1]
    if logits_Rn.ndim != 2 or n != out.wanted_n.shape[0] or logits_Rn.stride(1) != 1:
        raise ValueError(f"logits {tuple(logits_Rn.shape)} do not fit a choice of {out.wanted_n.shape[0]} chunks")
    if threshold.shape != (1,) or threshold.device != logits_Rn.device:
        raise ValueError(f"threshold must be [1] on {logits_Rn.device}, got {tuple(threshold.shape)}")
    marks = _Marks(logits=logits_Rn, threshold=threshold, n_sink=n_sink, n_recent=n_recent, selection=out)
    _compact(CHOSEN.value, n, marks, out.chunks_K, out.n, out.block_counts)


def diff(selection: Selection, slots: SlotTable, out: Delta) -> None:
    """Find the chosen chunks to load and the slots to load them into.

    Raises:
        ValueError: a choice that may be larger than the slots, or tables of other sizes.
    """
    K, S = selection.chunks_K.shape[0], slots.chunk_of_slot_S.shape[0]
    if K > S:
        raise ValueError(f"a choice of up to {K} chunks does not fit {S} slots")
    if out.missing_K.shape[0] != K or out.free_S.shape[0] != S:
        raise ValueError(f"the difference has room for {out.missing_K.shape[0]} chunks and {out.free_S.shape[0]} slots")
    if slots.slot_of_chunk_n.shape != selection.wanted_n.shape:
        raise ValueError(f"a table of {slots.slot_of_chunk_n.shape[0]} chunks, a choice of {len(selection.wanted_n)}")
    marks = _Marks(selection=selection, slots=slots)
    _compact(MISSING.value, K, marks, out.missing_K, out.n_missing, out.block_counts)
    _compact(FREE.value, S, marks, out.free_S, out.n_free, out.block_counts)


def apply(selection: Selection, slots: SlotTable, delta: Delta) -> None:
    """Enter a difference into the slot table, once the missing chunks are in their slots."""
    S, K = slots.chunk_of_slot_S.shape[0], delta.missing_K.shape[0]
    with torch.cuda.device_of(delta.missing_K):
        _evict_kernel[(_blocks(S),)](slots.slot_of_chunk_n, slots.chunk_of_slot_S, selection.wanted_n, S, BLOCK=_BLOCK)
        _fill_kernel[(_blocks(K),)](
            delta.missing_K,
            delta.n_missing,
            delta.free_S,
            slots.slot_of_chunk_n,
            slots.chunk_of_slot_S,
            BLOCK=_BLOCK,
        )


@launches_beside(2)
def write_table(
    selection: Selection,
    slots: SlotTable,
    table: torch.Tensor,
    n_tokens: torch.Tensor,
    *,
    chunk_tokens: int,
    slots_per_chunk: int = 1,
) -> None:
    """Write the page table of the chosen chunks and their count of tokens, which ``paged_decode`` reads.

    Args:
        table: int32 with room for ``slots_per_chunk`` entries a chunk, contiguous. Slot s is pages s * slots_per_chunk
            and the following.
        n_tokens: int32, one element.

    Raises:
        ValueError: a table too small.
    """
    K = selection.chunks_K.shape[0]
    if table.numel() < K * slots_per_chunk or not table.is_contiguous() or n_tokens.numel() != 1:
        raise ValueError(f"a choice of {K} chunks needs a table of {K * slots_per_chunk}, got {tuple(table.shape)}")
    _table_kernel[(_blocks(K * slots_per_chunk),)](
        selection.chunks_K,
        selection.n,
        slots.slot_of_chunk_n,
        table,
        n_tokens,
        K,
        chunk_tokens,
        SLOTS_A_CHUNK=slots_per_chunk,
        BLOCK=_BLOCK,
    )


@dataclass(frozen=True, kw_only=True)
class _Marks:
    """What decides which entries are marked; what a kind does not use is None."""

    selection: Selection
    logits: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    n_sink: int = 0
    n_recent: int = 0
    slots: SlotTable | None = None


@launches_beside(3)
def _compact(
    kind: int, n: int, marks: _Marks, listed: torch.Tensor, n_listed: torch.Tensor, block_counts: torch.Tensor
) -> None:
    chosen, slots = marks.selection, marks.slots
    unused = chosen.n
    blocks = _blocks(n)
    arguments = (
        n,
        unused if marks.logits is None else marks.logits,
        0 if marks.logits is None else marks.logits.shape[0],
        0 if marks.logits is None else marks.logits.stride(0),
        unused if marks.threshold is None else marks.threshold,
        marks.n_sink,
        marks.n_recent,
        chosen.chunks_K,
        chosen.n,
        unused if slots is None else slots.slot_of_chunk_n,
        unused if slots is None else slots.chunk_of_slot_S,
        chosen.wanted_n,
        chosen.chunks_K.shape[0],
    )
    _count_kernel[(blocks,)](block_counts, *arguments, KIND=kind, BLOCK=_BLOCK)
    _scatter_kernel[(blocks,)](
        listed,
        n_listed,
        block_counts,
        listed.shape[0],
        *arguments,
        KIND=kind,
        BLOCK=_BLOCK,
        BLOCKS=max(2, triton.next_power_of_2(blocks)),
    )


def _blocks(n: int) -> int:
    blocks = max(1, -(-n // _BLOCK))
    if blocks > _MOST_BLOCKS:
        raise ValueError(f"at most {_MOST_BLOCKS * _BLOCK:,} entries can be scanned, got {n:,}")
    return blocks


def _ints(n: int, device: torch.device, value: int = 0) -> torch.Tensor:
    return torch.full((n,), value, dtype=torch.int32, device=device)
