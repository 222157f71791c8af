"""How many threads a process that computes on a GPU has for what stays on the host."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

GPU_HOST_THREADS = 4
"""Host tensors of such a process are small, and a pool as wide as the machine costs more than it gives: one process
kept 3.5 to 4.2 of 16 cores busy, and several such processes take the cores from each other."""


def threads_a_process(n_processes: int, *, device: str) -> int:
    """Return the threads of each of so many processes of a machine."""
    share = max(1, (os.cpu_count() or 1) // n_processes)
    return share if device == "cpu" else min(share, GPU_HOST_THREADS)


@contextmanager
def few_host_threads(device: str) -> Iterator[None]:
    """Within it torch has few threads on the host if it computes on a GPU, and the user's own number stays.

    Args:
        device: as ``cuda:0``.
    """
    if device == "cpu" or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, GPU_HOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
