"""Verdicts on published claims: an interval against a range that was fixed before anything was measured.

``reproduced`` needs the whole interval inside the range, ``not reproduced`` the whole interval outside it. What lies on
an end is ``inconclusive``, and so is an estimate without an interval. So a small sample can neither reproduce a claim
nor refute one: it is an equivalence test (Schuirmann 1987) beside a test of difference, both at the interval's level.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvscope.results.statistics import LEAST_DISCORDANT, Interval, PairedDifference, interval_of
from kvscope.results.tango import tango_interval

ClaimVerdict = Literal["reproduced", "not reproduced", "inconclusive", "not measurable here"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values that count as the claim: from ``low`` to ``high``, both included; infinite where a claim has one side."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"a range from {self.low} to {self.high} holds nothing")

    @classmethod
    def around(cls, claim: float, *, margin: float) -> "Range":
        """Return the claim with as much on both sides."""
        return cls(low=claim - margin, high=claim + margin)

    def text(self, unit: str) -> str:
        """Return the range as words: ``12.0 to 15.0 %``, ``at most 10.0 %``."""
        if math.isinf(self.low):
            return f"at most {self.high:.1f} {unit}"
        if math.isinf(self.high):
            return f"at least {self.low:.1f} {unit}"
        return f"{self.low:.1f} to {self.high:.1f} {unit}"


def verdict_of(low: float | None, high: float | None, asked: Range) -> ClaimVerdict:
    """Return what an interval says of a claim.

    Args:
        low, high: its ends; None where there is no interval.
        asked: the values that count as the claim.

    Raises:
        ValueError: the ends are in the wrong order, or are no numbers.
    """
    if low is None or high is None:
        return "inconclusive"
    if not low <= high:
        raise ValueError(f"an interval from {low} to {high} is none")
    if asked.low <= low and high <= asked.high:
        return "reproduced"
    if high < asked.low or low > asked.high:
        return "not reproduced"
    return "inconclusive"


def weighted_sum(parts: Sequence[Interval], weights: Sequence[float]) -> Interval:
    """Return the weighted sum of independent estimates with its interval, by squaring and adding their half widths.

    The method of variance estimates recovery (MOVER; Zou and Donner 2008): each end is as far from the sum as the root
    of the weighted squares of the parts' distances on that side. Parts keep intervals of their own kind, so a part in
    which nothing differed still adds the width that its size leaves open, which a bootstrap over all would not.

    Raises:
        ValueError: as many weights as parts are needed, at least one; weights below nil.
    """
    if not parts or len(parts) != len(weights) or min(weights) < 0:
        raise ValueError(f"{len(parts)} parts need as many weights from nil on, got {list(weights)}")
    mean, n = sum(w * part.mean for w, part in zip(weights, parts, strict=True)), sum(part.n for part in parts)
    below = above = 0.0
    for weight, part in zip(weights, parts, strict=True):
        if part.low is None or part.high is None:
            return Interval(mean, None, None, n, "none")
        below += (weight * (part.mean - part.low)) ** 2
        above += (weight * (part.high - part.mean)) ** 2
    ends = (mean - math.sqrt(below), mean + math.sqrt(above))
    return interval_of(mean, ends, n=n, kind="mover")


def equal_mean(parts: Sequence[Interval]) -> Interval:
    """Return the mean of independent estimates, each with equal weight."""
    return weighted_sum(parts, [1 / len(parts)] * len(parts))


def careful_difference(paired: PairedDifference) -> Interval:
    """Return the interval of a paired difference as a verdict may rest on it.

    Of graded scores of which fewer than 6 pairs differ a bootstrap knows next to nothing, and nothing where none does.
    A pair differs by one at most, so the difference lies between minus the chance to lose and the chance to win: the
    ends are then the score intervals of these two (Tango 1998), or the bootstrap's where those are further out.
    """
    found = paired.difference
    if found.kind == "score" or paired.discordant_clusters >= LEAST_DISCORDANT:
        return found
    low, _ = tango_interval(lost=paired.lost_clusters, won=0, n_pairs=paired.n_clusters)
    _, high = tango_interval(lost=0, won=paired.won_clusters, n_pairs=paired.n_clusters)
    low = low if found.low is None else min(low, found.low)
    high = high if found.high is None else max(high, found.high)
    return interval_of(found.mean, (low, high), n=found.n, kind="score")
