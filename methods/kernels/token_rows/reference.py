"""RMS norm and rotation of rows in plain torch: the oracle of the kernels, and what runs on a CPU.

Shapes: D row size, P rotating pairs.
"""

import torch


def rms_norm_reference(x: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return every row over its root mean square, times a weight; arguments as ``rms_norm``."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight_D is None else wide * weight_D.float()).to(x.dtype)


def rotate_reference(x: torch.Tensor, cos_P: torch.Tensor, sin_P: torch.Tensor) -> torch.Tensor:
    """Return rows whose last 2 P numbers are rotated, pair by neighbouring pair; arguments as ``rotate``."""
    n = 2 * cos_P.shape[-1]
    turning = torch.view_as_complex(x[..., -n:].float().reshape(*x.shape[:-1], -1, 2))
    turned = torch.view_as_real(turning * torch.complex(cos_P.float(), sin_P.float()).flatten())
    return torch.cat((x[..., :-n], turned.flatten(-2).to(x.dtype)), -1)
