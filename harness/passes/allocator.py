"""What torch's allocator holds, and the settings it was asked for."""

import gc
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class TorchMemory:
    """torch's allocator and the clocks of one device or several, added up; on a CPU the allocator has no counters."""

    def __init__(self, *devices: str) -> None:
        import torch

        self._cuda = torch.cuda
        self._devices = [torch.device(device) for device in devices if device.startswith("cuda")]

    @property
    def reason(self) -> str | None:
        return None if self._devices else "torch keeps no memory counters on the CPU"

    def free(self) -> None:
        gc.collect()
        for device in self._devices:
            self._cuda.synchronize(device)
        if self._devices:
            self._cuda.empty_cache()

    def reset(self) -> None:
        for device in self._devices:
            self._cuda.reset_peak_memory_stats(device)

    def allocated_bytes(self) -> int | None:
        return self._sum(self._cuda.memory_allocated)

    def reserved_bytes(self) -> int:
        """Return what the allocator holds, blocks it has free included."""
        return self._sum(self._cuda.memory_reserved) or 0

    def peaks_bytes(self) -> tuple[int | None, int | None]:
        """Return (peak allocated, peak reserved) since the last reset."""
        return self._sum(self._cuda.max_memory_allocated), self._sum(self._cuda.max_memory_reserved)

    def _sum(self, count: "Callable[[torch.device], int]") -> int | None:
        return sum(int(count(device)) for device in self._devices) if self._devices else None


def allocator_settings() -> str | None:
    """Return the settings asked of torch's CUDA allocator, and whether the one that matters here is in force."""
    import torch

    asked = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or None
    if asked is None or "expandable_segments:True" not in asked:
        return asked
    try:
        in_force = torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
    except (AttributeError, KeyError, RuntimeError, TypeError):  # not a public call: no cell should fail for it
        return f"{asked} (not confirmed)"
    return asked if in_force else f"{asked} (not in force)"
