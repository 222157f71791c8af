"""The paper's Table 1 (arXiv 2606.09079), and its pruned cache in three accountings. Analytic; no torch."""

from dataclasses import dataclass

from kvscope.harness.backends.deepseek_v4.cache_bytes import FLASH_FP8

N_INDEXED_LAYERS = 3
"""Layers the paper indexes."""


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row of Table 1 of arXiv 2606.09079: accuracies in %, GPU KV in GB as printed, to two digits."""

    name: str
    tokens: int
    dense_percent: float
    dense_gb: float
    lsa_percent: float
    lsa_gb: float
    recency_percent: float
    recency_gb: float
    random_percent: float
    random_gb: float


_K = 1024
_TABLE_1: tuple[tuple[str, int, float, float, float, float, float, float, float, float], ...] = (
    ("LongBench-v2-S", 46 * _K, 68.9, 0.17, 70.2, 0.04, 50.0, 0.03, 53.3, 0.04),
    ("LongBench-v2-M", 179 * _K, 67.6, 0.65, 68.9, 0.08, 54.4, 0.03, 48.9, 0.09),
    ("LongBench-v2-L", 493 * _K, 68.1, 1.80, 70.0, 0.18, 54.3, 0.04, 46.9, 0.22),
    ("LongMemEval-S", 125 * _K, 80.6, 0.46, 82.0, 0.06, 19.2, 0.04, 20.1, 0.07),
    ("LongMemEval-M", 500 * _K, 39.3, 1.82, 40.2, 0.17, 23.1, 0.04, 25.7, 0.22),
    ("RULER", 64 * _K, 94.7, 0.23, 95.0, 0.04, 36.6, 0.03, 52.8, 0.05),
    ("RULER", 128 * _K, 94.3, 0.47, 93.2, 0.06, 21.6, 0.03, 32.3, 0.08),
    ("RULER", 256 * _K, 90.5, 0.94, 88.2, 0.09, 20.6, 0.04, 41.2, 0.12),
    ("RULER", 512 * _K, 88.3, 1.87, 89.6, 0.18, 18.8, 0.04, 27.2, 0.22),
)
TABLE_1 = tuple(
    PaperRow(
        name=name, tokens=tokens, dense_percent=dense, dense_gb=dense_gb, lsa_percent=lsa, lsa_gb=lsa_gb,
        recency_percent=recency, recency_gb=recency_gb, random_percent=drawn, random_gb=random_gb,
    )
    for name, tokens, dense, dense_gb, lsa, lsa_gb, recency, recency_gb, drawn, random_gb in _TABLE_1
)  # fmt: skip


def pruned_fractions(row: PaperRow) -> dict[str, float]:
    """Return the pruned cache over the full one in three accountings, fractions.

    ``printed`` is the ratio of the two printed figures. The other two add, by our derivation, what the printed pruned
    figure seems to leave out: the HCA layers' entries, which are never pruned, and the indexed layers' own keys of the
    whole context, which must stay on the device to be scored.
    """
    dense = FLASH_FP8.bytes_per_token
    hca = FLASH_FP8.hca_bytes_per_token / dense
    keys = N_INDEXED_LAYERS * FLASH_FP8.key_bytes / FLASH_FP8.csa_rate / dense
    printed = row.lsa_gb / row.dense_gb
    return {"printed": printed, "with_hca": printed + hca, "with_hca_and_keys": printed + hca + keys}
