"""Doubly stochastic mixing of the residual streams, as one operation that compilation leaves alone.

Written out, the normalisations are eleven small sums behind each other, and a compiler makes some 60 kernels of them
and of their gradients, in each of two blocks a layer.

Shapes: N tokens, S residual streams.
"""

from typing import Any

import torch


def normalised(logits_NSS: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """Return softmax over the last axis, then ``steps`` divisions by sums of columns and of rows in turn."""
    y_NSS = logits_NSS.softmax(-1) + eps
    for step in range(steps):
        y_NSS = y_NSS / (y_NSS.sum(-1 if step % 2 else -2, keepdim=True) + eps)
    return y_NSS


@torch.library.custom_op("kvscope::sinkhorn", mutates_args=())
def sinkhorn(logits_NSS: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """Return ``normalised`` of fp32 logits [N, S, S], S a power of 2; one kernel on a GPU."""
    if logits_NSS.is_cuda:
        from kvscope.methods.kernels.sinkhorn.kernel import run_forward

        return run_forward(logits_NSS, steps, eps)
    return normalised(logits_NSS, steps, eps)


@torch.library.custom_op("kvscope::sinkhorn_backward", mutates_args=())
def sinkhorn_backward(logits_NSS: torch.Tensor, grad_NSS: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """Return the gradient of the logits."""
    if logits_NSS.is_cuda:
        from kvscope.methods.kernels.sinkhorn.kernel import run_backward

        return run_backward(logits_NSS, grad_NSS, steps, eps)
    weights_NSS = logits_NSS.softmax(-1)
    y_NSS, behind = weights_NSS + eps, []
    for step in range(steps):
        axis = -1 if step % 2 else -2
        sums = y_NSS.sum(axis, keepdim=True) + eps
        y_NSS = y_NSS / sums
        behind.append((y_NSS, sums, axis))
    for y_NSS, sums, axis in reversed(behind):
        grad_NSS = (grad_NSS - (grad_NSS * y_NSS).sum(axis, keepdim=True)) / sums
    found_NSS: torch.Tensor = weights_NSS * (grad_NSS - (grad_NSS * weights_NSS).sum(-1, keepdim=True))
    return found_NSS


@sinkhorn.register_fake
def _(logits_NSS: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    return torch.empty_like(logits_NSS, memory_format=torch.contiguous_format)


@sinkhorn_backward.register_fake
def _(logits_NSS: torch.Tensor, grad_NSS: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    return torch.empty_like(logits_NSS, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    logits_NSS, ctx.steps, ctx.eps = inputs
    ctx.save_for_backward(logits_NSS)


def _gradient(ctx: Any, grad_NSS: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return sinkhorn_backward(ctx.saved_tensors[0], grad_NSS, ctx.steps, ctx.eps), None, None


sinkhorn.register_autograd(_gradient, setup_context=_keep)
