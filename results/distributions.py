"""The normal distribution, Student's t, fair coins and Wilson's interval, by the functions that scipy.stats calls.

scipy.stats itself takes longer to import than a report takes to make, and a call of its distributions a hundred times
as long as the function that computes it.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, ndtr, ndtri, stdtrit

Array = npt.NDArray[np.float64]


def normal_cdf(z: float) -> float:
    """Chance that a standard normal variable is below ``z``."""
    return float(ndtr(z))


def normal_sf(z: float) -> float:
    """Chance that a standard normal variable is above ``z``."""
    return float(ndtr(-z))


def normal_quantile(chance: float) -> float:
    """The value that a standard normal variable is below with this chance."""
    return float(ndtri(chance))


def student_quantile(chance: float, degrees: float) -> float:
    """The value that Student's t with so many degrees of freedom is below with this chance."""
    return float(stdtrit(degrees, chance))


def coin_chances(n: int) -> Array:
    """Chances of 0, 1, ... n heads of ``n`` fair coins [n + 1], each rounded once."""
    ways, tosses, chances = 1, 2**n, np.empty(n + 1)
    for heads in range(n // 2 + 1):
        chances[heads] = chances[n - heads] = ways / tosses
        ways = ways * (n - heads) // (heads + 1)
    return chances


def coin_p_value(heads: int, tails: int) -> float:
    """Two-sided p of a fair coin that fell so: the chance of a count that is no more likely. 1 without a toss."""
    fewer = min(heads, tails)
    return 1.0 if heads == tails else min(1.0, 2 * float(bdtr(fewer, heads + tails, 0.5)))


def wilson_ends(right: float, n: float, confidence: float) -> tuple[float, float]:
    """Score interval of a share ``right / n`` (Wilson 1927), within 0 and 1; ``right`` need not be whole."""
    z, share = -normal_quantile((1 - confidence) / 2), right / n
    spread = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    middle, scale = share + z**2 / (2 * n), 1 + z**2 / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
