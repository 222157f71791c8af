"""How many pairs a test needs, and what power it had: normal approximations.

A study that was too small is not continued until it shows something: the larger one is a new test, on new seeds.
Pairs are multiplied by the design effect where questions share contexts (Kish 1965): n pairs in clusters tell as much
as n / effect pairs that stand alone.
"""

import math

import numpy as np

from kvscope.results.bootstrap import Array
from kvscope.results.distributions import normal_cdf, normal_quantile

POWER, ALPHA = 0.8, 0.05


def pairs_for_noninferiority(
    *, discordance: float, margin: float, power: float = POWER, alpha: float = ALPHA, design_effect: float = 1.0
) -> int:
    """Pairs a one-sided non-inferiority test needs when the true difference is nil.

    At a margin of 1 point: about 1,236 / 3,090 / 6,180 pairs at 2 / 5 / 10 % discordance.
    """
    z = normal_quantile(1 - alpha) + normal_quantile(power)
    return math.ceil(design_effect * z * z * discordance / margin**2)


def pairs_for_equivalence(
    *, discordance: float, margin: float, power: float = POWER, alpha: float = ALPHA, design_effect: float = 1.0
) -> int:
    """Pairs that two one-sided tests (TOST) need when the true difference is nil."""
    z = normal_quantile(1 - alpha) + normal_quantile(1 - (1 - power) / 2)
    return math.ceil(design_effect * z * z * discordance / margin**2)


def pairs_for_difference(*, discordance: float, difference: float, power: float = POWER, alpha: float = ALPHA) -> int:
    """Pairs a two-sided McNemar test needs to show a true paired difference.

    At 10 % discordance and 0.6 points: about 21,800 pairs.

    Raises:
        ValueError: a difference of nil, or one that is more than the discordance allows.
    """
    if not 0 < abs(difference) <= discordance:
        raise ValueError(f"no paired difference of {difference} is there to show at a discordance of {discordance}")
    z = normal_quantile(1 - alpha / 2) + normal_quantile(power)
    return math.ceil(z * z * (discordance - difference**2) / difference**2)


def noninferiority_power(
    *, n_pairs: int, discordance: float, margin: float, alpha: float = ALPHA, design_effect: float = 1.0
) -> float:
    """Chance that a one-sided non-inferiority test of `n_pairs` holds when the true difference is nil."""
    spread = math.sqrt(design_effect * discordance / n_pairs)
    return normal_cdf(margin / spread - normal_quantile(1 - alpha)) if spread else 1.0


def design_effect(values: Array, sums: Array, sizes: Array | None) -> float:
    """How many times the variance of a mean is that of values that stand alone; at least 1.

    Args:
        values: all of them.
        sums, sizes: of the clusters; sizes None where each holds one value.
    """
    n, k = len(values), len(sums)
    if sizes is None or k < 2:
        return 1.0
    mean = float(values.mean())
    alone = float(((values - mean) ** 2).sum()) / (n * (n - 1))
    by_cluster = float(((sums - sizes * mean) ** 2).sum()) * k / (k - 1) / n**2
    return max(1.0, by_cluster / alone) if alone > np.finfo(float).tiny else 1.0
