"""What torch's allocator holds, and the settings it was asked for."""

import gc
import os


class TorchMemory:
    """torch's allocator and the device's clock; on a CPU the allocator has no counters."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda if device.startswith("cuda") else None
        self._device = torch.device(device)

    @property
    def reason(self) -> str | None:
        return None if self._cuda else "torch keeps no memory counters on the CPU"

    def free(self) -> None:
        gc.collect()
        if self._cuda:
            self._cuda.synchronize(self._device)
            self._cuda.empty_cache()

    def reset(self) -> None:
        if self._cuda:
            self._cuda.reset_peak_memory_stats(self._device)

    def allocated_bytes(self) -> int | None:
        return int(self._cuda.memory_allocated(self._device)) if self._cuda else None

    def reserved_bytes(self) -> int:
        """Return what the allocator holds, blocks it has free included."""
        return int(self._cuda.memory_reserved(self._device)) if self._cuda else 0

    def peaks_bytes(self) -> tuple[int | None, int | None]:
        """Return (peak allocated, peak reserved) since the last reset."""
        if not self._cuda:
            return None, None
        return int(self._cuda.max_memory_allocated(self._device)), int(self._cuda.max_memory_reserved(self._device))


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
