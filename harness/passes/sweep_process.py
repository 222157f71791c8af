"""Which of the processes that NVML lists is the sweep itself: its context is none of the doubts about a worker's times.

NVML lists the host's process ids. In a container the sweep's own id is another one there, so that it is known by what
it does: it takes a block of device memory, and the one process that grows by that much is it.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from kvscope.harness.passes.memory import MIB, NvmlProcessMemory, in_host_pid_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_BYTES = 64 * MIB
#: NVML counts in blocks of 2 MiB: a process that grew by one more may have been this one.
GRANULE_BYTES = 2 * MIB


def sweep_process_id(device: str) -> int | None:
    """Return the id by which NVML lists this process, where it holds a CUDA context on a device.

    Args:
        device: ``cpu`` or ``cuda:N``.

    Returns:
        None where it holds none, or cannot be told from others.
    """
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda") or not torch.cuda.is_initialized():
        return None
    if in_host_pid_namespace():
        return os.getpid()
    if not torch.cuda.memory_stats(device).get("segment.all.allocated"):
        return None  # nothing was ever allocated: a block would make the context that is not there
    return grown_process(NvmlProcessMemory(int(device.partition(":")[2] or 0)), _block(device))


def grown_process(nvml: NvmlProcessMemory, block: AbstractContextManager[None]) -> int | None:
    """Return the one process that holds ``BLOCK_BYTES`` more inside a block; None where none or several do."""
    before = nvml.processes()
    with block:
        after = nvml.processes()
    if before is None or after is None:
        return None
    grown = [pid for pid in after if BLOCK_BYTES <= _growth_bytes(pid, before, after) <= BLOCK_BYTES + GRANULE_BYTES]
    return grown[0] if len(grown) == 1 else None


def _growth_bytes(pid: int, before: Mapping[int, int | None], after: Mapping[int, int | None]) -> int:
    now_bytes, then_bytes = after[pid], before.get(pid)
    return 0 if now_bytes is None or then_bytes is None else now_bytes - then_bytes


@contextmanager
def _block(device: str) -> "Iterator[None]":
    """Hold a block of device memory; where there is no room for it, nobody grows."""
    import torch

    torch.cuda.empty_cache()  # so that the block is new to the driver
    try:
        block = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        yield
        return
    try:
        yield
    finally:
        del block
        torch.cuda.empty_cache()
