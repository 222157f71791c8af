"""Norms and rotations wherever their tensors are: the kernels where they run, else the reference."""

from functools import lru_cache

import torch

from kvscope.methods.kernels.dispatch import unsupported_machine
from kvscope.methods.kernels.token_rows.reference import rms_norm_reference, rotate_reference


@lru_cache(maxsize=16)
def _runs(device: torch.device) -> bool:
    return not unsupported_machine(device)


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return every row over its root mean square; arguments as the kernel's ``rms_norm``."""
    if not _runs(x.device):
        return rms_norm_reference(x, weight_D, eps)
    from kvscope.methods.kernels.token_rows import kernel

    return kernel.rms_norm(x, weight_D, eps)


def rotate(x: torch.Tensor, cos_P: torch.Tensor, sin_P: torch.Tensor) -> torch.Tensor:
    """Return rows whose last pairs are rotated; arguments as the kernel's ``rotate``."""
    if not _runs(x.device):
        return rotate_reference(x, cos_P, sin_P)
    from kvscope.methods.kernels.token_rows import kernel

    return kernel.rotate(x, cos_P, sin_P)
