"""Exact tests of paired scores: McNemar's (1947) and the sign test, over pairs or over clusters of pairs.

Questions about one context are answered alike, so that pairs within a cluster are no independent coin tosses. By
clusters, it is the cluster that is tossed: if both methods are alike, every cluster's balance (won minus lost) has
either sign with equal chance (Fisher 1935, randomisation by sign). With one pair a cluster this is the ordinary test.
"""

import numpy as np
import numpy.typing as npt

from kvscope.results.distributions import coin_chances, coin_p_value

Array = npt.NDArray[np.float64]

NIL = 1e-9
"""What a balance of graded scores may be off nil by rounding."""


def sign_test(balances: Array) -> float:
    """Two-sided p of as many clusters above and below nil as there are, however large their balances."""
    lost, won = int((balances < -NIL).sum()), int((balances > NIL).sum())
    return coin_p_value(lost, won)


def mcnemar_test(balances: Array) -> float:
    """Two-sided p of McNemar's exact test over clusters.

    Args:
        balances: pairs won minus pairs lost of each cluster; whole numbers.

    The statistic is the sum of the balances. Its distribution over all signs is worked out, not drawn.
    """
    sizes, counts = np.unique(np.abs(balances[balances != 0]).astype(np.int64), return_counts=True)
    if len(sizes) < 2:
        return sign_test(balances)
    from scipy.signal import convolve

    most = int(sizes @ counts)
    seen = (abs(int(balances.sum())) + most) // 2
    # What the clusters of positive sign add up to: `most` less that is what the others do.
    chance = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        spread = np.zeros(size * count + 1)
        spread[::size] = coin_chances(int(count))
        chance = convolve(chance, spread)
    least = 0.5 ** (int(counts.sum()) - 1)
    return float(np.clip(2 * chance[seen:].sum(), least, 1.0))
