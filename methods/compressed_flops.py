"""FLOPs of one decode step of a DeepSeek-V4 by part, from its configuration alone. Analytic; no torch.

A multiply-add is two FLOPs. Counted are matrix products: norms, softmax, rotations and the mixing of residual streams'
coefficients are left out. The engine's step is meant, which attends to the indexer's top-k entries; the stock
transformers classes attend to all resident ones under a mask.
"""

from dataclasses import dataclass
from typing import Any

from kvscope.methods.compressed_bytes import CompressedShape

PARTS = ("weights", "indexer", "csa_attention", "hca_attention", "window_attention")


@dataclass(frozen=True, kw_only=True)
class CompressedFlops:
    """What a decode step of a DeepSeek-V4 computes.

    Attributes:
        n_weights: weights that one token is multiplied with, its experts' alone.
        n_heads, head_dim: of attention; an entry is key and value at once.
        index_heads, index_key_dim: of the model's own indexer.
        top_k: entries a compressed-sparse (CSA) layer attends to.
    """

    n_weights: int
    n_heads: int
    head_dim: int
    index_heads: int
    index_key_dim: int
    top_k: int

    @property
    def scored_entry_flops(self) -> int:
        """FLOPs of one entry's score in one CSA layer: products of all heads and their weighted sum."""
        return scored_entry_flops(heads=self.index_heads, key_dim=self.index_key_dim)

    def by_part(
        self, cache: CompressedShape, n_tokens: int, *, n_resident_entries: int | None = None
    ) -> dict[str, int]:
        """Return FLOPs by part of the step after ``n_tokens``.

        Args:
            cache: layers, rates and window.
            n_resident_entries: entries on the device in every CSA layer, which its indexer scores; None: all.
        """
        entries = n_tokens // cache.csa_rate if n_resident_entries is None else n_resident_entries
        attended_entry = 4 * self.n_heads * self.head_dim
        n_layers = cache.n_csa + cache.n_hca + cache.n_sliding
        return {
            "weights": 2 * self.n_weights,
            "indexer": cache.n_csa * entries * self.scored_entry_flops,
            "csa_attention": cache.n_csa * min(entries, self.top_k) * attended_entry,
            "hca_attention": cache.n_hca * (n_tokens // cache.hca_rate) * attended_entry,
            "window_attention": n_layers * min(n_tokens, cache.window_tokens) * attended_entry,
        }


def scored_entry_flops(*, heads: int, key_dim: int) -> int:
    """FLOPs of one score: ``heads`` products with a key of ``key_dim`` numbers, and their weighted sum."""
    return 2 * heads * (key_dim + 1)


def refresh_flops(*, n_weights: int, heads: int, key_dim: int, n_entries: int) -> int:
    """FLOPs of one refresh of a lookahead indexer in one layer.

    Args:
        n_weights: of its projections.
        heads, key_dim: of its queries, which a Hadamard transform turns.
        n_entries: scored.
    """
    turns = heads * key_dim * (key_dim.bit_length() - 1)
    return 2 * n_weights + turns + n_entries * scored_entry_flops(heads=heads, key_dim=key_dim)


def step_flops(config: Any) -> CompressedFlops:
    """Return what a decode step of a ``deepseek_v4`` configuration computes."""
    kinds = list(config.layer_types)
    M, D, H = config.hidden_size, config.head_dim, config.num_attention_heads
    R, E, heads = config.q_lora_rank, config.index_head_dim, config.index_n_heads
    # Query (down, up), key-value, and the output's block-diagonal and mixing projections.
    attention = M * R + R * H * D + M * D + H * D * config.o_lora_rank + config.o_groups * config.o_lora_rank * M
    experts = 3 * M * config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    # Two mixings of `hc_mult` residual streams a layer, each with their coefficients from all streams.
    mixing = 2 * config.hc_mult * M * (config.hc_mult**2 + 2 * config.hc_mult)
    # Entries come of two overlapping series in CSA layers, of one in the others; each has values and gates.
    csa = 4 * M * (D + E) + R * heads * E + M * heads
    hca = 2 * M * D
    layer = attention + experts + M * config.n_routed_experts + mixing
    n_weights = (
        len(kinds) * layer
        + kinds.count("compressed_sparse_attention") * csa
        + kinds.count("heavily_compressed_attention") * hca
        + config.hc_mult**2 * M
        + M * config.vocab_size
    )
    return CompressedFlops(
        n_weights=n_weights, n_heads=H, head_dim=D, index_heads=heads, index_key_dim=E, top_k=config.index_topk
    )
