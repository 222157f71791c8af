"""Devices and element types by name."""

from __future__ import annotations

import torch

from kvscope.errors import EnvironmentProblem, UsageError, did_you_mean

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def resolve_device(device: str) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>`` means here.

    Raises:
        UsageError: it is none of them, or no GPU here has this index.
        EnvironmentProblem: there is no GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise UsageError(f"Device '{device}' is not one of auto, cpu, cuda, cuda:<index>.")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index and int(index) >= max(n_gpus, 1):
        there = f"{n_gpus} GPUs, cuda:0 to cuda:{n_gpus - 1}" if n_gpus > 1 else "cuda:0 alone" if n_gpus else "no GPU"
        raise UsageError(f"There is no device '{device}': torch sees {there}. Give --device another one.")
    if kind == "cuda" and not n_gpus:
        raise EnvironmentProblem(f"Device '{device}' was asked for, but torch sees no CUDA GPU; use --device cpu.")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the element type that a name, or ``auto`` on a device, means."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise UsageError(f"There is no dtype '{dtype}'.{did_you_mean(dtype, ['auto', *_DTYPES])}")
    return _DTYPES[dtype]
