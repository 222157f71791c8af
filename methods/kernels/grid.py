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
