"""How large grids are: by the multiprocessors of the device."""

from functools import lru_cache

import torch

_INTERPRETER_SMS = 4  # a small grid that still splits the work


@lru_cache(maxsize=16)
def n_sms(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; without one (Triton's interpreter), a few."""
    if device.type != "cuda":
        return _INTERPRETER_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=16)
def launches_dependents(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one it follows has ended, and wait inside (programmatic dependent
    launch: CUDA, compute capability 9.0 on)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache(maxsize=16)
def converts_fp8(device: torch.device) -> bool:
    """Whether an instruction turns e4m3 into fp16 (CUDA, compute capability 8.9 on)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
