"""Norms and rotations of rows against the same in fp64."""

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, randn

from kvscope.methods.kernels.token_rows import ops
from kvscope.methods.kernels.token_rows.kernel import rms_norm, rotate
from kvscope.methods.kernels.token_rows.reference import rms_norm_reference, rotate_reference

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 5, 1, 32), (3, 100), (1, 1, 48), (2, 1, 700)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference])
def test_rows_are_divided_by_their_root_mean_square(size, weighted, dtype, norm):
    x = (randn(*size, seed=1) * 3).to(dtype)
    weight = randn(size[-1], seed=2) if weighted else None
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = exact if weight is None else exact * weight.double()
    found = norm(x, weight, 1e-6)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "P"), [((1, 5, 1, 32), 8), ((3, 100), 50), ((1, 1, 48), 1)])
@pytest.mark.parametrize("turn", [rotate, rotate_reference])
def test_the_last_pairs_are_rotated(size, P, dtype, turn):
    x, angle = randn(*size, seed=1, dtype=dtype), randn(1, 1, P, seed=3) * 9
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    found = turn(x, cos, sin)
    exact = x.double()
    even, odd = exact[..., -2 * P :: 2].clone(), exact[..., -2 * P + 1 :: 2].clone()
    c, s = cos.double().flatten(), sin.double().flatten()
    exact[..., -2 * P :: 2], exact[..., -2 * P + 1 :: 2] = even * c - odd * s, odd * c + even * s
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(found[..., : size[-1] - 2 * P], x[..., : size[-1] - 2 * P])


def test_rows_that_are_views_and_what_is_dispatched():
    x = randn(4, 6, 64, seed=1).transpose(0, 1)
    cos, sin = randn(16, seed=2), randn(16, seed=3)
    torch.testing.assert_close(rotate(x, cos, sin), rotate_reference(x, cos, sin))
    torch.testing.assert_close(ops.rotate(x, cos, sin), rotate_reference(x, cos, sin))
    torch.testing.assert_close(rms_norm(x, None, 1e-6), rms_norm_reference(x, None, 1e-6))
    torch.testing.assert_close(ops.rms_norm(x, cos.repeat(4), 1e-6), rms_norm_reference(x, cos.repeat(4), 1e-6))


@pytest.mark.parametrize(("D", "angles"), [(31, (8,)), (32, (17,)), (32, (2, 8))])
def test_angles_that_do_not_fit_are_refused(D, angles):
    with pytest.raises(ValueError, match="do not fit rows"):
        rotate(torch.zeros(3, D, device=DEVICE), torch.zeros(angles, device=DEVICE), torch.zeros(angles, device=DEVICE))
