"""What is computed without scipy.stats and statsmodels is what they compute."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm, t
from statsmodels.stats.proportion import proportion_confint

from kvscope.results.distributions import (
    coin_chances,
    coin_p_value,
    normal_cdf,
    normal_quantile,
    normal_sf,
    student_quantile,
    wilson_ends,
)


def test_normal_and_students_t_are_scipys_to_the_bit() -> None:
    for z in (-np.inf, -40.0, -8.3, -1.96, 0.0, 0.3, 5.5, np.inf):
        assert (normal_cdf(z), normal_sf(z)) == (norm.cdf(z), norm.sf(z))
    for chance in (0.0, 1e-12, 0.025, 0.5, 0.8, 0.975, 1.0):
        assert normal_quantile(chance) == norm.ppf(chance)
    for degrees in (1, 2, 7, 399):
        assert student_quantile(0.025, degrees) == t.ppf(0.025, degrees)


@pytest.mark.parametrize("n", [1, 2, 5, 40, 301, 3000])
def test_coins(n: int) -> None:
    assert coin_chances(n) == pytest.approx(binom.pmf(np.arange(n + 1), n, 0.5), rel=1e-11, abs=1e-300)
    for heads in sorted({0, 1, n // 3, n // 2, n // 2 + 1, n - 1, n} & set(range(n + 1))):
        assert coin_p_value(heads, n - heads) == pytest.approx(binomtest(heads, n).pvalue, rel=1e-10, abs=1e-300)


def test_no_coin_tossed_tells_nothing() -> None:
    assert coin_p_value(0, 0) == 1.0
    assert coin_chances(0).tolist() == [1.0]


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 10), (10, 10), (3, 10), (2.5, 7), (299, 300), (9e5, 1e6)])
def test_wilson(right: float, n: int, confidence: float) -> None:
    low, high = proportion_confint(right, n, alpha=1 - confidence, method="wilson")
    assert wilson_ends(right, n, confidence) == pytest.approx((max(0.0, low), min(1.0, high)), rel=1e-13, abs=1e-15)
