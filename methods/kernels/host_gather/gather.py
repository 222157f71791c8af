"""One interface to three ways of bringing scattered chunks from pinned host memory onto the device.

Shapes: N host pages of P tokens, S slots of U tokens (U divides P), H KV heads, D head size. A chunk is
``units_per_chunk`` neighbouring units of U tokens, in the mirror and in the slots.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from kvscope.methods.kernels.dispatch import unsupported_machine
from kvscope.methods.kernels.host_gather.reference import host_gather_reference

GatherBackend = Literal["uva", "copies", "contiguous"]
N_PROGRAMS = 48
LEAST_COPY_BYTES = 256 * 1024  # below, the cost of an asynchronous copy shows beside the transfer itself


def unsupported_gather(backend: str, mirror: torch.Tensor, slots: torch.Tensor) -> list[str]:
    """Return every reason why a backend cannot bring chunks of ``mirror`` into ``slots``; empty when it can."""
    if backend not in get_args(GatherBackend):
        return [f"there is no backend '{backend}', only {', '.join(get_args(GatherBackend))}"]
    reasons = []
    if mirror.shape[1:3] != slots.shape[1:3] or mirror.shape[3] % slots.shape[3] or mirror.shape[4] != slots.shape[4]:
        reasons.append(f"slots {tuple(slots.shape)} do not fit pages {tuple(mirror.shape)}")
    if mirror.dtype != slots.dtype:
        reasons.append(f"pages are {mirror.dtype}, slots {slots.dtype}")
    if mirror.device.type != "cpu" or not mirror.is_contiguous() or not slots.is_contiguous():
        reasons.append("pages must be in host memory, pages and slots contiguous")
    if slots.device.type == "cuda":
        if backend != "contiguous" and not mirror.is_pinned():
            reasons.append("pages are not in pinned memory")
        if backend == "uva":
            reasons += unsupported_machine(slots.device)
            piece_bytes = slots.shape[3] * slots.shape[4] * slots.element_size()
            if piece_bytes % 16:
                reasons.append(f"a head's part of a unit is {piece_bytes} bytes, the kernel takes multiples of 16")
    return reasons


def gather_backend(mirror: torch.Tensor, slots: torch.Tensor) -> GatherBackend:
    """Return the fastest backend that can bring chunks of ``mirror`` into ``slots``; README.md says why this order."""
    if not unsupported_gather("uva", mirror, slots):
        return "uva"
    unit_bytes = math.prod(slots.shape[1:]) * slots.element_size()
    whole = mirror.shape[3] == slots.shape[3]
    return "copies" if whole and unit_bytes >= LEAST_COPY_BYTES and mirror.is_pinned() else "contiguous"


class LayersGather:
    """Brings the same chunks of several layers' mirrors into the same slots of each, in one launch.

    Pages and slots are alike in all layers. On a CPU, layer by layer.
    """

    def __init__(
        self,
        mirrors: Sequence[torch.Tensor],
        slots: Sequence[torch.Tensor],
        *,
        units_per_chunk: int = 1,
        n_programs: int = N_PROGRAMS,
    ) -> None:
        """Check and remember; arguments as ``HostGather``'s, of each layer.

        Raises:
            ValueError: every reason why the kernel cannot do it.
        """
        for mirror, held in zip(mirrors, slots, strict=True):
            reasons = unsupported_gather("uva", mirror, held)
            if mirror.shape[1:] != mirrors[0].shape[1:] or held.shape != slots[0].shape:
                reasons.append("layers differ in their pages or slots")
            if reasons:
                raise ValueError(f"chunks cannot be gathered by 'uva': {'; '.join(reasons)}")
        self._mirrors, self._slots = list(mirrors), list(slots)
        self._per_chunk, self._n_programs = units_per_chunk, n_programs
        self._layers_L2: torch.Tensor | None = None
        if slots[0].is_cuda:
            from kvscope.methods.kernels.host_gather.kernel import layer_distances

            self._layers_L2 = layer_distances(self._mirrors, self._slots)

    def __call__(self, chunks: torch.Tensor, chunk_slots: torch.Tensor, n: torch.Tensor) -> None:
        """Copy in every layer; arguments as ``HostGather``'s, on the device."""
        if self._layers_L2 is not None:
            from kvscope.methods.kernels.host_gather.kernel import gather

            gather(
                self._mirrors[0],
                self._slots[0],
                chunks,
                chunk_slots,
                n,
                layers_L2=self._layers_L2,
                units_per_chunk=self._per_chunk,
                n_programs=self._n_programs,
            )
            return
        n_listed = min(int(n), chunks.shape[0])
        for mirror, held in zip(self._mirrors, self._slots, strict=True):
            host_gather_reference(
                mirror, held, chunks[:n_listed], chunk_slots[:n_listed], units_per_chunk=self._per_chunk
            )


class HostGather:
    """Brings chunks of one mirror into the slots of one layer. Keeps what its copies need alive.

    Attributes:
        backend: ``uva`` (a kernel reads host memory; lists and count may change on the device between replays of a
            graph), ``copies`` (one asynchronous copy a unit) or ``contiguous`` (gathered on the host, one transfer,
            scattered on the device); ``reference`` where slots are on a CPU.
    """

    def __init__(
        self,
        mirror: torch.Tensor,
        slots: torch.Tensor,
        *,
        backend: GatherBackend,
        units_per_chunk: int = 1,
        n_programs: int = N_PROGRAMS,
    ) -> None:
        """Check and remember.

        Args:
            mirror: [N, H, 2, P, D] in pinned host memory; read only.
            slots: [S, H, 2, U, D] on the device.
            units_per_chunk: units of U tokens that make a chunk.
            n_programs: grid of the ``uva`` kernel; 12 do for units from 32 KiB, 48 for smaller ones.

        Raises:
            ValueError: every reason why the backend cannot do it.
        """
        reasons = unsupported_gather(backend, mirror, slots)
        if reasons:
            raise ValueError(f"chunks cannot be gathered by '{backend}': {'; '.join(reasons)}")
        self.backend: str = backend if slots.device.type == "cuda" else "reference"
        self._mirror, self._slots = mirror, slots
        self._per_chunk, self._n_programs = units_per_chunk, n_programs
        self._layers_L2: torch.Tensor | None = None
        self._staging: torch.Tensor | None = None
        self._sent: torch.cuda.Event | None = None

    def __call__(self, chunks: torch.Tensor, chunk_slots: torch.Tensor, n: torch.Tensor) -> None:
        """Copy chunk ``chunks[i]`` into slot ``chunk_slots[i]``, i < n, on the current stream.

        Args:
            chunks, chunk_slots: int32, of the length of the longest list; for ``uva`` on the device. The other
                backends need their values on the host, and wait for the device where they are given there.
            n: int32 [1], beside them.
        """
        if self.backend == "uva":
            from kvscope.methods.kernels.host_gather.kernel import gather, layer_distances

            if self._layers_L2 is None:
                self._layers_L2 = layer_distances([self._mirror], [self._slots])
            gather(
                self._mirror,
                self._slots,
                chunks,
                chunk_slots,
                n,
                layers_L2=self._layers_L2,
                units_per_chunk=self._per_chunk,
                n_programs=self._n_programs,
            )
            return
        n_listed = min(int(n), chunks.shape[0])
        chunks, chunk_slots = chunks[:n_listed].cpu(), chunk_slots[:n_listed].cpu()
        if self.backend == "reference":
            host_gather_reference(self._mirror, self._slots, chunks, chunk_slots, units_per_chunk=self._per_chunk)
        elif n_listed:
            source, target = self._units(chunks), self._units(chunk_slots)
            (self._copy_units if self.backend == "copies" else self._copy_staged)(source, target)

    def _units(self, chunks: torch.Tensor) -> torch.Tensor:
        return (chunks.long()[:, None] * self._per_chunk + torch.arange(self._per_chunk)).flatten()

    def _copy_units(self, source: torch.Tensor, target: torch.Tensor) -> None:
        parts = self._mirror.shape[3] // self._slots.shape[3]
        U = self._slots.shape[3]
        for unit, slot in zip(source.tolist(), target.tolist(), strict=True):
            page, part = divmod(unit, parts)
            if parts == 1:
                self._slots[slot].copy_(self._mirror[page], non_blocking=True)
                continue
            # Part of a page is one run for each head and kind; a strided copy would go through pageable memory.
            for head in range(self._slots.shape[1]):
                for kind in range(2):
                    run = self._mirror[page, head, kind, part * U : (part + 1) * U]
                    self._slots[slot, head, kind].copy_(run, non_blocking=True)

    def _copy_staged(self, source: torch.Tensor, target: torch.Tensor) -> None:
        N, H, _, P, D = self._mirror.shape
        U = self._slots.shape[3]
        if self._staging is None or len(self._staging) < len(source):
            self._staging = torch.empty((len(source), H, 2, U, D), dtype=self._mirror.dtype, pin_memory=True)
        elif self._sent is not None:
            self._sent.synchronize()  # the transfer before may still be reading it
        staged = self._staging[: len(source)]
        if U == P:
            torch.index_select(self._mirror, 0, source, out=staged)
        else:
            units = self._mirror.view(N, H, 2, P // U, U, D)
            staged.copy_(units[source // (P // U), :, :, source % (P // U)])
        first = int(target[0])
        if torch.equal(target, torch.arange(first, first + len(target))):
            self._slots[first : first + len(target)].copy_(staged, non_blocking=True)
        else:
            arrived = staged.to(self._slots.device, non_blocking=True)
            self._slots.index_copy_(0, target.to(self._slots.device), arrived)
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._sent.record(torch.cuda.current_stream(self._slots.device))
