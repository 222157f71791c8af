"""Sinkhorn's normalisations of a small matrix for each token, forward and backward, each as one kernel.

A program holds its tokens' matrices in registers throughout. The backward pass keeps nothing of the forward one: it
starts each step's matrix afresh, a few hundred operations on 16 numbers.
"""

import torch
import triton
import triton.language as tl

TOKENS = 32
"""Tokens of a program."""


@triton.jit
def _softmax(logits, eps):  # type: ignore[no-untyped-def]
    weights = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    return weights / tl.sum(weights, 2)[:, :, None] + eps


@triton.jit
def _step(y, at, eps):  # type: ignore[no-untyped-def]
    """Divide by the sums of columns at even steps, of rows at odd ones; return those sums for every element, too."""
    columns = tl.sum(y, 1)[:, None, :] + tl.zeros_like(y)
    rows = tl.sum(y, 2)[:, :, None] + tl.zeros_like(y)
    sums = tl.where(at % 2 == 0, columns, rows) + eps
    return y / sums, sums


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(logits_ptr, out_ptr, n, steps, eps, S: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = tl.arange(0, S)[:, None] * S + tl.arange(0, S)[None, :]
    at = token.to(tl.int64)[:, None, None] * (S * S) + inside[None, :, :]
    there = (token < n)[:, None, None] & (inside >= 0)[None, :, :]
    y = _softmax(tl.load(logits_ptr + at, mask=there, other=0.0), eps)
    for step in range(steps):
        y, _ = _step(y, step, eps)
    tl.store(out_ptr + at, y, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(logits_ptr, grad_ptr, out_ptr, n, steps, eps, S: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = tl.arange(0, S)[:, None] * S + tl.arange(0, S)[None, :]
    at = token.to(tl.int64)[:, None, None] * (S * S) + inside[None, :, :]
    there = (token < n)[:, None, None] & (inside >= 0)[None, :, :]
    first = _softmax(tl.load(logits_ptr + at, mask=there, other=0.0), eps)
    grad = tl.load(grad_ptr + at, mask=there, other=0.0)
    for behind in range(steps):
        last = steps - 1 - behind
        y = first
        for step in range(last):
            y, _ = _step(y, step, eps)
        y, sums = _step(y, last, eps)
        columns = tl.sum(grad * y, 1)[:, None, :] + tl.zeros_like(y)
        rows = tl.sum(grad * y, 2)[:, :, None] + tl.zeros_like(y)
        grad = (grad - tl.where(last % 2 == 0, columns, rows)) / sums
    weights = first - eps
    tl.store(out_ptr + at, weights * (grad - tl.sum(grad * weights, 2)[:, :, None]), mask=there)


def run_forward(logits_NSS: torch.Tensor, steps: int, eps: float, *, kernel: object = forward_kernel) -> torch.Tensor:
    """Return the normalised matrices [N, S, S] in fp32; ``kernel`` may be an interpreted one."""
    logits_NSS = logits_NSS.contiguous()
    out_NSS = torch.empty_like(logits_NSS)
    n, size, _ = logits_NSS.shape
    kernel[(triton.cdiv(n, TOKENS),)](logits_NSS, out_NSS, n, steps, eps, S=size, TOKENS=TOKENS)  # type: ignore[index]
    return out_NSS


def run_backward(
    logits_NSS: torch.Tensor, grad_NSS: torch.Tensor, steps: int, eps: float, *, kernel: object = backward_kernel
) -> torch.Tensor:
    """Return the gradient of the logits [N, S, S] in fp32."""
    logits_NSS, grad_NSS = logits_NSS.contiguous(), grad_NSS.contiguous()
    out_NSS = torch.empty_like(logits_NSS)
    n, size, _ = logits_NSS.shape
    kernel[(triton.cdiv(n, TOKENS),)](logits_NSS, grad_NSS, out_NSS, n, steps, eps, S=size, TOKENS=TOKENS)  # type: ignore[index]
    return out_NSS
