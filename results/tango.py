"""The score test of a paired difference of proportions and its interval (Tango 1998)."""

import math

from kvscope.results.distributions import normal_quantile


def tango_z(*, lost: float, won: float, n_pairs: int, difference: float) -> float:
    """Tango's score statistic of `true difference (method - baseline) == difference`; about standard normal under it.

    The unknown discordance is replaced by its maximum-likelihood value under that hypothesis (Tango 1998, eq. 2-4).
    """
    n, x, y = n_pairs, won, lost
    b = (2 * n - x + y) * difference - x - y
    c = -y * difference * (1 - difference)
    discordance = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    variance = n * (2 * discordance + difference * (1 - difference))
    gap = x - y - n * difference
    if variance <= 0.0:
        return 0.0 if gap == 0 else math.copysign(math.inf, gap)
    return gap / math.sqrt(variance)


def tango_interval(*, lost: float, won: float, n_pairs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of the paired difference: every value that `tango_z` does not reject."""
    from scipy.optimize import brentq  # half a second, for a report that may not need it

    z = normal_quantile(0.5 + confidence / 2)
    middle = (won - lost) / n_pairs

    def end(bound: float, target: float) -> float:
        def excess(value: float) -> float:
            return tango_z(lost=lost, won=won, n_pairs=n_pairs, difference=value) - target

        if (excess(middle) > 0) == (excess(bound) > 0):
            return bound
        return float(brentq(excess, bound, middle, xtol=1e-9))

    edge = 1 - 1e-9
    return (-1.0 if middle <= -edge else end(-edge, z), 1.0 if middle >= edge else end(edge, -z))
