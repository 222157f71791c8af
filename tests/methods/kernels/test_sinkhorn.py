"""Sinkhorn's normalisations as one operation: the kernel's numbers, and its gradients by hand."""

from typing import Any

import pytest
import torch

from kvscope.methods.kernels.sinkhorn.ops import normalised, sinkhorn, sinkhorn_backward

STEPS, EPS = 11, 1e-6


def logits_of(n: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    draws = torch.Generator().manual_seed(n)
    return (2 * torch.randn((n, 4, 4), generator=draws, dtype=dtype)).to(device)


def test_sums_of_rows_and_columns_come_to_one() -> None:
    found = sinkhorn(logits_of(50), 2 * 20 - 1, EPS)
    assert (found.sum(1) - 1).abs().max() < 1e-3
    assert (found.sum(2) - 1).abs().max() < 0.02


def test_its_gradient_is_that_of_the_steps_written_out() -> None:
    logits_NSS = logits_of(9, torch.float64).requires_grad_()
    torch.testing.assert_close(sinkhorn(logits_NSS, STEPS, EPS), normalised(logits_NSS, STEPS, EPS))
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, STEPS, EPS), logits_NSS)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of kernels, interpreted."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    from kvscope.methods.kernels.sinkhorn import kernel as sinkhorn_kernel

    for name in ("_softmax", "_step", "forward_kernel", "backward_kernel"):
        monkeypatch.setattr(sinkhorn_kernel, name, InterpretedFunction(getattr(sinkhorn_kernel, name).fn))
    return sinkhorn_kernel


@pytest.mark.parametrize("n", [5, 70])
def test_the_kernels_compute_what_the_steps_do(kernels: Any, n: int) -> None:
    """A program that is not full, and several."""
    logits_NSS, grad_NSS = logits_of(n), logits_of(n + 1)[:n]
    found = kernels.run_forward(logits_NSS, STEPS, EPS, kernel=kernels.forward_kernel)
    torch.testing.assert_close(found, sinkhorn(logits_NSS, STEPS, EPS), atol=1e-6, rtol=1e-5)
    found = kernels.run_backward(logits_NSS, grad_NSS, STEPS, EPS, kernel=kernels.backward_kernel)
    torch.testing.assert_close(found, sinkhorn_backward(logits_NSS, grad_NSS, STEPS, EPS), atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernels_compute_what_the_steps_do_on_a_gpu() -> None:
    logits_NSS, grad_NSS = logits_of(16_384), logits_of(16_385)[:16_384]
    found = sinkhorn(logits_NSS.cuda(), STEPS, EPS).cpu()
    torch.testing.assert_close(found, sinkhorn(logits_NSS, STEPS, EPS), atol=1e-6, rtol=1e-4)
    found = sinkhorn_backward(logits_NSS.cuda(), grad_NSS.cuda(), STEPS, EPS).cpu()
    torch.testing.assert_close(found, sinkhorn_backward(logits_NSS, grad_NSS, STEPS, EPS), atol=1e-5, rtol=1e-3)
