"""The relu of an indexer's scores, with a gradient for what it cut off while an indexer is trained."""

from typing import Any

import torch


class _Revived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slope: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, gradient, ctx.slope * gradient.clamp_max(0)), None


def rectified(x: torch.Tensor, slope: float = 0.0) -> torch.Tensor:
    """Return ``relu(x)``; its gradient below zero is ``slope`` times the output's where that would raise ``x``, else 0.

    A chunk that no head matches has a score of the bias alone, and under relu no gradient would ever change that:
    random negatives drive chunks there, and golden ones that follow never come back. A slope above 0 lets them.
    """
    if not slope or not torch.is_grad_enabled():
        return torch.relu(x)
    found: torch.Tensor = _Revived.apply(x, slope)  # type: ignore[no-untyped-call]
    return found
