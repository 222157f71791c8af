"""A DeepSeek-V4 model as the sweep counts with it. No torch."""

from dataclasses import dataclass
from typing import Any

from kvscope.errors import UsageError
from kvscope.methods.compressed_bytes import FLASH_FP8, CompressedShape, stock_shape
from kvscope.methods.compressed_flops import CompressedFlops, step_flops
from kvscope.methods.shape import Footprint, ModelShape

CSA, HCA, SLIDING = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class CompressedModelShape(ModelShape):
    """Cache shape of a model with compressed entries.

    The managed layers are the compressed-sparse (CSA) ones, a page is one entry and its indexer key, and everything
    else (windows, HCA entries, pending tokens) is the model's own: it stays, and it is counted.

    Attributes:
        cache: bytes of every kind.
        step: FLOPs of a decode step of the engine, by part.
        index_heads, index_key_dim: of the model's own indexer.
    """

    cache: CompressedShape
    step: CompressedFlops
    index_heads: int
    index_key_dim: int

    @property
    def indexed_features(self) -> int:
        """The size of an entry's indexer key."""
        return self.index_key_dim

    @property
    def layer_bytes_per_token(self) -> int:
        """Bytes of one token in one CSA layer, rounded up: a share of an entry and its indexer key."""
        return -(-(self.cache.entry_bytes + self.cache.key_bytes) // self.cache.csa_rate)

    def bytes_per_token(self) -> tuple[int, int]:
        """Return the bytes of HCA entries, which always stay, and all, a token; rounded."""
        return round(self.cache.hca_bytes_per_token), round(self.cache.bytes_per_token)

    def paged_kv_bytes(self, n_tokens: int) -> int:
        """Bytes of the whole entries and indexer keys of ``n_tokens`` in every CSA layer: what the mirror holds."""
        entries = n_tokens // self.cache.csa_rate
        return entries * self.cache.n_csa * (self.cache.entry_bytes + self.cache.key_bytes)

    def dense_kv_bytes(self, n_tokens: int, n_new_tokens: int = 0) -> int:
        """Bytes of the whole cache; with steps, the mean over them, CSA entries reserved for all."""
        return self.mean_step(n_tokens, n_new_tokens, n_kept=n_tokens // self.page_tokens).kv_bytes

    def prefill_peak_bytes(self, n_tokens: int, *, chunk_tokens: int) -> int:
        """Estimate device bytes of a token-major prefill besides weights.

        The whole cache, a chunk's attention logits twice (once with the sinks) and their softmax, and the indexer's
        scores in fp32 with and without ReLU.
        """
        chunk, entries = min(chunk_tokens, n_tokens), n_tokens // self.cache.csa_rate
        seen = chunk + self.cache.window_tokens + entries
        scores_bytes = 3 * self.n_q_heads * chunk * seen * self.element_bytes
        return self.dense_kv_bytes(n_tokens) + scores_bytes + 2 * 4 * self.index_heads * chunk * entries

    def mean_step(self, n_tokens: int, n_new_tokens: int, *, n_kept: int) -> Footprint:
        """Return what is held, read and computed by eager steps: their mean, or without steps as opened.

        Args:
            n_tokens: of the prompt.
            n_new_tokens: steps, all of whose entries are reserved at opening.
            n_kept: resident entries of the prompt in every CSA layer.
        """
        rate = self.page_tokens
        before = n_tokens // rate
        n_reserved = n_kept + (n_tokens + n_new_tokens) // rate - before
        total = Footprint()
        for n_total in range(n_tokens + 1, n_tokens + n_new_tokens + 1):
            held = self.cache.by_kind(n_total, n_resident_entries=n_reserved, during_step=True)
            read = self.step_reads(n_total, n_kept + n_total // rate - before)
            total += read + Footprint(kv_bytes=sum(held.values()))
        if n_new_tokens:
            return total.divided_by(n_new_tokens)
        held = self.cache.by_kind(n_tokens, n_resident_entries=n_kept)
        return self.step_reads(n_tokens, n_kept) + Footprint(kv_bytes=sum(held.values()))

    def step_reads(self, n_tokens: int, n_entries: int, *, n_attended: int | None = None) -> Footprint:
        """Return bytes read and FLOPs of a step that made the context ``n_tokens`` long; nothing else is filled in.

        The stock classes score every resident indexer key, then attend over all resident entries with those outside
        the top-k masked: all of them are read. An entry is key and value at once and is counted once.

        Args:
            n_entries: resident in every CSA layer.
            n_attended: of these, read as key and value; None: all, as the stock classes do.
        """
        n_read = n_entries if n_attended is None else n_attended
        cache, hca = self.cache, n_tokens // self.cache.hca_rate
        window = min(n_tokens, cache.window_tokens)
        n_layers = cache.n_csa + cache.n_hca + cache.n_sliding
        attended = n_layers * window + cache.n_csa * n_read + cache.n_hca * hca
        scored = cache.n_csa * n_entries
        return Footprint(
            bytes_read_per_step=cache.windows * window * cache.window_entry_bytes
            + (cache.n_csa * n_read + cache.n_hca * hca) * cache.entry_bytes
            + scored * cache.key_bytes,
            attention_flops_per_step=4 * self.n_q_heads * self.head_dim * attended
            + 2 * self.index_heads * (self.index_key_dim + 1) * scored,
        )


def compressed_model_shape(config: Any, *, element_bytes: int, revision: str = "") -> CompressedModelShape:
    """Return the shape of a ``deepseek_v4`` config.

    Raises:
        UsageError: no compressed-sparse layer, so nothing that a method could leave out.
    """
    kinds = list(config.layer_types)
    if CSA not in kinds:
        name = getattr(config, "name_or_path", "") or config.model_type
        raise UsageError(
            f"Model '{name}' cannot be run: none of its layers is of type {CSA}, whose entries are what a method keeps "
            "or leaves out."
        )
    cache = stock_shape(config, element_bytes=element_bytes)
    return CompressedModelShape(
        layers=tuple(i for i, kind in enumerate(kinds) if kind == CSA),
        n_layers=len(kinds),
        n_q_heads=int(config.num_attention_heads),
        n_kv_heads=1,
        head_dim=int(config.head_dim),
        hidden_size=int(config.hidden_size),
        element_bytes=element_bytes,
        page_tokens=cache.csa_rate,
        revision=revision,
        cache=cache,
        step=step_flops(config),
        index_heads=int(config.index_n_heads),
        index_key_dim=int(config.index_head_dim),
    )


def released_cache(shape: CompressedModelShape) -> CompressedShape | None:
    """Return the cache as the released engine packs it, fp8, windows left out; None for other head sizes."""
    if (shape.head_dim, shape.index_key_dim) != (512, 128):
        return None
    cache = shape.cache
    return CompressedShape(
        n_csa=cache.n_csa, n_hca=cache.n_hca, n_sliding=cache.n_sliding, csa_rate=cache.csa_rate,
        hca_rate=cache.hca_rate, entry_bytes=FLASH_FP8.entry_bytes, key_bytes=FLASH_FP8.key_bytes,
    )  # fmt: skip


def released_bytes_note(shape: CompressedModelShape, n_tokens: int) -> str | None:
    """Return what the released engine's packed fp8 cache would take, marked analytic; None for other head sizes."""
    packed = released_cache(shape)
    if packed is None:
        return None
    total_bytes = sum(packed.by_kind(n_tokens).values())
    return (
        f"bytes are those of the stock transformers classes; the released engine's fp8 entries of "
        f"{packed.entry_bytes} B and keys of {packed.key_bytes} B would take {total_bytes / 1024**2:,.2f} MiB at "
        f"{n_tokens:,} tokens, windows left out (analytic: nothing here runs fp8)."
    )
