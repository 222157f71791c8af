"""The numbers of a model that a cache method needs, and byte counts. Torch is not imported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from kvscope.methods.kv_format import KvFormat, PagePacking, residual_pages

if TYPE_CHECKING:
    import torch

DEFAULT_PAGE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Attention shape of a decoder-only model, as far as its KV cache is concerned.

    Attributes:
        layers: indices of the full-attention layers, whose KV a method manages.
        n_layers: all decoder layers.
        n_q_heads, n_kv_heads, head_dim: heads of one managed layer (the same in each). V is padded with zeros to the
            width of K where it is narrower: a page has one width.
        v_head_dim: width of V in the model itself; 0 where it is head_dim.
        hidden_size: width of the hidden states.
        element_bytes: bytes of one stored KV element.
        page_tokens: tokens in one page [n_kv_heads, 2, page_tokens, head_dim].
        sliding_layers: indices of the model's own sliding-window layers; they keep their stock cache.
        sliding_window: tokens one query of such a layer sees, itself included; 0 without such layers.
        sliding_n_q_heads, sliding_n_kv_heads: heads of such a layer; 0 where they are those of the managed layers.
        sliding_kv_width: elements of K and V of one of its heads together; 0 where they are 2 * head_dim.
        unknown_rotation_layers: layers whose position encoding was measured at load and is not a rotation
            that can be undone; a method that re-places keys is unsupported there.
        revision: identity of the weights, which trained parts of a method name; empty when unknown.
        kv: format of packed pages; None: K and V are stored as they are. A method's ``stored`` sets it.
        devices: of every decoder layer, as ``cuda:1``, where a model is on several; empty: all of it is on the one that
            its sequences are opened on.
    """

    layers: tuple[int, ...]
    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    element_bytes: int
    page_tokens: int = DEFAULT_PAGE_TOKENS
    sliding_layers: tuple[int, ...] = ()
    sliding_window: int = 0
    v_head_dim: int = 0
    sliding_n_q_heads: int = 0
    sliding_n_kv_heads: int = 0
    sliding_kv_width: int = 0
    unknown_rotation_layers: tuple[int, ...] = ()
    revision: str = ""
    kv: KvFormat | None = None
    devices: tuple[str, ...] = ()

    def device_of(self, layer: int, device: torch.device) -> torch.device:
        """Return where a decoder layer is, and so what is kept of it.

        Args:
            device: that a sequence is opened on: where tokens go in and logits come out.
        """
        if not self.devices:
            return device
        import torch

        return torch.device(self.devices[layer])

    @property
    def layer_bytes_per_token(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return 2 * self.n_kv_heads * self.head_dim * self.element_bytes

    @property
    def padded_share(self) -> float:
        """Bytes of a token in a managed layer over those of K and V as wide as the model's own: 1 without padding."""
        return 2 * self.head_dim / (self.head_dim + (self.v_head_dim or self.head_dim))

    @property
    def sliding_is_uniform(self) -> bool:
        """Whether a sliding-window layer has the heads and widths of a managed one."""
        own = (self.sliding_n_kv_heads or self.n_kv_heads, self.sliding_kv_width or 2 * self.head_dim)
        return own == (self.n_kv_heads, 2 * self.head_dim)

    @property
    def sliding_layer_bytes_per_token(self) -> int:
        """Bytes of one token's K and V in one sliding-window layer."""
        n_heads = self.sliding_n_kv_heads or self.n_kv_heads
        return n_heads * (self.sliding_kv_width or 2 * self.head_dim) * self.element_bytes

    @property
    def indexed_features(self) -> int:
        """Numbers of what a trained indexer reads of a layer's memory: a token's keys over its heads."""
        return self.n_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's K and V over all managed layers."""
        return len(self.layers) * self.layer_bytes_per_token

    def bytes_per_token(self) -> tuple[int, int]:
        """Return the bytes by which a token lets the cache grow: those that no method leaves out, and all of them."""
        return 0, self.kv_bytes_per_token

    def pages(self, n_tokens: int) -> int:
        """Pages that hold ``n_tokens``."""
        return -(-n_tokens // self.page_tokens)

    def paged_kv_bytes(self, n_tokens: int) -> int:
        """Bytes of the whole pages that hold ``n_tokens`` in every managed layer; of packed ones, the residual's too.

        Raw pages of no tokens take nothing; packed ones keep room for the residual, at addresses that stay.
        """
        return len(self.layers) * self.layer_paged_bytes(n_tokens)

    def layer_paged_bytes(self, n_tokens: int) -> int:
        """``paged_kv_bytes`` of one layer."""
        page_bytes = self.page_tokens * self.layer_bytes_per_token
        if self.kv is None:
            return self.pages(n_tokens) * page_bytes
        packed_bytes = self.packed_pages(n_tokens) * self.packed_bytes(self.page_tokens)
        return packed_bytes + residual_pages(self.page_tokens) * page_bytes

    def packed_pages(self, n_tokens: int) -> int:
        """Pages of a store of ``n_tokens`` that are packed; the newest ones are the residual."""
        return max(0, self.pages(n_tokens) - residual_pages(self.page_tokens))

    def packed_bytes(self, n_tokens: int, *, unit_tokens: int | None = None) -> int:
        """Bytes of ``n_tokens`` in one layer where all of them are packed (raw ones without ``kv``), no residual.

        Args:
            unit_tokens: tokens of a packed page, where it is not ``page_tokens``; ``n_tokens`` are whole pages.
        """
        if self.kv is None:
            return n_tokens * self.layer_bytes_per_token
        unit = unit_tokens or self.page_tokens
        return -(-n_tokens // unit) * self.n_kv_heads * self.packing(unit).record_bytes

    def packing(self, page_tokens: int | None = None) -> PagePacking:
        """Return how a page of one KV head is packed.

        Raises:
            ValueError: nothing is packed.
        """
        if self.kv is None:
            raise ValueError("K and V are stored as they are")
        return PagePacking(self.kv, page_tokens or self.page_tokens, self.head_dim)

    def token_capacity(self, budget_bytes: int) -> int:
        """Return the most tokens, in whole pages, whose ``paged_kv_bytes`` a budget holds; 0 where it holds no page."""
        page_bytes = len(self.layers) * self.page_tokens * self.layer_bytes_per_token
        if self.kv is None:
            return budget_bytes // page_bytes * self.page_tokens
        n_residual = residual_pages(self.page_tokens)
        left_bytes = budget_bytes - n_residual * page_bytes
        if left_bytes < 0:
            return 0
        n_packed = left_bytes // (len(self.layers) * self.packed_bytes(self.page_tokens))
        return (n_packed + n_residual) * self.page_tokens

    def stock_kv_bytes(self, n_tokens: int, n_new_tokens: int = 0) -> int:
        """Bytes of the model's own sliding-window layers after ``n_tokens`` of prompt and ``n_new_tokens`` steps.

        A stock layer keeps ``window - 1`` tokens between forwards; during a step it also holds the token being
        written, and that tensor stays alive until the next step.
        """
        held = min(n_tokens, self.sliding_window - 1) if n_new_tokens == 0 else n_tokens + n_new_tokens
        return len(self.sliding_layers) * min(held, self.sliding_window) * self.sliding_layer_bytes_per_token

    def dense_kv_bytes(self, n_tokens: int, n_new_tokens: int = 0) -> int:
        """Bytes the ``dense`` method keeps on the device: every token, in whole pages, stock layers included."""
        return self.paged_kv_bytes(n_tokens + n_new_tokens) + self.stock_kv_bytes(n_tokens, n_new_tokens)

    def read_bytes(self, n_tokens: int) -> int:
        """Bytes one decode step reads when every managed layer reads a store of ``n_tokens``, residual included."""
        return len(self.layers) * self.layer_read_bytes(n_tokens)

    def layer_read_bytes(self, n_tokens: int) -> int:
        """``read_bytes`` of one layer."""
        if self.kv is None:
            return n_tokens * self.layer_bytes_per_token
        n_packed_tokens = self.packed_pages(n_tokens) * self.page_tokens
        return self.packed_bytes(n_packed_tokens) + (n_tokens - n_packed_tokens) * self.layer_bytes_per_token

    def stock_read_bytes(self, n_tokens: int) -> int:
        """Bytes one decode step reads in the sliding-window layers at ``n_tokens`` of context."""
        return len(self.sliding_layers) * min(n_tokens, self.sliding_window) * self.sliding_layer_bytes_per_token

    def attention_flops(self, n_tokens: int) -> int:
        """FLOPs of QK^T and PV in one decode step over ``n_tokens`` in every managed layer (a MAC is two)."""
        return len(self.layers) * 4 * self.n_q_heads * self.head_dim * n_tokens

    def stock_attention_flops(self, n_tokens: int) -> int:
        """FLOPs of QK^T and PV of one decode step in the sliding-window layers."""
        n_heads, width = self.sliding_n_q_heads or self.n_q_heads, self.sliding_kv_width or 2 * self.head_dim
        return len(self.sliding_layers) * 2 * n_heads * width * min(n_tokens, self.sliding_window)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What one sequence holds and reads, now. Footprints add.

    Attributes:
        kv_bytes: K and V on the device, whole pages, the model's own sliding-window layers included.
        metadata_bytes: what a method keeps on the device beside K and V to choose with.
        host_bytes: pinned host memory the method needs while decoding.
        bytes_read_per_step: bytes of K, V and metadata that attention of one decode step over this state reads.
        attention_flops_per_step: FLOPs of that step's attention and selection.
        spare_kv_bytes, spare_metadata_bytes: of the bytes above, room that only steps at fixed addresses keep: slots
            beyond what was chosen, and the tables that name them. Below zero where such steps hold less than others.
    """

    kv_bytes: int = 0
    metadata_bytes: int = 0
    host_bytes: int = 0
    bytes_read_per_step: int = 0
    attention_flops_per_step: int = 0
    spare_kv_bytes: int = 0
    spare_metadata_bytes: int = 0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            kv_bytes=self.kv_bytes + other.kv_bytes,
            metadata_bytes=self.metadata_bytes + other.metadata_bytes,
            host_bytes=self.host_bytes + other.host_bytes,
            bytes_read_per_step=self.bytes_read_per_step + other.bytes_read_per_step,
            attention_flops_per_step=self.attention_flops_per_step + other.attention_flops_per_step,
            spare_kv_bytes=self.spare_kv_bytes + other.spare_kv_bytes,
            spare_metadata_bytes=self.spare_metadata_bytes + other.spare_metadata_bytes,
        )

    def without_spare(self) -> Footprint:
        """Return what the same sequence holds where its steps run as they come."""
        return replace(
            self,
            kv_bytes=self.kv_bytes - self.spare_kv_bytes,
            metadata_bytes=self.metadata_bytes - self.spare_metadata_bytes,
            spare_kv_bytes=0,
            spare_metadata_bytes=0,
        )

    @property
    def device_bytes(self) -> int:
        """Bytes on the device: KV and metadata."""
        return self.kv_bytes + self.metadata_bytes

    def divided_by(self, n: int) -> Self:
        """Return every field divided by ``n``, rounded to the nearest whole number."""
        return type(self)(
            kv_bytes=round(self.kv_bytes / n),
            metadata_bytes=round(self.metadata_bytes / n),
            host_bytes=round(self.host_bytes / n),
            bytes_read_per_step=round(self.bytes_read_per_step / n),
            attention_flops_per_step=round(self.attention_flops_per_step / n),
            spare_kv_bytes=round(self.spare_kv_bytes / n),
            spare_metadata_bytes=round(self.spare_metadata_bytes / n),
        )


def tensor_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Return the bytes of the storages behind ``tensors``, a shared storage once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
