"""Bytes of a DeepSeek-V4 cache by kind, and the paper's Table 1 from them. No torch.

DeepSeek-V4 keeps, for each layer, a window of the last tokens; compressed-sparse (CSA) layers one entry and one indexer
key for every 4 tokens; heavily compressed (HCA) layers one entry for every 128. Element sizes are parameters: the stock
transformers classes store the model's dtype, the released engine packs an entry into 584 bytes and a key into 132
(fp8). What is computed from the latter is analytic: nothing here runs fp8.
"""

from dataclasses import dataclass
from typing import Any

GIB = 2**30
KINDS = ("csa_kv", "indexer_keys", "hca_kv", "window", "buffers")


@dataclass(frozen=True, kw_only=True)
class CompressedShape:
    """Cache shape of a DeepSeek-V4 model.

    Attributes:
        n_csa, n_hca, n_sliding: layers of each kind (the last have a window only).
        csa_rate, hca_rate: tokens an entry.
        window_tokens: the sliding window, the current token included.
        entry_bytes: of one compressed entry, which is key and value at once.
        key_bytes: of one indexer key.
        window_entry_bytes: of one token in the window.
        pending_bytes: of one token that waits for its entry in a CSA layer (both series, gates, the indexer's too).
        hca_pending_bytes: the same in an HCA layer.
        overlap_bytes: what a CSA layer carries over from its last whole window.
    """

    n_csa: int
    n_hca: int
    n_sliding: int
    csa_rate: int = 4
    hca_rate: int = 128
    window_tokens: int = 128
    entry_bytes: int
    key_bytes: int
    window_entry_bytes: int = 0
    pending_bytes: int = 0
    hca_pending_bytes: int = 0
    overlap_bytes: int = 0

    @property
    def windows(self) -> int:
        """Tensors of window entries: one a compressed layer, key and value at once; two in the stock sliding layers."""
        return self.n_csa + self.n_hca + 2 * self.n_sliding

    @property
    def bytes_per_token(self) -> float:
        """Growth of the cache with the context."""
        return self.csa_bytes_per_token + self.key_bytes_per_token + self.hca_bytes_per_token

    @property
    def csa_bytes_per_token(self) -> float:
        """Of the CSA layers' entries."""
        return self.n_csa * self.entry_bytes / self.csa_rate

    @property
    def key_bytes_per_token(self) -> float:
        """Of the CSA layers' indexer keys."""
        return self.n_csa * self.key_bytes / self.csa_rate

    @property
    def hca_bytes_per_token(self) -> float:
        """Of the HCA layers' entries."""
        return self.n_hca * self.entry_bytes / self.hca_rate

    def by_kind(
        self, n_tokens: int, *, n_resident_entries: int | None = None, during_step: bool = False
    ) -> dict[str, int]:
        """Return device bytes by kind after ``n_tokens``.

        Args:
            n_resident_entries: entries on the device in every CSA layer; None: all.
            during_step: just behind a decode step, whose tensors live on until the next one: the window holds the
                token just written, and pending tokens that have just become an entry are still there.
        """

        entries = n_tokens // self.csa_rate if n_resident_entries is None else n_resident_entries
        held = min(n_tokens, self.window_tokens if during_step else self.window_tokens - 1)
        overlap = self.overlap_bytes if n_tokens >= self.csa_rate else 0
        pending, hca_pending = n_tokens % self.csa_rate, n_tokens % self.hca_rate
        if during_step:
            pending, hca_pending = pending or self.csa_rate, hca_pending or self.hca_rate
        return {
            "csa_kv": self.n_csa * entries * self.entry_bytes,
            "indexer_keys": self.n_csa * entries * self.key_bytes,
            "hca_kv": self.n_hca * (n_tokens // self.hca_rate) * self.entry_bytes,
            "window": self.windows * held * self.window_entry_bytes,
            "buffers": self.n_csa * (pending * self.pending_bytes + overlap)
            + self.n_hca * hca_pending * self.hca_pending_bytes,
        }


def stock_shape(config: Any, *, element_bytes: int) -> CompressedShape:
    """Return the shape the stock transformers cache has for a configuration.

    Args:
        element_bytes: of the model's dtype. The gates' carried-over window is fp32 in any: its bias is.
    """
    kinds = list(config.layer_types)
    D, E = config.head_dim, config.index_head_dim
    csa_rate = config.compress_rates["compressed_sparse_attention"]
    return CompressedShape(
        n_csa=kinds.count("compressed_sparse_attention"),
        n_hca=kinds.count("heavily_compressed_attention"),
        n_sliding=kinds.count("sliding_attention"),
        csa_rate=csa_rate,
        hca_rate=config.compress_rates["heavily_compressed_attention"],
        window_tokens=config.sliding_window,
        entry_bytes=D * element_bytes,
        key_bytes=E * element_bytes,
        window_entry_bytes=D * element_bytes,
        pending_bytes=4 * (D + E) * element_bytes,
        hca_pending_bytes=2 * D * element_bytes,
        overlap_bytes=csa_rate * (D + E) * (element_bytes + 4),
    )


FLASH_FP8 = CompressedShape(n_csa=21, n_hca=20, n_sliding=2, entry_bytes=584, key_bytes=132)
"""DeepSeek-V4-Flash as released, analytic. Its two other layers have a fixed window, not in the paper's figures."""

FLASH_BF16 = CompressedShape(n_csa=21, n_hca=20, n_sliding=2, entry_bytes=512 * 2, key_bytes=128 * 2)
"""The same model in the stock transformers classes."""

N_INDEXED_LAYERS = 3


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


def mean_fractions() -> dict[str, float]:
    """Return the nine-row mean of each accounting: 13.1 %, 15.4 % and 18.0 % where the paper says 13.5 %."""
    rows = [pruned_fractions(row) for row in TABLE_1]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
