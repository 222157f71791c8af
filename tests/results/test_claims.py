"""Verdicts on claims: properties of the rule, and intervals of joined rows that cover what they say."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvscope.results.claims import Range, equal_mean, verdict_of, weighted_sum
from kvscope.results.statistics import Interval, paired_difference

numbers = st.floats(-100, 100).map(lambda value: round(value, 3))
LESS = {"not reproduced": -1, "inconclusive": 0, "reproduced": 1}


@given(claim=numbers, margin=st.floats(0.01, 50), low=numbers, width=st.floats(0, 50))
def test_the_rule(claim, margin, low, width):
    asked, high = Range.around(claim, margin=margin), low + width
    found = verdict_of(low, high, asked)
    inside = asked.low <= low and high <= asked.high
    apart = high < asked.low or low > asked.high
    assert found == ("reproduced" if inside else "not reproduced" if apart else "inconclusive")


@given(claim=numbers, margin=st.floats(0.01, 50), low=numbers, width=st.floats(0.01, 50), more=st.floats(0, 50))
def test_a_wider_interval_never_decides_what_a_narrower_one_left_open(claim, margin, low, width, more):
    asked = Range.around(claim, margin=margin)
    narrow, wide = verdict_of(low, low + width, asked), verdict_of(low - more, low + width + more, asked)
    assert wide in (narrow, "inconclusive")


@given(
    claim=numbers, low=numbers, width=st.floats(0, 20), margins=st.lists(st.floats(0.01, 60), min_size=2, max_size=4)
)
def test_a_wider_margin_never_takes_a_reproduction_back(claim, low, width, margins):
    verdicts = [verdict_of(low, low + width, Range.around(claim, margin=each)) for each in sorted(margins)]
    assert all(LESS[before] <= LESS[after] for before, after in pairwise(verdicts))


@given(low=numbers, width=st.floats(0, 50), bound=numbers)
def test_claims_of_one_side(low, width, bound):
    at_most, at_least = (
        verdict_of(low, low + width, Range(high=bound)),
        verdict_of(-(low + width), -low, Range(low=-bound)),
    )
    assert at_most == at_least, "the same claim about the negative"
    if at_most == "reproduced":
        assert low + width <= bound


def test_partly_out_is_inconclusive_and_so_is_no_interval():
    asked = Range.around(13.5, margin=1.5)
    assert verdict_of(12.0, 15.0, asked) == "reproduced", "the ends belong to the range"
    assert verdict_of(14.0, 15.01, asked) == "inconclusive"
    assert verdict_of(0.0, 100.0, asked) == "inconclusive"
    assert verdict_of(15.01, 16.0, asked) == "not reproduced"
    assert verdict_of(None, None, asked) == verdict_of(13.5, None, asked) == "inconclusive"
    for bad in ((2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="is none"):
            verdict_of(*bad, asked)
    with pytest.raises(ValueError, match="holds nothing"):
        Range.around(1.0, margin=0.0)
    assert (asked.text("%"), Range(high=10).text("%"), Range(low=-1).text("points")) == (
        "12.0 to 15.0 %", "at most 10.0 %", "at least -1.0 points",
    )  # fmt: skip


def test_weighted_sums():
    parts = [Interval(0.5, 0.4, 0.7, 10, "wilson"), Interval(0.2, 0.1, 0.25, 30, "bootstrap")]
    found = weighted_sum(parts, [0.25, 0.75])
    assert found.mean == pytest.approx(0.275)
    assert found.low == pytest.approx(0.275 - math.hypot(0.025, 0.075))
    assert found.high == pytest.approx(0.275 + math.hypot(0.05, 0.0375))
    assert (found.n, found.kind) == (40, "mover")
    alone = equal_mean(parts[:1])
    assert (alone.mean, alone.low, alone.high) == pytest.approx((0.5, 0.4, 0.7))
    open_ended = weighted_sum([*parts, Interval(1.0, None, None, 1, "none")], [1, 1, 1])
    assert (open_ended.low, open_ended.kind) == (None, "none"), "a part without an interval leaves the sum without one"
    for bad in ([], [1.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="as many weights"):
            weighted_sum(parts if bad else [], bad)


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "won"), [(0.02, 0.005), (0.06, 0.05), (0.0, 0.004)])
def test_joined_rows_cover_the_mean_of_their_differences(lost, won):
    """Rows as of the full profile, 400 pairs the shorter and 100 the longer: 95 % cover at least 92 of 100."""
    draw, truth, hits, repeats = np.random.default_rng(5), won - lost, 0, 200
    for _ in range(repeats):
        rows = []
        for n in (400, 400, 100, 100, 100):
            outcome = draw.choice([-1.0, 0.0, 1.0], size=n, p=[lost, 1 - lost - won, won])
            method, baseline = (
                np.where(outcome > 0, 1.0, np.where(outcome < 0, 0.0, 1.0)),
                np.where(outcome > 0, 0.0, 1.0),
            )
            rows.append(paired_difference(method, baseline).difference)
        found = equal_mean(rows)
        assert found.low is not None and found.high is not None  # noqa: PT018
        hits += found.low <= truth <= found.high
    assert hits / repeats >= 0.92


def test_a_true_claim_is_seldom_refuted_and_a_false_one_seldom_reproduced():
    """The true value in the range: refuted in fewer than 5 %. On its edge: reproduced in fewer than 5 %."""
    draw, repeats = np.random.default_rng(9), 2000
    asked = Range.around(0.6, margin=0.5)

    def share(truth, verdict):
        means = draw.normal(truth, 0.2, size=repeats)
        return sum(verdict_of(mean - 1.96 * 0.2, mean + 1.96 * 0.2, asked) == verdict for mean in means) / repeats

    assert share(0.6, "not reproduced") < 0.05
    assert share(0.1, "not reproduced") < 0.05, "an edge of the range still belongs to it"
    assert share(0.09, "reproduced") < 0.05
    assert share(-0.5, "not reproduced") > 0.5
