"""``--gpu-budget``: a process is held to fewer device bytes than the card has.

On a GPU torch's allocator is given what the budget leaves beside the CUDA context, and again beside the kernels that
have loaded with the first steps; NVML's readings of the whole process are held against the budget besides, for what
loads later. On a CPU the weights and the ledger are held against it.
"""

from dataclasses import dataclass
from typing import Any

from kvscope.errors import DeviceBudgetExceeded
from kvscope.units import format_bytes

#: What a CUDA context takes where NVML cannot be asked: 620 MiB on an H100, and a little room.
CONTEXT_BYTES = 768 * 1024**2


@dataclass(frozen=True)
class DeviceBudget:
    """Most device bytes a process may hold; None is no limit.

    Attributes:
        limit_bytes: context, weights and everything else.
    """

    limit_bytes: int | None = None

    def apply(self, device: Any, *, outside_bytes: int | None) -> None:
        """Limit torch's allocator, before the weights and when more is held outside it; nothing on a CPU.

        Args:
            outside_bytes: what the process holds beside torch's allocator, by NVML: the context and loaded kernels.
                None where that could not be read.

        Raises:
            DeviceBudgetExceeded: the context alone takes the budget.
        """
        if self.limit_bytes is None or not str(device).startswith("cuda"):
            return
        import torch

        left_bytes = self.limit_bytes - (CONTEXT_BYTES if outside_bytes is None else outside_bytes)
        if left_bytes <= 0:
            raise DeviceBudgetExceeded(
                f"The CUDA context alone takes the device budget of {format_bytes(self.limit_bytes)}: raise gpu_budget."
            )
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, left_bytes / total_bytes), device)

    def check(self, used_bytes: int | None, what: str) -> None:
        """Hold a reading against the budget.

        Raises:
            DeviceBudgetExceeded: it is over.
        """
        if self.limit_bytes is not None and used_bytes is not None and used_bytes > self.limit_bytes:
            raise DeviceBudgetExceeded(f"{what} takes {used_bytes:,} bytes, the device budget is {self.limit_bytes:,}.")
