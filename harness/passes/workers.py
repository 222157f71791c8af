"""Where the accuracy pass computes: one process, or ``--jobs`` on each of ``--gpus``."""

from kvscope.errors import UsageError
from kvscope.harness.passes.config import RunConfig


def worker_devices(config: RunConfig, device: str) -> list[str]:
    """Return the device of every process of the accuracy pass, one entry a process.

    Args:
        device: where a single process computes.

    Raises:
        UsageError: GPUs are asked for that are not there.
    """
    if config.gpus is None:
        return [device] * config.jobs
    import torch

    n_gpus = torch.cuda.device_count()
    numbers = range(n_gpus) if config.gpus == "all" else [int(part) for part in config.gpus.split(",")]
    absent = [number for number in numbers if number >= n_gpus]
    if absent or not numbers:
        which = f"GPU {absent[0]}" if absent else "a GPU"
        raise UsageError(
            f"gpus: {which} is asked for, and this machine has {n_gpus}: leave out --gpus, or name others."
        )
    return [f"cuda:{number}" for number in numbers for _ in range(config.jobs)]
