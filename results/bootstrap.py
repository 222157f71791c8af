"""The percentile bootstrap of a mean (Efron 1979), over values or over clusters of them.

A report asks for the interval of the same values again and again, in tables, figures and both tests of a difference,
and the draws are the same each time: ends are kept by what was resampled.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RESAMPLES = 10_000
_CHUNK_DRAWS = 4_000_000
_CACHED_DRAWS = 1 << 16
"""Indices drawn at a time: they and what they pick stay in the processor's cache."""
_FEW_KINDS = 64
_MOST_KEPT = 32_768


def bootstrap_ends(values: Array, clusters: Sequence[str] | None, confidence: float) -> tuple[float, float] | None:
    """Ends of the interval of the mean of `values`; None when there are fewer than two clusters to resample."""
    sums, sizes = _cluster_totals(values, clusters)
    if len(sums) < 2:
        return None
    kinds, counts = _kinds(sums, sizes)
    if len(kinds) <= _FEW_KINDS:
        return _ends_of_few(kinds.tobytes(), counts.tobytes(), confidence)
    return _ends_of_many(sums.tobytes(), None if sizes is None else sizes.tobytes(), confidence)


def bootstrap_means(
    values: Array, *, clusters: Sequence[str] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Array | None:
    """Means of `resamples` resamples, or None when there are fewer than two clusters (nothing to resample).

    Clusters with equal sum and size are interchangeable, so a resample is one multinomial draw over the distinct ones:
    the same distribution as drawing indices, and cheap for scores that take few values.
    """
    sums, sizes = _cluster_totals(values, clusters)
    if len(sums) < 2:
        return None
    kinds, counts = _kinds(sums, sizes)
    if len(kinds) <= _FEW_KINDS:
        return _means_of_few(kinds, counts, resamples=resamples, seed=seed)
    return _means_of_many(sums, sizes, resamples=resamples, seed=seed)


def shared(clusters: Sequence[str] | None) -> bool:
    """Whether some values share a cluster."""
    return clusters is not None and len(set(clusters)) < len(clusters)


@lru_cache(maxsize=_MOST_KEPT)
def _ends_of_few(kinds: bytes, counts: bytes, confidence: float) -> tuple[float, float]:
    return _quantiles(_drawn_of_few(kinds, counts), confidence)


@lru_cache(maxsize=_MOST_KEPT)
def _ends_of_many(sums: bytes, sizes: bytes | None, confidence: float) -> tuple[float, float]:
    return _quantiles(_drawn_of_many(sums, sizes), confidence)


# Both tests of a difference, one after the other, rest on the same draws.
@lru_cache(maxsize=2)
def _drawn_of_few(kinds: bytes, counts: bytes) -> Array:
    pairs = np.frombuffer(kinds, dtype=np.float64).reshape(-1, 2)
    return _means_of_few(pairs, np.frombuffer(counts, dtype=np.int64), resamples=RESAMPLES, seed=0)


@lru_cache(maxsize=2)
def _drawn_of_many(sums: bytes, sizes: bytes | None) -> Array:
    totals = None if sizes is None else np.frombuffer(sizes, dtype=np.float64)
    return _means_of_many(np.frombuffer(sums, dtype=np.float64), totals, resamples=RESAMPLES, seed=0)


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


def _means_of_many(sums: Array, sizes: Array | None, *, resamples: int, seed: int) -> Array:
    """Means by draws of clusters; where each holds one value (`sizes` None) a resample's size needs no drawing."""
    n = len(sums)
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, _CACHED_DRAWS // n)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        picks = draw.integers(n, size=(size, n))
        held = n if sizes is None else sizes[picks].sum(axis=1)
        means[start : start + size] = sums[picks].sum(axis=1) / held
    return means


def _kinds(sums: Array, sizes: Array | None) -> tuple[Array, npt.NDArray[np.int64]]:
    """The different (sum, size) of clusters, and how many clusters have each."""
    if sizes is None:
        different, counts = np.unique(sums, return_counts=True)
        return np.stack([different, np.ones_like(different)], axis=1), counts.astype(np.int64)
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    return kinds, counts.astype(np.int64)


def _cluster_totals(values: Array, clusters: Sequence[str] | None) -> tuple[Array, Array | None]:
    """Sum and size of every cluster; sizes are None where each holds one value."""
    if not shared(clusters):
        return values, None
    _, which = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums: Array = np.bincount(which, weights=values).astype(np.float64)
    sizes: Array = np.bincount(which).astype(np.float64)
    return sums, sizes


def _quantiles(means: Array, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
