"""Intervals and paired tests: how far a difference between two methods can be told from chance.

Everything is paired on (task, length, sample): every method answered the very same prompts. Scores are in [0, 1]. Where
questions share a context, clusters of them are resampled, tested and counted, never the questions.
Sources: Wilson 1927 (interval of a proportion), Tango 1998 (score interval and non-inferiority test of a paired
difference of proportions), McNemar 1947 in its exact form, Holm 1979, Efron 1979 (bootstrap), Schuirmann 1987 (two
one-sided tests).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvscope.results.bootstrap import Array, bootstrap_ends, cluster_totals
from kvscope.results.distributions import normal_cdf, normal_sf, wilson_ends
from kvscope.results.exact_tests import NIL, mcnemar_test, sign_test
from kvscope.results.power import design_effect, noninferiority_power, pairs_for_equivalence, pairs_for_noninferiority
from kvscope.results.tango import tango_interval, tango_z

IntervalKind = Literal["wilson", "bootstrap", "score", "mover", "none"]

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
    power: float
    """Chance that so many pairs hold it at the discordance seen, were the true difference nil."""


@dataclass(frozen=True)
class Equivalence:
    """Whether the method neither loses nor gains `margin`: two one-sided tests of 5 % each (TOST)."""

    margin: float
    p_value: float | None
    """The larger of the two; None where an interval of 90 % decides."""
    verdict: Literal["equivalent", "not equivalent", "inconclusive"]
    pairs_needed: int | None
    """As of non-inferiority."""


@dataclass(frozen=True)
class PairedDifference:
    """Method minus baseline over the prompts both answered."""

    n_pairs: int
    n_clusters: int
    """Pairs, or contexts where some share one: what is tested and resampled."""
    difference: Interval
    lost: int
    """McNemar's b: pairs where the baseline scores higher."""
    won: int
    """McNemar's c: pairs where the method scores higher."""
    lost_clusters: int
    """Clusters that the baseline wins on balance."""
    won_clusters: int
    test: Literal["exact McNemar", "exact sign test", "exact McNemar by clusters", "exact sign test by clusters"]
    p_value: float
    pairs_for_6_discordant: int | None
    """Pairs that would give the least number of discordant clusters, when there were fewer; else None."""
    design_effect: float
    """How many times the variance of the difference is that of pairs that stand alone; 1 without shared contexts."""
    noninferiority: Noninferiority
    equivalence: Equivalence

    @property
    def discordant(self) -> int:
        """Pairs on which the two differ."""
        return self.lost + self.won

    @property
    def discordant_clusters(self) -> int:
        """Clusters on which the two differ on balance."""
        return self.lost_clusters + self.won_clusters

    @property
    def clustered(self) -> bool:
        """Whether some pairs share a context."""
        return self.n_clusters < self.n_pairs

    @property
    def is_worse(self) -> bool:
        """Which way the test points: by clusters it may be another than by pairs."""
        if self.test.startswith("exact sign test"):
            return self.lost_clusters > self.won_clusters
        return self.lost > self.won


@dataclass(frozen=True)
class _Pairs:
    """Differences of pairs, and their clusters as tests and intervals take them.

    Attributes:
        differences: method minus baseline, each pair.
        sums, sizes: of each cluster; sizes None where each holds one pair.
        binary: whether all scores are 0 or 1.
    """

    differences: Array
    sums: Array
    sizes: Array | None
    binary: bool

    @property
    def lost(self) -> int:
        return int((self.sums < -NIL).sum())

    @property
    def won(self) -> int:
        return int((self.sums > NIL).sum())

    @property
    def narrow(self) -> bool:
        """Whether too few clusters depart from the commonest outcome (lost, won or equal) to resample them."""
        n = len(self.sums)
        return n - max(self.lost, self.won, n - self.lost - self.won) < LEAST_DISCORDANT

    @property
    def score_counts(self) -> tuple[float, float]:
        """What score tests count as lost and won: pairs, or clusters' shares of them, each cluster one observation."""
        shares = self.sums if self.sizes is None else self.sums / self.sizes
        return float(-shares[shares < 0].sum()), float(shares[shares > 0].sum())

    @property
    def scored(self) -> bool:
        """Whether a score test holds: of 0/1 scores that stand alone, or in clusters that are alike all but a few."""
        return self.binary and (self.sizes is None or self.narrow)

    @property
    def discordance(self) -> float:
        """Share of the pairs that differ."""
        lost, won = (self.differences < -NIL).sum(), (self.differences > NIL).sum()
        return _discordance(int(lost + won), len(self.differences))


def mean_interval(
    scores: Sequence[float] | Array, *, clusters: Sequence[str] | None = None, confidence: float = 0.95
) -> Interval:
    """Mean of scores: Wilson interval for 0/1 scores, else bootstrap over `clusters` (default: over scores).

    0/1 scores in clusters get Wilson's interval, each cluster one observation, when fewer than 6 clusters depart from
    the commonest outcome (all right or all wrong): resampling would take what did not happen here for impossible.
    Raises ValueError for no scores at all.
    """
    values = _checked(scores)
    mean = float(values.mean())
    sums, sizes = cluster_totals(values, clusters)
    if _is_binary(values) and (sizes is None or _nearly_alike(sums, sizes)):
        right = int(sums.sum()) if sizes is None else float((sums / sizes).sum())
        return interval_of(mean, wilson_ends(right, len(sums), confidence), n=len(values), kind="wilson")
    return _resampled(values, sums, sizes, confidence)


def bootstrap_interval(
    values: Sequence[float] | Array, *, clusters: Sequence[str] | None = None, confidence: float = 0.95
) -> Interval:
    """Mean of any values with a percentile bootstrap interval; kind `none` when they cannot be resampled."""
    values = _checked(values)
    return _resampled(values, *cluster_totals(values, clusters), confidence)


def _resampled(values: Array, sums: Array, sizes: Array | None, confidence: float) -> Interval:
    ends = bootstrap_ends(sums, sizes, confidence)
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
    score interval instead when fewer than 6 clusters depart from the commonest outcome (lost, won or equal): the
    bootstrap would turn "five equal pairs" into a difference of exactly nil, and "eight lost pairs" into exactly -100
    points. A cluster is one observation then. Graded scores get the exact sign test, which on 0/1 scores is McNemar's;
    where questions share a context, the sign of a whole context is what is tossed.
    Raises ValueError for lists of different lengths or none.
    """
    left, right = _checked(method), _checked(baseline)
    if len(left) != len(right):
        raise ValueError(f"{len(left)} scores against {len(right)}: pairs are needed")
    differences = left - right
    sums, sizes = cluster_totals(differences, clusters)
    binary = _is_binary(left) and _is_binary(right)
    pairs = _Pairs(differences, sums, sizes, binary)
    n, discordant = len(sums), pairs.lost + pairs.won
    needed = math.ceil(LEAST_DISCORDANT / _discordance(discordant, n) * len(left) / n)
    effect = design_effect(differences, sums, sizes)
    kind: Literal["exact McNemar", "exact sign test"] = "exact McNemar" if binary else "exact sign test"
    return PairedDifference(
        n_pairs=len(left),
        n_clusters=n,
        difference=_difference_interval(pairs, confidence),
        lost=int((differences < 0).sum()),
        won=int((differences > 0).sum()),
        lost_clusters=pairs.lost,
        won_clusters=pairs.won,
        test=kind if sizes is None else f"{kind} by clusters",  # type: ignore[arg-type]
        p_value=mcnemar_test(sums) if binary else sign_test(sums),
        pairs_for_6_discordant=needed if discordant < LEAST_DISCORDANT else None,
        design_effect=effect,
        noninferiority=_noninferiority(pairs, margin=margin, effect=effect),
        equivalence=_equivalence(pairs, margin=margin, effect=effect),
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


def _difference_interval(pairs: _Pairs, confidence: float) -> Interval:
    mean, n = float(pairs.differences.mean()), len(pairs.differences)
    if pairs.binary and pairs.narrow:
        lost, won = pairs.score_counts
        ends = tango_interval(lost=lost, won=won, n_pairs=len(pairs.sums), confidence=confidence)
        return interval_of(mean, ends, n=n, kind="score")
    if not (np.abs(pairs.differences) > 0).any():
        return Interval(mean, None, None, n, "none")
    return _resampled(pairs.differences, pairs.sums, pairs.sizes, confidence)


def _noninferiority(pairs: _Pairs, *, margin: float, effect: float) -> Noninferiority:
    n, seen = len(pairs.differences), {"discordance": pairs.discordance, "margin": margin, "design_effect": effect}
    p_value: float | None = None
    if pairs.scored:
        lost, won = pairs.score_counts
        p_value = normal_sf(tango_z(lost=lost, won=won, n_pairs=len(pairs.sums), difference=-margin))
        holds, fails = p_value < 0.05, p_value > 0.95
    else:
        low, high = _ends_90(pairs)
        holds, fails = low > -margin, high < -margin
    power = noninferiority_power(n_pairs=n, **seen)
    if holds or fails:
        return Noninferiority(margin, p_value, "non-inferior" if holds else "inferior", None, power)
    needed = max(pairs_for_noninferiority(**seen), n + 1)
    return Noninferiority(margin, p_value, "inconclusive", needed, power)


def _equivalence(pairs: _Pairs, *, margin: float, effect: float) -> Equivalence:
    n = len(pairs.differences)
    p_value: float | None = None
    if pairs.scored:
        lost, won = pairs.score_counts
        below, above = (
            tango_z(lost=lost, won=won, n_pairs=len(pairs.sums), difference=value) for value in (-margin, margin)
        )
        p_value = max(normal_sf(below), normal_cdf(above))
        holds, fails = p_value < 0.05, normal_cdf(below) < 0.05 or normal_sf(above) < 0.05
    else:
        low, high = _ends_90(pairs)
        holds, fails = -margin < low and high < margin, high < -margin or low > margin
    if holds or fails:
        return Equivalence(margin, p_value, "equivalent" if holds else "not equivalent", None)
    needed = pairs_for_equivalence(discordance=pairs.discordance, margin=margin, design_effect=effect)
    return Equivalence(margin, p_value, "inconclusive", max(needed, n + 1))


def _ends_90(pairs: _Pairs) -> tuple[float, float]:
    """Ends whose halves are tests of 5 %; everything where too few clusters differ to resample them."""
    enough = pairs.lost + pairs.won >= LEAST_DISCORDANT
    return (bootstrap_ends(pairs.sums, pairs.sizes, 0.9) if enough else None) or (-1.0, 1.0)


def _nearly_alike(sums: Array, sizes: Array) -> bool:
    """Whether too few clusters depart from the commonest outcome, all right or all wrong, to resample them."""
    return len(sums) - max(int((sums == sizes).sum()), int((sums == 0).sum())) < LEAST_DISCORDANT


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
