"""The bootstrap of a mean (Efron 1979), over values or over clusters of them.

Ends are percentiles of the resampled means, at levels that are widened for few clusters (the "expanded percentile" of
Hesterberg 2015, What Teachers Should Know About the Bootstrap): n clusters resample as if they were the population,
which is too narrow by sqrt((n - 1) / n), and their spread is itself an estimate, so Student's t belongs in place of the
normal. From a few hundred clusters on, that is nothing.

A report asks for the interval of the same values again and again, in tables, figures and both tests of a difference,
and the draws are the same each time: ends are kept by what was resampled. Draws depend on the number of clusters alone,
so cells of as many clusters share them.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvscope.results.distributions import normal_cdf, student_quantile

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.uint16]

RESAMPLES = 10_000
MOST_SHARED = 6000
"""Clusters of which draws are shared: a table of them takes 2 bytes a cluster and resample."""
_MOST_TABLE_BYTES = 192 * 2**20
_CHUNK_DRAWS = 4_000_000
_CACHED_DRAWS = 1 << 16
"""Indices drawn at a time: they and what they pick stay in the processor's cache."""
_FEW_KINDS = 64
_MOST_KEPT = 32_768


def bootstrap_ends(sums: Array, sizes: Array | None, confidence: float) -> tuple[float, float] | None:
    """Ends of the interval of a mean; None when there are fewer than two clusters to resample.

    Args:
        sums, sizes: of the clusters, as `cluster_totals` gives them.
    """
    if len(sums) < 2:
        return None
    kinds, counts = _kinds(sums, sizes)
    return _ends(kinds.tobytes(), counts.tobytes(), confidence)


def bootstrap_means(
    values: Array, *, clusters: Sequence[str] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Array | None:
    """Means of `resamples` resamples, or None when there are fewer than two clusters (nothing to resample).

    Clusters with equal sum and size are interchangeable, so a resample is one multinomial draw over the distinct ones:
    the same distribution as drawing indices, and cheap for scores that take few values.
    """
    sums, sizes = cluster_totals(values, clusters)
    if len(sums) < 2:
        return None
    kinds, counts = _kinds(sums, sizes)
    return _means(kinds, counts, resamples=resamples, seed=seed)


def cluster_totals(values: Array, clusters: Sequence[str] | None) -> tuple[Array, Array | None]:
    """Sum and size of every cluster; sizes are None where each holds one value."""
    if clusters is None or len(places := dict.fromkeys(clusters)) == len(clusters):
        return values, None
    numbers = dict(zip(places, range(len(places)), strict=True))
    which = np.fromiter(map(numbers.__getitem__, clusters), dtype=np.intp, count=len(clusters))
    sums: Array = np.bincount(which, weights=values).astype(np.float64)
    sizes: Array = np.bincount(which).astype(np.float64)
    return sums, sizes


@lru_cache(maxsize=_MOST_KEPT)
def expanded_level(confidence: float, n_clusters: int) -> float:
    """Return the lower percentile, as a fraction, whose interval covers `confidence` with so few clusters."""
    n = n_clusters
    return normal_cdf(math.sqrt(n / (n - 1)) * student_quantile((1 - confidence) / 2, n - 1))


@lru_cache(maxsize=_MOST_KEPT)
def _ends(kinds: bytes, counts: bytes, confidence: float) -> tuple[float, float]:
    means = _drawn(kinds, counts)
    level = expanded_level(confidence, int(np.frombuffer(counts, dtype=np.int64).sum()))
    low, high = np.quantile(means, [level, 1 - level])
    return float(low), float(high)


# Both tests of a difference, one after the other, rest on the same draws.
@lru_cache(maxsize=2)
def _drawn(kinds: bytes, counts: bytes) -> Array:
    pairs = np.frombuffer(kinds, dtype=np.float64).reshape(-1, 2)
    return _means(pairs, np.frombuffer(counts, dtype=np.int64), resamples=RESAMPLES, seed=0)


def _means(kinds: Array, counts: npt.NDArray[np.int64], *, resamples: int, seed: int) -> Array:
    """Means of resamples of clusters of which `counts` are alike in (sum, size)."""
    n = int(counts.sum())
    if n <= MOST_SHARED:
        return _means_by_table(_tables.of(n, resamples=resamples, seed=seed), kinds, counts)
    if len(kinds) <= _FEW_KINDS:
        return _means_of_few(kinds, counts, resamples=resamples, seed=seed)
    return _means_of_many(np.repeat(kinds, counts, axis=0), resamples=resamples, seed=seed)


class _Tables:
    """Tables of draws by number of clusters, the latest kept up to a number of bytes."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, int], Counts] = {}

    def of(self, n: int, *, resamples: int, seed: int) -> Counts:
        """Return how many of n draws are below each place: [n + 1, resamples]."""
        key = n, resamples, seed
        table = self._kept.pop(key, None)
        self._kept[key] = table = _draw_table(n, resamples=resamples, seed=seed) if table is None else table
        while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > _MOST_TABLE_BYTES:
            self._kept.pop(next(iter(self._kept)))
        return table


_tables = _Tables()


def _draw_table(n: int, *, resamples: int, seed: int) -> Counts:
    draw = np.random.default_rng(seed)
    table = np.zeros((n + 1, resamples), dtype=np.uint16)
    chunk = max(1, _CACHED_DRAWS // n)
    first = np.arange(0, chunk * n, n)[:, None]
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        places = draw.integers(n, size=(size, n), dtype=np.uint16) + first[:size]
        counts = np.bincount(places.ravel(), minlength=n * size).reshape(size, n)
        table[1:, start : start + size] = counts.cumsum(axis=1, dtype=np.uint16).T
    return table


def _means_by_table(table: Counts, kinds: Array, counts: npt.NDArray[np.int64]) -> Array:
    """Means by draws of places: clusters of a kind lie side by side, and the table says how many draws fell there."""
    bounds = np.concatenate([[0], counts.cumsum()])
    means = np.empty(table.shape[1])
    chunk = max(1, _CACHED_DRAWS // len(kinds))
    for start in range(0, table.shape[1], chunk):
        below = table[bounds, start : start + chunk].astype(np.float64)
        picked = below[1:] - below[:-1]
        means[start : start + chunk] = (kinds[:, 0] @ picked) / (kinds[:, 1] @ picked)
    return means


def _means_of_few(kinds: Array, counts: npt.NDArray[np.int64], *, resamples: int, seed: int) -> Array:
    """Means by multinomial draws of (sum, size) of clusters, `counts` of them alike."""
    n = int(counts.sum())
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, _CHUNK_DRAWS // n)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        picks = draw.multinomial(n, counts / n, size=size)
        means[start : start + size] = (picks @ kinds[:, 0]) / (picks @ kinds[:, 1])
    return means


def _means_of_many(clusters: Array, *, resamples: int, seed: int) -> Array:
    """Means by draws of clusters, each a (sum, size)."""
    n = len(clusters)
    sums, sizes = np.ascontiguousarray(clusters[:, 0]), np.ascontiguousarray(clusters[:, 1])
    even = bool((sizes == sizes[0]).all())  # a resample's size needs no drawing
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, _CACHED_DRAWS // n)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        picks = draw.integers(n, size=(size, n))
        held = n * sizes[0] if even else sizes[picks].sum(axis=1)
        means[start : start + size] = sums[picks].sum(axis=1) / held
    return means


def _kinds(sums: Array, sizes: Array | None) -> tuple[Array, npt.NDArray[np.int64]]:
    """The different (sum, size) of clusters, and how many clusters have each."""
    # As complex numbers they are sorted by both parts, and faster than as rows.
    pairs = sums + 1j * (np.ones_like(sums) if sizes is None else sizes)
    different, counts = np.unique(pairs, return_counts=True)
    return np.stack([different.real, different.imag], axis=1), counts.astype(np.int64)
