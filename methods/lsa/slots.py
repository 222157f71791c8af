"""Chosen chunks in slots at fixed addresses, for steps captured in a CUDA graph: tables change between replays.

All layers hold the same chunks in slots of the same numbers, so there is one table and one count. A refresh chooses,
finds the difference, copies what is missing into slots that no table names, and rewrites table and count, all on the
device; with a budget the host waits for nothing.

Shapes: n candidate chunks, K the most chunks a choice may have, S slots (chunks), C tokens a chunk, U tokens a page of
a slot, H KV heads, D head size. Slots of a layer are one tensor [S * C / U, H, 2, U, D].
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kvscope.methods.kernels.host_gather.gather import LayersGather, unsupported_gather
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.kernels.select import ops
from kvscope.methods.kernels.select.kernel import (
    Delta,
    Selection,
    empty_delta,
    empty_selection,
    empty_slots,
)
from kvscope.methods.kernels.select.reference import fill_selection
from kvscope.methods.lsa.layout import ChunkLayout
from kvscope.methods.lsa.pool import ChunkPool, slots_store
from kvscope.methods.lsa.selection import Selector
from kvscope.methods.shape import tensor_bytes


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """A choice and its difference to the slots, in tensors that are written again at the next refresh but one.

    Attributes:
        whole: the choice, with room for every candidate.
        kept: the same tensors, the list cut to the chunks there is room for.
        union: the same list; marks of this choice and of the one before together.
        delta, missing_K: what to load; chunks of ``missing_K`` are counted from the prompt's first.
    """

    whole: Selection
    kept: Selection
    union: Selection
    delta: Delta
    missing_K: torch.Tensor


@dataclass(frozen=True)
class SlotCounts:
    """What refreshes did, read back from the device.

    Attributes:
        chosen, missing: chunks at each refresh since the slots were made.
    """

    chosen: tuple[int, ...]
    missing: tuple[int, ...]


def unsupported_slots(mirror: Mapping[int, torch.Tensor], pools: Mapping[int, ChunkPool]) -> list[str]:
    """Return every reason why the mirror cannot be read by a kernel."""
    found = (unsupported_gather("uva", mirror[layer], pool.slots) for layer, pool in pools.items())
    return next((reasons for reasons in found if reasons), [])


class ChunkSlots:
    """The resident chunks of every layer, and the refresh.

    Attributes:
        version: changes when slots moved because a choice was larger than the room: capture again.
        fallbacks: refreshes that made everything resident because too much was chosen.
        chunk_bytes: bytes of K and V of one chunk in one layer.
        n_tokens: tokens of the chunks that attention reads.
    """

    def __init__(
        self,
        pools: Mapping[int, ChunkPool],
        mirror: Mapping[int, torch.Tensor],
        *,
        layout: ChunkLayout,
        budgeted: bool,
        stale: bool,
        fallback_ratio: float | None,
        spare_share: float,
        most_new: int | None = None,
    ) -> None:
        """Take over what the pools hold; they are empty afterwards.

        Args:
            pools: per layer, holding the same chunks in the same order.
            mirror: per layer, the host pages.
            layout: of the prompt.
            budgeted: whether every choice is as large as the first.
            stale: whether what a refresh chooses is read one interval later; spare slots for what arrives then.
            fallback_ratio: a choice of more than this share of the candidates becomes all of them.
            spare_share: room beyond a choice that is not budgeted, as a share of it, so that not every larger choice
                needs another capture.
            most_new: chunks that a choice never has more of than the one before had not; None: all may be new.
        """
        first_pool = next(iter(pools.values()))
        self.version = self.fallbacks = 0
        self.device = first_pool.slots.device
        self.chunk_bytes = first_pool.chunk_bytes
        self._layout, self._stale, self._ratio, self._mirror = layout, stale, fallback_ratio, mirror
        self._per_chunk, self._packing = first_pool.slots_per_chunk, first_pool.packing
        ids = first_pool.ids - layout.first
        n_held = len(ids)
        self._spare_share, self._most_new = spare_share, most_new
        self._set_capacity(n_held if budgeted else n_held + int(n_held * spare_share))
        self._move: LayersGather | None = None
        self.slots: dict[int, torch.Tensor] = {}
        for layer, pool in pools.items():
            # One layer after another: only one is held twice at a time.
            self._place_layer(layer, pool.slots)
            pool.clear()
        self._make_move()
        n, device = layout.n_candidates, self.device
        self._slot_table = empty_slots(n, self._n_slots, device)
        self._slot_table.slot_of_chunk_n[ids.to(device)] = torch.arange(n_held, dtype=torch.int32, device=device)
        self._slot_table.chunk_of_slot_S[:n_held] = ids.int().to(device)
        self._make_table()
        self._current, self._next = (self._choice(empty_selection(n, n, device)) for _ in range(2))
        fill_selection(self._current.whole, ids.sort().values.to(device))
        self._write_table()
        self._arriving: _Choice | None = None
        self._counts: list[torch.Tensor] = []
        self._read_counts: list[tuple[int, int]] = []
        self.n_tokens = self._n_coming_tokens = n_held * layout.chunk_tokens
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda and stale else None  # type: ignore[no-untyped-call]
        self._landed: torch.cuda.Event | None = None

    # -- what attention reads, and what is held

    def store(self, layer: int) -> PagedKV:
        """Return what attention reads of a layer; addresses change with ``version`` alone."""
        return slots_store(self.slots[layer], self._packing, n_tokens=self._count_11, page_table=self._table_11T)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the slots, spare ones included."""
        return tensor_bytes(self.slots.values())

    @property
    def spare_bytes(self) -> int:
        """Bytes of slots beyond the chunks that are read or on their way. Waits for the device while some are."""
        held = self.n_tokens // self._layout.chunk_tokens
        if self._arriving is not None:
            held += self.counts().missing[-1]
        return self.kv_bytes - held * self.chunk_bytes * len(self.slots)

    @property
    def table_bytes(self) -> int:
        """Bytes of tables, lists and counts."""
        found = [self._table_11T, self._count_11, *vars(self._slot_table).values()]
        for choice in (self._current, self._next):
            found += [*vars(choice.whole).values(), *vars(choice.delta).values(), choice.missing_K]
            found.append(choice.union.wanted_n)
        return tensor_bytes(found)

    def counts(self) -> SlotCounts:
        """Return what refreshes chose and missed. Waits for the device."""
        if self._counts:
            self._read_counts += [(int(chosen), int(missing)) for chosen, missing in torch.stack(self._counts).tolist()]
            self._counts.clear()
        return SlotCounts(tuple(c for c, _ in self._read_counts), tuple(m for _, m in self._read_counts))

    # -- the refresh

    def refresh(self, selector: Selector) -> None:
        """Choose anew. Queued behind the steps before and ahead of those to come; none of it is captured."""
        if self._arriving is not None:
            self._wait_for_copy()
            self._apply(self._arriving)
            self._arriving, self.n_tokens = None, self._n_coming_tokens
        n, n_chosen = self._layout.n_candidates, selector.choose_into(self._next.whole)
        if self._ratio is not None and n_chosen > self._ratio * n:
            self.fallbacks += 1
            n_chosen = n
            fill_selection(self._next.whole, torch.arange(n, device=self.device))
        if n_chosen > self._capacity:
            self._grow(n_chosen)
        choice = self._next
        self._n_coming_tokens = n_chosen * self._layout.chunk_tokens
        if self._stale:
            # Slots of chunks about to go are read until the next refresh: only empty ones may be written.
            torch.maximum(choice.whole.wanted_n, self._current.whole.wanted_n, out=choice.union.wanted_n)
        ops.diff(choice.union if self._stale else choice.kept, self._slot_table, choice.delta)
        self._counts.append(torch.cat((choice.whole.n, choice.delta.n_missing)))
        torch.add(choice.delta.missing_K, self._layout.first, out=choice.missing_K)
        if self._stale:
            self._arriving = choice
            self._copy_behind(choice)
        else:
            self._copy(choice)
            self._apply(choice)
            self.n_tokens = self._n_coming_tokens

    def _copy(self, choice: _Choice) -> None:
        assert self._move is not None
        self._move(choice.missing_K, choice.delta.free_S, choice.delta.n_missing)

    def _copy_behind(self, choice: _Choice) -> None:
        stream = self._stream
        if stream is None:
            self._copy(choice)
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._copy(choice)
            self._landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._landed.record(stream)

    def _wait_for_copy(self) -> None:
        if self._landed is not None:
            torch.cuda.current_stream(self.device).wait_event(self._landed)
            self._landed = None

    def _apply(self, choice: _Choice) -> None:
        ops.apply(choice.kept, self._slot_table, choice.delta)
        self._current, self._next = choice, self._current
        self._write_table()

    def _write_table(self) -> None:
        ops.write_table(
            self._current.kept,
            self._slot_table,
            self._table_11T,
            self._count_11,
            chunk_tokens=self._layout.chunk_tokens,
            slots_per_chunk=self._per_chunk,
        )

    # -- room

    def _set_capacity(self, n_chunks: int) -> None:
        n = self._layout.n_candidates
        self._capacity = min(n, max(1, n_chunks))
        most_new = self._capacity if self._most_new is None else self._most_new
        self._n_slots = min(n, self._capacity + most_new) if self._stale else self._capacity

    def _place_layer(self, layer: int, held: torch.Tensor) -> None:
        """Put a layer's slots where they stay: the tensor they are in, if it is of the right size."""
        n_pages = self._n_slots * self._per_chunk
        slots = held
        if len(held) != n_pages:
            slots = held.new_zeros((n_pages, *held.shape[1:]))
            slots[: len(held)] = held
        self.slots[layer] = slots

    def _make_move(self) -> None:
        mirrors = [self._mirror[layer] for layer in self.slots]
        whole = self._layout.chunk_tokens % mirrors[0].shape[3] == 0
        self._move = LayersGather(
            mirrors,
            list(self.slots.values()),
            units_per_chunk=self._per_chunk,
            # Pages in one piece keep the bus busy with few programs, and leave the multiprocessors to the decode.
            n_programs=12 if whole else 48,
        )

    def _make_table(self) -> None:
        size = (1, 1, self._capacity * self._per_chunk)
        self._table_11T = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._count_11 = torch.zeros((1, 1), dtype=torch.int32, device=self.device)

    def _choice(self, whole: Selection) -> _Choice:
        kept = replace(whole, chunks_K=whole.chunks_K[: self._capacity])
        delta = empty_delta(self._capacity, self._n_slots, self.device)
        return _Choice(
            whole=whole,
            kept=kept,
            union=replace(kept, wanted_n=torch.zeros_like(whole.wanted_n)),
            delta=delta,
            missing_K=torch.zeros_like(delta.missing_K),
        )

    def _grow(self, n_chunks: int) -> None:
        """Make room for a larger choice; nothing is on its way now. Slots keep their numbers."""
        self._set_capacity(n_chunks + int(n_chunks * self._spare_share))
        self._move = None
        for layer in list(self.slots):
            self._place_layer(layer, self.slots[layer])
        self._make_move()
        old = self._slot_table
        self._slot_table = empty_slots(len(old.slot_of_chunk_n), self._n_slots, self.device)
        self._slot_table.slot_of_chunk_n.copy_(old.slot_of_chunk_n)
        self._slot_table.chunk_of_slot_S[: len(old.chunk_of_slot_S)] = old.chunk_of_slot_S
        self._make_table()
        self._current, self._next = (self._choice(choice.whole) for choice in (self._current, self._next))
        self._write_table()
        self.version += 1

    def close(self) -> None:
        """Wait for what is on its way, and free the slots."""
        if self._landed is not None:
            self._landed.synchronize()
        self._arriving, self._landed = None, None
        self._move = None
        self.slots.clear()
        self._mirror = {}
