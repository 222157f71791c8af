"""Statistics against published values, library routines and brute force."""

import itertools
import math
import re
from inspect import signature

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, norm

from kvscope.reports.units import percent, points, with_interval
from kvscope.results.bootstrap import bootstrap_means
from kvscope.results.power import pairs_for_equivalence, pairs_for_noninferiority
from kvscope.results.statistics import Interval, bootstrap_interval, holm, mean_interval, paired_difference
from kvscope.results.tango import tango_interval, tango_z


def scores(lost: int, won: int, same: int) -> tuple[list[float], list[float]]:
    """Method and baseline scores with the given discordant counts."""
    return [0.0] * lost + [1.0] * won + [1.0] * same, [1.0] * lost + [0.0] * won + [1.0] * same


def test_wilson_interval_of_a_textbook_case() -> None:
    # 8 of 10: (0.4902, 0.9433) by Wilson's formula, computed by hand.
    z = norm.ppf(0.975)
    centre, half = 0.8 + z**2 / 20, z * math.sqrt(0.8 * 0.2 / 10 + z**2 / 400)
    result = mean_interval([1.0] * 8 + [0.0] * 2)
    assert result.kind == "wilson"
    assert (result.low, result.high) == pytest.approx(
        ((centre - half) / (1 + z**2 / 10), (centre + half) / (1 + z**2 / 10))
    )
    assert (result.low, result.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_five_equal_answers_leave_a_wide_interval(score: float) -> None:
    result = mean_interval([score] * 5)
    assert result.low is not None
    assert result.high is not None
    assert result.low <= result.mean <= result.high
    assert result.high - result.low > 0.4


def test_graded_scores_are_bootstrapped_like_scipy_does() -> None:
    values = np.random.default_rng(1).random(60)
    ours = mean_interval(values)
    # scipy renamed it in 1.15.
    source = "rng" if "rng" in signature(bootstrap).parameters else "random_state"
    drawn = {source: np.random.default_rng(2)}
    theirs = bootstrap((values,), np.mean, method="percentile", **drawn).confidence_interval
    assert ours.kind == "bootstrap"
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


@pytest.mark.parametrize("levels", [3, 1000])
def test_bootstrap_spread_is_the_standard_error(levels: int) -> None:
    values = np.random.default_rng(3).integers(levels, size=400) / levels
    means = bootstrap_means(values)
    assert means is not None
    assert means.std() == pytest.approx(values.std() / math.sqrt(400), rel=0.05)
    again = bootstrap_means(values)
    assert again is not None
    assert (means == again).all()


def test_questions_that_share_a_context_count_once() -> None:
    # 10 contexts of 20 identical answers carry the information of 10 answers.
    per_context = np.random.default_rng(4).random(10)
    repeated, names = np.repeat(per_context, 20), [f"c{i}" for i in range(10) for _ in range(20)]
    clustered = bootstrap_interval(repeated, clusters=names)
    single = bootstrap_interval(per_context)
    assert clustered.low == pytest.approx(single.low, abs=1e-9)
    assert clustered.high == pytest.approx(single.high, abs=1e-9)


def test_one_value_has_no_bootstrap_interval() -> None:
    result = mean_interval([0.5])
    assert (result.mean, result.low, result.high, result.kind) == (0.5, None, None, "none")


def test_tango_interval_of_a_published_case() -> None:
    # Fagerland, Lydersen, Laake 2014 (Statist. Med. 33), airway hyper-responsiveness: 1 and 7 discordant of 21 pairs,
    # Tango's asymptotic score interval -0.517 to -0.026.
    assert tango_interval(lost=7, won=1, n_pairs=21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_tango_interval_without_discordant_pairs_has_its_closed_form() -> None:
    z2 = norm.ppf(0.975) ** 2
    for n in (1, 5, 200):
        assert tango_interval(lost=0, won=0, n_pairs=n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(lost=st.integers(0, 30), won=st.integers(0, 30), same=st.integers(0, 60))
def test_tango_interval_holds_the_estimate_and_mirrors(lost: int, won: int, same: int) -> None:
    n = lost + won + same
    if n == 0:
        return
    low, high = tango_interval(lost=lost, won=won, n_pairs=n)
    assert -1 <= low <= (won - lost) / n <= high <= 1
    assert tango_interval(lost=won, won=lost, n_pairs=n) == pytest.approx((-high, -low), abs=1e-6)


clusters = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.7, 1.0])), min_size=1)


@settings(max_examples=60, deadline=None)
@given(groups=clusters, shared=st.booleans(), binary=st.booleans())
def test_every_interval_of_a_mean_holds_it_printed_too(
    groups: list[tuple[int, float]], shared: bool, binary: bool
) -> None:
    values = [float(score > 0.3) if binary else score for size, score in groups for _ in range(size)]
    names = [f"c{i}" for i, (size, _) in enumerate(groups) for _ in range(size)]
    for found in (mean_interval(values, clusters=names if shared else None), bootstrap_interval(values)):
        holds(found)


@settings(max_examples=60, deadline=None)
@given(
    lost=st.integers(0, 40),
    won=st.integers(0, 40),
    same=st.integers(0, 400),
    grade=st.sampled_from([1.0, 0.3, 1 / 3]),
    per_context=st.integers(1, 9),
)
def test_every_interval_of_a_difference_holds_it_printed_too(
    lost: int, won: int, same: int, grade: float, per_context: int
) -> None:
    method, baseline = scores(lost, won, same + 1)
    names = [f"c{i // per_context}" for i in range(len(method))]
    graded = paired_difference([grade * x for x in method], [grade * x for x in baseline], clusters=names)
    for found in (graded.difference, paired_difference(method, baseline).difference):
        holds(found)


def test_one_large_cluster_does_not_leave_its_mean_outside() -> None:
    values, names = [1.0] * 400 + [0.0] * 3, ["a"] * 400 + ["b", "c", "d"]
    holds(mean_interval(values, clusters=names))


def holds(found: Interval) -> None:
    if found.low is None or found.high is None:
        assert found.kind == "none"
        return
    assert found.low <= found.mean <= found.high
    for text in (percent, points):
        middle, low, high = map(float, re.findall(r"[-+]?[\d.]+", with_interval(*ends(found), text=text)))
        assert low <= middle <= high


def ends(found: Interval) -> tuple[float, float | None, float | None]:
    return found.mean, found.low, found.high


def test_an_interval_beside_its_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="does not hold its mean"):
        Interval(0.998, 0.999, 1.0, 10, "wilson")


def test_tango_z_at_nil_difference_is_mcnemars() -> None:
    assert tango_z(lost=9, won=3, n_pairs=50, difference=0.0) == pytest.approx((3 - 9) / math.sqrt(12))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 0), (6, 0), (7, 2), (3, 3), (0, 8)])
def test_exact_mcnemar_by_enumeration(lost: int, won: int) -> None:
    result = paired_difference(*scores(lost, won, 4))
    m = lost + won
    outcomes = [sum(signs) for signs in itertools.product((0, 1), repeat=m)]
    extreme = sum(min(x, m - x) <= min(lost, won) for x in outcomes)
    assert result.p_value == pytest.approx(min(1.0, extreme / len(outcomes)))
    assert (result.lost, result.won, result.test) == (lost, won, "exact McNemar")


def test_five_discordant_pairs_cannot_decide_and_six_can() -> None:
    five, six = paired_difference(*scores(5, 0, 15)), paired_difference(*scores(6, 0, 14))
    assert five.p_value > 0.05
    assert five.pairs_for_6_discordant == math.ceil(6 / (6 / 22))
    assert six.p_value < 0.05
    assert six.pairs_for_6_discordant is None


def test_few_discordant_pairs_get_the_score_interval() -> None:
    few = paired_difference(*scores(0, 0, 5)).difference
    assert few.kind == "score"
    assert few.low is not None
    assert few.low < -0.4
    all_lost = paired_difference(*scores(8, 0, 0)).difference
    assert all_lost.kind == "score"
    assert all_lost.high is not None
    assert all_lost.high > -0.7
    many = paired_difference(*scores(12, 3, 45)).difference
    assert many.kind == "bootstrap"
    assert (many.low, many.high) == pytest.approx(tango_interval(lost=12, won=3, n_pairs=60), abs=0.03)


def test_graded_pairs_use_the_sign_test() -> None:
    method, baseline = [0.5, 0.25, 1.0, 0.0, 0.75, 0.5, 0.5], [1.0, 0.5, 1.0, 0.25, 1.0, 1.0, 1.0]
    result = paired_difference(method, baseline)
    assert result.test == "exact sign test"
    assert result.p_value == pytest.approx(binomtest(6, 6).pvalue)
    assert result.difference.mean == pytest.approx(np.mean(method) - np.mean(baseline))
    assert result.noninferiority.verdict == "inferior"


def test_graded_pairs_without_a_difference_prove_nothing() -> None:
    result = paired_difference([0.5] * 1000, [0.5] * 1000)
    assert result.noninferiority.verdict == "inconclusive"
    assert result.difference.kind == "none"


def test_sample_counts_for_noninferiority() -> None:
    # tasks.md: 1,236 / 3,090 / 6,180 pairs at 2 / 5 / 10 % discordance, margin 1 point, 80 % power.
    for discordance, pairs in ((0.02, 1236), (0.05, 3090), (0.10, 6180)):
        assert pairs_for_noninferiority(discordance=discordance, margin=0.01) == pytest.approx(pairs, abs=4)
    for discordance, margin in ((0.02, 0.025), (0.05, 0.039), (0.10, 0.056)):
        assert pairs_for_noninferiority(discordance=discordance, margin=margin) == pytest.approx(200, rel=0.03)


def test_noninferiority_has_the_promised_power_and_size() -> None:
    draw = np.random.default_rng(5)
    n, margin = 1237, 0.01
    held_nil = held_at_margin = 0
    for _ in range(400):
        lost, won, _ = draw.multinomial(n, [0.01, 0.01, 0.98])
        held_nil += norm.sf(tango_z(lost=lost, won=won, n_pairs=n, difference=-margin)) < 0.05
        lost, won, _ = draw.multinomial(n, [0.015, 0.005, 0.98])
        held_at_margin += norm.sf(tango_z(lost=lost, won=won, n_pairs=n, difference=-margin)) < 0.05
    assert 0.72 < held_nil / 400 < 0.88
    assert held_at_margin / 400 < 0.09


def test_noninferiority_verdicts() -> None:
    assert paired_difference(*scores(0, 0, 5)).noninferiority.verdict == "inconclusive"
    assert paired_difference(*scores(0, 0, 299)).noninferiority.verdict == "non-inferior"
    lost = paired_difference(*scores(30, 0, 70)).noninferiority
    assert (lost.verdict, lost.pairs_needed) == ("inferior", None)
    open_case = paired_difference(*scores(2, 2, 196)).noninferiority
    assert open_case.verdict == "inconclusive"
    assert open_case.pairs_needed == pairs_for_noninferiority(discordance=5 / 202, margin=0.01)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        mean_interval([])
    with pytest.raises(ValueError, match="finite"):
        mean_interval([math.nan])
    with pytest.raises(ValueError, match="pairs are needed"):
        paired_difference([1.0], [1.0, 0.0])


def test_contexts_are_tested_and_not_their_questions() -> None:
    """Six questions of one context are lost: by questions p = .03, and one context proves nothing."""
    names = ["a"] * 6 + [f"c{place}" for place in range(30)]
    found = paired_difference([0.0] * 6 + [1.0] * 30, [1.0] * 36, clusters=names)
    assert (found.lost, found.lost_clusters, found.n_clusters) == (6, 1, 31)
    assert (found.test, found.p_value) == ("exact McNemar by clusters", 1.0)
    assert found.pairs_for_6_discordant is not None
    assert found.difference.kind == "score"
    assert found.difference.low is not None
    assert found.difference.low < -0.15
    assert found.noninferiority.verdict == found.equivalence.verdict == "inconclusive"
    assert found.design_effect > 5
    alone = paired_difference([0.0] * 6 + [1.0] * 30, [1.0] * 36)
    assert (alone.test, alone.design_effect, alone.n_clusters) == ("exact McNemar", 1.0, 36)
    assert alone.p_value == pytest.approx(2 * 0.5**6)


def test_graded_contexts_take_the_sign_of_the_whole() -> None:
    """By questions the method wins more often; by contexts it loses, and that is what the verdict goes by."""
    method, baseline, names = [], [], []
    for place in range(8):
        method += [0.0, 0.6, 0.6]
        baseline += [1.0, 0.5, 0.5]
        names += [f"c{place}"] * 3
    found = paired_difference(method, baseline, clusters=names)
    assert (found.lost, found.won) == (8, 16)
    assert (found.lost_clusters, found.won_clusters, found.test) == (8, 0, "exact sign test by clusters")
    assert found.p_value == pytest.approx(2 * 0.5**8)
    assert found.is_worse


def test_equivalence_verdicts() -> None:
    same = paired_difference(*scores(2, 2, 996)).equivalence
    assert (same.verdict, same.pairs_needed) == ("equivalent", None)
    assert same.p_value == pytest.approx(
        max(norm.sf(tango_z(lost=2, won=2, n_pairs=1000, difference=-0.01)), norm.cdf(
            tango_z(lost=2, won=2, n_pairs=1000, difference=0.01)
        ))
    )  # fmt: skip
    better = paired_difference(*scores(0, 100, 900))
    assert (better.noninferiority.verdict, better.equivalence.verdict) == ("non-inferior", "not equivalent")
    open_case = paired_difference(*scores(2, 2, 196)).equivalence
    assert open_case.verdict == "inconclusive"
    assert open_case.pairs_needed == pairs_for_equivalence(discordance=5 / 202, margin=0.01)
    graded = paired_difference([0.5] * 500 + [0.52, 0.48] * 20, [0.5] * 540)
    assert (graded.equivalence.verdict, graded.equivalence.p_value) == ("equivalent", None)


@pytest.mark.parametrize("n", [7, 900, 6500])
def test_shared_draws_are_draws_of_clusters(n: int) -> None:
    """Spread and mean of the resampled means, by table, by kinds and by indices; cells of as many clusters share."""
    values = np.random.default_rng(n).random(n)
    means = bootstrap_means(values, resamples=2000)
    assert means is not None
    assert means.std() == pytest.approx(values.std() / math.sqrt(n), rel=0.06)
    assert means.mean() == pytest.approx(values.mean(), abs=4 * values.std() / math.sqrt(2000 * n))
    few = bootstrap_means((values > 0.5).astype(float), resamples=2000)
    assert few is not None
    assert few.std() == pytest.approx(0.5 / math.sqrt(n), rel=0.06)
