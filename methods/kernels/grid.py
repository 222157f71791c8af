"""Where kernels are launched, and how large their grids are: by the multiprocessors of the device."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

_INTERPRETER_SMS = 4  # a small grid that still splits the work

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def launches_beside(index: int) -> Callable[[Callable[P, ResultT]], Callable[P, ResultT]]:
    """Have a function launch its kernels on the device of one of its tensors; without a GPU nothing changes.

    Triton launches on the current device, wherever the tensors are, and the layers of a model may be on several.

    Args:
        index: of the tensor among the positional arguments.
    """

    def decorate(function: Callable[P, ResultT]) -> Callable[P, ResultT]:
        @wraps(function)
        def launching(*args: P.args, **kwargs: P.kwargs) -> ResultT:
            beside: Any = args[index]
            with torch.cuda.device_of(beside):  # type: ignore[no-untyped-call]
                return function(*args, **kwargs)

        return launching

    return decorate


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
