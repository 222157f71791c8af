"""How far two fp32 computations of one thing may lie apart when each adds its terms in an order of its own."""

import math

import torch

EPS = torch.finfo(torch.float32).eps


def roundings(*, sums: int, terms: int) -> float:
    """Return how many roundings are left of ``sums`` sums, one after the other, of ``terms`` terms each.

    Roundings go up as often as down: those of a sum of n terms add up like a random walk, to the root of n.
    """
    return sums * math.sqrt(terms)


def assert_same_sums(found: torch.Tensor, expected: torch.Tensor, *, n_roundings: float) -> None:
    """Equal but for ``n_roundings`` roundings of the largest value."""
    bound = n_roundings * EPS * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)
