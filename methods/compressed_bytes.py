"""Bytes of a DeepSeek-V4 cache by kind. No torch.

DeepSeek-V4 keeps, for each layer, a window of the last tokens; compressed-sparse (CSA) layers one entry and one indexer
key for every 4 tokens; heavily compressed (HCA) layers one entry for every 128. Element sizes are parameters: the stock
transformers classes store the model's dtype, the released engine packs an entry into 584 bytes and a key into 132
(fp8). What is computed from the latter is analytic: nothing here runs fp8.
"""

from dataclasses import dataclass
from typing import Any

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
