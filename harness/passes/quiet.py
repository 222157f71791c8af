"""Whether the machine is quiet enough for times, asked once before a run begins."""

import os
from collections.abc import Sequence

from kvscope.harness.passes.memory import NvmlProcessMemory, in_host_pid_namespace
from kvscope.harness.passes.timing import load_1min, usable_cores
from kvscope.results.quiet import load_doubt, others_doubt


def disturbances(devices: Sequence[str]) -> str:
    """Return what disturbs times on the devices of a run, by the limits that its rows are judged by; empty for nothing.

    Args:
        devices: ``cpu``, ``cuda:N``.
    """
    gpus = [device for device in dict.fromkeys(devices) if device.startswith("cuda")]
    found = [load_doubt(load_1min(), usable_cores())]
    found += [others_doubt(n_others(int(device.partition(":")[2] or 0)), where=device) for device in gpus]
    return "; ".join(filter(None, found))


def n_others(device_index: int) -> int | None:
    """Return how many other processes are on a GPU; None where the driver does not tell."""
    processes = NvmlProcessMemory(device_index).processes()
    if processes is None:
        return None
    if in_host_pid_namespace():
        return len(processes.keys() - {os.getpid()})
    # In a container the driver's ids are others than ours: this process is one of them where it has a context.
    import torch

    ours = torch.cuda.is_initialized() and torch.cuda.current_device() == device_index  # type: ignore[no-untyped-call]
    return len(processes) - int(ours)
