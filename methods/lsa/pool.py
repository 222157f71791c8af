"""Chosen chunks of one layer on the device, recalled from the host mirror and freed again.

Shapes: n chunks resident, C tokens a chunk, P tokens a host page, U tokens a slot (the largest size that divides both),
H KV heads, D head size. Slots of a layer are one tensor [n * C / U, H, 2, U, D].
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from kvscope.methods.kernels.host_gather.gather import HostGather, gather_backend
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.kv_format import PagePacking


@dataclass(frozen=True)
class Move:
    """What a change of the resident set takes.

    Attributes:
        missing: chunks to fetch, ascending.
        staged: their slots on the device, filled or being filled.
    """

    missing: torch.Tensor
    staged: torch.Tensor


class ChunkPool:
    """The slots of one layer, sized to what they hold: there is no spare slot, and evicting frees memory.

    Their order means nothing (attention does not mind), so a change moves only what comes and what goes.
    """

    def __init__(
        self,
        host_pages: torch.Tensor,
        *,
        chunk_tokens: int,
        device: torch.device,
        packing: PagePacking | None = None,
    ) -> None:
        """Start empty.

        Args:
            host_pages: the mirror, [pages, H, 2, P, D]; read only.
            chunk_tokens: tokens of a chunk.
            device: where slots live.
            packing: of the mirror, which is ``packed_mirror``'s then: a slot is one of its pages.
        """
        _, H, _, P, D = host_pages.shape
        self.chunk_tokens = chunk_tokens
        self.packing = packing
        self.slot_tokens = math.gcd(chunk_tokens, P) if packing is None else packing.page_tokens
        self._mirror = host_pages
        self.slots_per_chunk = chunk_tokens // self.slot_tokens
        self.ids = torch.empty(0, dtype=torch.long)
        held = self.slot_tokens if packing is None else P
        self.slots = torch.empty((0, H, 2, held, D), dtype=host_pages.dtype, device=device)
        # A kernel that reads the mirror itself is as fast as the bus at any size; see kernels/host_gather.
        self._gather_by = gather_backend(host_pages, self.slots)

    @property
    def backend(self) -> str:
        """What brings chunks here, for the row."""
        return self._gather_by if self.slots.device.type == "cuda" else "host copy"

    @property
    def n_tokens(self) -> int:
        """Tokens resident."""
        return len(self.ids) * self.chunk_tokens

    def store(self) -> PagedKV:
        """Return what attention reads."""
        return slots_store(self.slots, self.packing, n_tokens=self.n_tokens)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of K and V of one chunk in this layer."""
        return self.slots_per_chunk * self.slots[:0].element_size() * math.prod(self.slots.shape[1:])

    def plan(self, wanted: torch.Tensor) -> Move:
        """Return what is missing for ``wanted`` (chunk ids on the CPU, ascending) with room for it on the device."""
        missing = wanted[~torch.isin(wanted, self.ids)]
        shape = (len(missing) * self.slots_per_chunk, *self.slots.shape[1:])
        return Move(missing, torch.empty(shape, dtype=self.slots.dtype, device=self.slots.device))

    def fetch(self, move: Move) -> None:
        """Copy the missing chunks from the mirror. On a GPU the copy runs on the current stream."""
        if not len(move.missing):
            return
        gather = HostGather(self._mirror, move.staged, backend=self._gather_by, units_per_chunk=self.slots_per_chunk)
        device = move.staged.device if gather.backend == "uva" else torch.device("cpu")
        n = len(move.missing)
        gather(
            move.missing.int().to(device),
            torch.arange(n, dtype=torch.int32, device=device),
            torch.full((1,), n, dtype=torch.int32, device=device),
        )

    def apply(self, wanted: torch.Tensor, move: Move) -> None:
        """Make ``wanted`` the resident set: its new chunks are in ``move``, the others were resident before."""
        kept = torch.isin(self.ids, wanted)
        n_evicted = int((~kept).sum())
        if n_evicted == len(move.missing):
            # As many come as go: in place, without a second copy of what stays.
            self.ids[~kept] = move.missing
            if n_evicted:
                self.slots[self._slot_index(~kept)] = move.staged
            return
        self.ids = torch.cat([self.ids[kept], move.missing])
        self.slots = torch.cat([self.slots[self._slot_index(kept)], move.staged])

    def _slot_index(self, chunk_mask: torch.Tensor) -> torch.Tensor:
        chunk = chunk_mask.nonzero()[:, 0]
        slot = (chunk[:, None] * self.slots_per_chunk + torch.arange(self.slots_per_chunk)).flatten()
        return slot.to(self.slots.device)

    def clear(self) -> None:
        """Free the slots."""
        self.ids, self.slots = self.ids[:0], self.slots.new_empty((0, *self.slots.shape[1:]))


def slots_store(
    slots: torch.Tensor,
    packing: PagePacking | None,
    *,
    n_tokens: int | torch.Tensor,
    page_table: torch.Tensor | None = None,
) -> PagedKV:
    """Return slots as attention reads them; packed ones are moved in halves and read as whole records."""
    pages = slots if packing is None else slots.view(*slots.shape[:2], packing.record_bytes)
    return PagedKV(pages=pages, n_tokens=n_tokens, page_table=page_table, packing=packing)


@dataclass(frozen=True)
class Copy:
    """A copy under way.

    Attributes:
        done: of the host's part.
        landed: of the device's part; None on a CPU.
        device: that it goes to.
    """

    done: "Future[None]"
    landed: torch.cuda.Event | None
    device: torch.device

    def wait(self) -> None:
        """Let the device's current stream go on only once the chunks are there. An error of the copy is raised here."""
        self.done.result()
        if self.landed is not None:
            torch.cuda.current_stream(self.device).wait_event(self.landed)


class Copier:
    """Copies behind the decode: gathers on a thread, transfers on a stream of its own, one a device."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvscope-recall")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, pool: ChunkPool, move: Move) -> Copy:
        """Begin to fetch."""
        device = move.staged.device
        if device.type != "cuda":
            return Copy(self._thread.submit(_fetch, pool, move), None, device)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        # The staged memory may still be read by kernels queued before it was handed out again.
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        move.staged.record_stream(stream)
        landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return Copy(self._thread.submit(_fetch_on, stream, landed, pool, move), landed, device)

    def close(self) -> None:
        """End the thread; whatever was started is finished first."""
        self._thread.shutdown(wait=True)


@torch.inference_mode()
def _fetch(pool: ChunkPool, move: Move) -> None:
    pool.fetch(move)


@torch.inference_mode()
def _fetch_on(stream: torch.cuda.Stream, landed: torch.cuda.Event, pool: ChunkPool, move: Move) -> None:
    with torch.cuda.stream(stream):
        pool.fetch(move)
        landed.record(stream)
