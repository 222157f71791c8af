"""Pairs that tests need, their power, and what clusters take of it."""

import numpy as np
import pytest
from statsmodels.stats.power import NormalIndPower

from kvscope.results.bootstrap import cluster_totals
from kvscope.results.power import (
    design_effect,
    noninferiority_power,
    pairs_for_difference,
    pairs_for_equivalence,
    pairs_for_noninferiority,
)


def test_what_shows_the_papers_gain() -> None:
    """About 21,800 pairs show 0.6 points where 90 % agree; about 6,200 and 1,550 hold a margin of 1 and 2 points."""
    assert pairs_for_difference(discordance=0.1, difference=0.006) == pytest.approx(21_800, rel=1e-3)
    assert pairs_for_noninferiority(discordance=0.1, margin=0.01) == pytest.approx(6_180, abs=4)
    assert pairs_for_noninferiority(discordance=0.1, margin=0.02) == pytest.approx(1_546, abs=2)


def test_pairs_of_a_difference_are_those_of_a_z_test() -> None:
    """One group of paired differences with variance d - difference^2, against nil."""
    discordance, difference = 0.1, 0.02
    effect = difference / (discordance - difference**2) ** 0.5
    found = NormalIndPower(ddof=0).solve_power(effect, alpha=0.05, power=0.8, ratio=0)
    assert pairs_for_difference(discordance=discordance, difference=difference) == pytest.approx(found, rel=1e-3)


def test_equivalence_needs_more_and_power_is_the_inverse() -> None:
    needed = pairs_for_noninferiority(discordance=0.05, margin=0.01)
    assert noninferiority_power(n_pairs=needed, discordance=0.05, margin=0.01) == pytest.approx(0.8, abs=1e-3)
    assert pairs_for_equivalence(discordance=0.05, margin=0.01) > needed
    assert noninferiority_power(n_pairs=needed, discordance=0.05, margin=0.01, design_effect=2) < 0.6
    assert pairs_for_noninferiority(discordance=0.05, margin=0.01, design_effect=2) == pytest.approx(2 * needed, abs=2)
    assert noninferiority_power(n_pairs=10, discordance=0.0, margin=0.01) == 1.0


@pytest.mark.parametrize("difference", [0.0, 0.2, -0.2])
def test_a_difference_that_cannot_be_is_refused(difference: float) -> None:
    with pytest.raises(ValueError, match="no paired difference"):
        pairs_for_difference(discordance=0.1, difference=difference)


def test_contexts_of_equal_answers_count_once() -> None:
    values = np.random.default_rng(2).random(200)
    alone = cluster_totals(values, None)
    assert design_effect(values, *alone) == 1.0
    repeated, names = values.repeat(5), [f"c{place // 5}" for place in range(1000)]
    assert design_effect(repeated, *cluster_totals(repeated, names)) == pytest.approx(5, rel=0.01)
    mixed = np.tile([0.0, 1.0], 500)  # every context half right: better than alone, and never planned with
    assert design_effect(mixed, *cluster_totals(mixed, [f"c{place // 4}" for place in range(1000)])) == 1.0
    assert design_effect(np.ones(4), *cluster_totals(np.ones(4), ["a", "a", "b", "b"])) == 1.0
