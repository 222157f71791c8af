"""Intervals and paired tests: how far a difference between two methods can be told from chance.

Everything is paired on (task, length, sample): every method answered the very same prompts. Scores are in [0, 1].
Sources: Wilson 1927 (interval of a proportion), Tango 1998 (score interval and non-inferiority test of a paired
difference of proportions), McNemar 1947 in its exact binomial form, Holm 1979, Efron 1979 (bootstrap).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from statsmodels.stats.proportion import proportion_confint

from kvscope.results.bootstrap import Array, bootstrap_ends, shared

IntervalKind = Literal["wilson", "bootstrap", "score", "none"]

LEAST_DISCORDANT = 6
"""With fewer discordant pairs the exact test cannot reach p < .05 (five to nil gives .0625)."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; `low` and `high` are None when `kind` is `none` (too few values).

    The interval holds its mean: see `interval_of`.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    kind: IntervalKind

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and not self.low <= self.mean <= self.high:
            raise ValueError(f"the interval {self.low} to {self.high} does not hold its mean {self.mean}")


def interval_of(mean: float, ends: tuple[float, float], *, n: int, kind: IntervalKind) -> Interval:
    """An interval whose ends are moved out to the mean where they leave it outside.

    Rounding can put an end a hair inside (Wilson at 0 or 1, equal values in a bootstrap), and a percentile bootstrap of
    clusters of very different sizes can miss its mean altogether.
    """
    low, high = ends
    return Interval(mean, min(mean, low), max(mean, high), n, kind)


@dataclass(frozen=True)
class Noninferiority:
    """Whether the method loses less than `margin` against the baseline (one-sided, 5 %)."""

    margin: float
    p_value: float | None
    verdict: Literal["non-inferior", "inferior", "inconclusive"]
    pairs_needed: int | None
    """Pairs that give 80 % power at the discordance seen, were the true difference nil; None when it is not open."""


@dataclass(frozen=True)
class PairedDifference:
    """Method minus baseline over the prompts both answered."""

    n_pairs: int
    difference: Interval
    lost: int
    """McNemar's b: pairs where the baseline scores higher."""
    won: int
    """McNemar's c: pairs where the method scores higher."""
    test: Literal["exact McNemar", "exact sign test"]
    p_value: float
    pairs_for_6_discordant: int | None
    """Pairs that would give the least number of discordant ones, when there were fewer; else None."""
    noninferiority: Noninferiority

    @property
    def discordant(self) -> int:
        """Pairs on which the two differ."""
        return self.lost + self.won


def mean_interval(
    scores: Sequence[float] | Array, *, clusters: Sequence[str] | None = None, confidence: float = 0.95
) -> Interval:
    """Mean of scores: Wilson interval for 0/1 scores, else bootstrap over `clusters` (default: over scores).

    Raises ValueError for no scores at all.
    """
    values = _checked(scores)
    mean = float(values.mean())
    if _is_binary(values) and not shared(clusters):
        low, high = proportion_confint(int(values.sum()), len(values), alpha=1 - confidence, method="wilson")
        return interval_of(mean, (max(0.0, float(low)), min(1.0, float(high))), n=len(values), kind="wilson")
    return bootstrap_interval(values, clusters=clusters, confidence=confidence)


def bootstrap_interval(
    values: Sequence[float] | Array, *, clusters: Sequence[str] | None = None, confidence: float = 0.95
) -> Interval:
    """Mean of any values with a percentile bootstrap interval; kind `none` when they cannot be resampled."""
    values = _checked(values)
    ends = bootstrap_ends(values, clusters, confidence)
    if ends is None:
        return Interval(float(values.mean()), None, None, len(values), "none")
    return interval_of(float(values.mean()), ends, n=len(values), kind="bootstrap")


def paired_difference(
    method: Sequence[float] | Array,
    baseline: Sequence[float] | Array,
    *,
    margin: float = 0.01,
    clusters: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> PairedDifference:
    """Compare two score lists of the same prompts, in the same order.

    The interval is a paired bootstrap (over `clusters` where questions share a context). For 0/1 scores it is Tango's
    score interval instead when fewer than 6 pairs depart from the commonest outcome (lost, won or equal): the bootstrap
    would turn "five equal pairs" into a difference of exactly nil, and "eight lost pairs" into exactly -100 points.
    Graded scores get the exact sign test, which on 0/1 scores is McNemar's.
    Raises ValueError for lists of different lengths or none.
    """
    left, right = _checked(method), _checked(baseline)
    if len(left) != len(right):
        raise ValueError(f"{len(left)} scores against {len(right)}: pairs are needed")
    differences = left - right
    n, lost, won = len(left), int((differences < 0).sum()), int((differences > 0).sum())
    binary = _is_binary(left) and _is_binary(right)
    p_value = float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0
    few = lost + won < LEAST_DISCORDANT
    narrow = n - max(lost, won, n - lost - won) < LEAST_DISCORDANT
    interval = _difference_interval(
        differences,
        lost=lost,
        won=won,
        score=binary and narrow and not shared(clusters),
        clusters=clusters,
        c=confidence,
    )
    return PairedDifference(
        n_pairs=n,
        difference=interval,
        lost=lost,
        won=won,
        test="exact McNemar" if binary else "exact sign test",
        p_value=p_value,
        pairs_for_6_discordant=math.ceil(LEAST_DISCORDANT / _discordance(lost + won, n)) if few else None,
        noninferiority=_noninferiority(
            differences, lost=lost, won=won, margin=margin, binary=binary and not shared(clusters), clusters=clusters
        ),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values, in the order given.

    Here and not from statsmodels: its function collects garbage at every call, which a report of many rows makes
    hundreds of.
    """
    if not p_values:
        return []
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1)), 1.0)
    return [float(p) for p in adjusted]


def tango_z(*, lost: int, won: int, n_pairs: int, difference: float) -> float:
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


def tango_interval(*, lost: int, won: int, n_pairs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of the paired difference: every value that `tango_z` does not reject."""
    z = float(norm.ppf(0.5 + confidence / 2))
    middle = (won - lost) / n_pairs

    def end(bound: float, target: float) -> float:
        def excess(value: float) -> float:
            return tango_z(lost=lost, won=won, n_pairs=n_pairs, difference=value) - target

        if (excess(middle) > 0) == (excess(bound) > 0):
            return bound
        return float(brentq(excess, bound, middle, xtol=1e-9))

    edge = 1 - 1e-9
    return (-1.0 if middle <= -edge else end(-edge, z), 1.0 if middle >= edge else end(edge, -z))


def pairs_for_noninferiority(*, discordance: float, margin: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Pairs a one-sided non-inferiority test needs when the true difference is nil (normal approximation).

    At a margin of 1 point: about 1,236 / 3,090 / 6,180 pairs at 2 / 5 / 10 % discordance.
    """
    z = float(norm.ppf(1 - alpha) + norm.ppf(power))
    return math.ceil(z * z * discordance / margin**2)


def pairs_for_difference(*, discordance: float, difference: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Pairs a two-sided McNemar test needs to show a true paired difference (normal approximation).

    At 10 % discordance and 0.6 points: about 21,800 pairs.

    Raises:
        ValueError: a difference of nil, or one that is more than the discordance allows.
    """
    if not 0 < abs(difference) <= discordance:
        raise ValueError(f"no paired difference of {difference} is there to show at a discordance of {discordance}")
    z = float(norm.ppf(1 - alpha / 2) + norm.ppf(power))
    return math.ceil(z * z * (discordance - difference**2) / difference**2)


def _difference_interval(
    differences: Array, *, lost: int, won: int, score: bool, clusters: Sequence[str] | None, c: float
) -> Interval:
    mean, n = float(differences.mean()), len(differences)
    if score:
        ends = tango_interval(lost=lost, won=won, n_pairs=n, confidence=c)
        return interval_of(mean, ends, n=n, kind="score")
    if lost + won == 0:
        return Interval(mean, None, None, n, "none")
    return bootstrap_interval(differences, clusters=clusters, confidence=c)


def _noninferiority(
    differences: Array, *, lost: int, won: int, margin: float, binary: bool, clusters: Sequence[str] | None
) -> Noninferiority:
    n = len(differences)
    p_value: float | None = None
    if binary:
        z = tango_z(lost=lost, won=won, n_pairs=n, difference=-margin)
        p_value = float(norm.sf(z))
        holds, fails = p_value < 0.05, p_value > 0.95
    else:
        ends = bootstrap_ends(differences, clusters, 0.9) if lost + won >= LEAST_DISCORDANT else None
        low, high = ends or (-1.0, 1.0)
        holds, fails = low > -margin, high < -margin
    if holds or fails:
        return Noninferiority(margin, p_value, "non-inferior" if holds else "inferior", None)
    needed = pairs_for_noninferiority(discordance=_discordance(lost + won, n), margin=margin)
    return Noninferiority(margin, p_value, "inconclusive", max(needed, n + 1))


def _discordance(discordant: int, n: int) -> float:
    """Laplace's estimate: never nil, so that a few prompts without a difference do not promise a tiny study."""
    return (discordant + 1) / (n + 2)


def _checked(scores: Sequence[float] | Array) -> Array:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError("a non-empty list of finite scores is needed")
    return values


def _is_binary(values: Array) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())
