# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""RMS norm and rotation of one token's rows in Triton, a program a row.

Shapes: D row size, P rotating pairs. README.md has the mathematics.
"""

import torch
import triton
import triton.language as tl

from kvscope.methods.kernels.grid import launches_beside


@triton.jit
def _norm_kernel(x_ptr, weight_ptr, out_ptr, eps, D: tl.constexpr, D_PAD: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """Divide a row by its root mean square."""
    at = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, D_PAD)
    x = tl.load(x_ptr + at + d, mask=d < D, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    if HAS_WEIGHT:
        x = x * tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + at + d, x, mask=d < D)


@triton.jit
def _rotate_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr):
    """Rotate the last pairs of a row; what is before them is copied."""
    at = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, D_PAD)
    turns = (d >= D - 2 * P) & (d < D)
    x = tl.load(x_ptr + at + d, mask=d < D, other=0.0)
    other = tl.load(x_ptr + at + (d ^ 1), mask=turns, other=0.0).to(tl.float32)
    pair = (d - (D - 2 * P)) // 2
    cos = tl.load(cos_ptr + pair, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + pair, mask=turns, other=0.0).to(tl.float32)
    turned = x.to(tl.float32) * cos + tl.where(d % 2 == 0, -other, other) * sin
    tl.store(out_ptr + at + d, tl.where(turns, turned, x.to(tl.float32)), mask=d < D)


@launches_beside(0)
def rms_norm(x: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return every row of ``x`` over its root mean square, computed in fp32.

    Args:
        x: [..., D], any float type.
        weight_D: multiplied with, in any float type; None: 1.
        eps: added to the mean square.

    Returns:
        A new tensor of the shape and type of ``x``.
    """
    D = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    _norm_kernel[(x.numel() // D,)](
        x, x if weight_D is None else weight_D.contiguous(), out, eps, D=D, D_PAD=triton.next_power_of_2(D),
        HAS_WEIGHT=weight_D is not None, num_warps=_warps(D),
    )  # fmt: skip
    return out


@launches_beside(0)
def rotate(x: torch.Tensor, cos_P: torch.Tensor, sin_P: torch.Tensor) -> torch.Tensor:
    """Return rows whose last 2 P numbers are rotated, pair by neighbouring pair, in fp32.

    Args:
        x: [..., D], any float type; D even.
        cos_P, sin_P: of one position, for all rows.

    Returns:
        A new tensor of the shape and type of ``x``.

    Raises:
        ValueError: an odd row, more pairs than it has, or angles of several positions.
    """
    D, P = x.shape[-1], cos_P.shape[-1]
    if D % 2 or 2 * P > D or cos_P.numel() != P or sin_P.numel() != P:
        raise ValueError(f"angles {tuple(cos_P.shape)} and {tuple(sin_P.shape)} do not fit rows of {D}")
    x = x.contiguous()
    out = torch.empty_like(x)
    _rotate_kernel[(x.numel() // D,)](
        x, cos_P.contiguous(), sin_P.contiguous(), out, D=D, D_PAD=triton.next_power_of_2(D), P=P, num_warps=_warps(D)
    )
    return out


def _warps(D: int) -> int:
    return 8 if D > 4096 else 4 if D > 512 else 1
