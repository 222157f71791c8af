"""GRIM: which printed percentages a count of right answers can give (Brown and Heathers 2017).

A mean of n scores of 0 or 1 is k / n. Printed to few digits and with few questions, many percentages are none.
"""

import math


def can_be_a_count(percent: float, *, n: int, digits: int = 1) -> bool:
    """Whether some k of n, in %, rounds to ``percent``; a half may have been rounded either way."""
    half = 0.5 * 10.0**-digits
    return any(abs(100 * k / n - percent) <= half + 1e-9 for k in counts_around(percent, n=n))


def counts_around(percent: float, *, n: int) -> tuple[int, int]:
    """Return the counts of n right below and above a percentage; the same twice where it is one.

    Raises:
        ValueError: no percentage, or no questions.
    """
    if n < 1 or not 0 <= percent <= 100:
        raise ValueError(f"{percent} % of {n} questions is no accuracy")
    exact = percent * n / 100
    near = round(exact)
    return (near, near) if math.isclose(exact, near, abs_tol=1e-9) else (math.floor(exact), math.ceil(exact))
