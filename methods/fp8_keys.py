"""Indexer keys as they are stored: fp8 (e4m3) with one fp32 scale a key.

Shapes: n keys, E key size.
"""

import torch

KEY_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE_BYTES = 4


def quantize(k_nE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys as fp8 [n, E] and their scales [n] in fp32."""
    k = k_nE.float()
    scale = (k.abs().amax(1) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (k / scale[:, None]).to(KEY_DTYPE), scale


def dequantize(keys_nE: torch.Tensor, scale_n: torch.Tensor) -> torch.Tensor:
    """Return fp32 keys [n, E]."""
    return keys_nE.float() * scale_n[:, None]


def rounded(k_nE: torch.Tensor) -> torch.Tensor:
    """Return fp32 keys as they come back from fp8: a loss sees the rounding, its gradient passes over it."""
    k = k_nE.float()
    stored = dequantize(*quantize(k.detach()))
    return k + (stored - k).detach()


def pack(keys_nE: torch.Tensor, scale_n: torch.Tensor) -> torch.Tensor:
    """Return fp8 keys and scales as one tensor of bytes, [n, E + 4]: what a collector hands over."""
    return torch.cat([keys_nE.view(torch.uint8), scale_n[:, None].contiguous().view(torch.uint8)], 1)


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo ``pack``: separate arrays of fp8 keys [n, E] and fp32 scales [n]."""
    keys = packed[:, :-SCALE_BYTES].contiguous().view(KEY_DTYPE)
    scale = packed[:, -SCALE_BYTES:].contiguous().view(torch.float32)[:, 0]
    return keys, scale
