"""What passes between a block-sparse method and its sequence: a query to score, its scores, and what was read for it.

Shapes: H KV heads, G query heads a KV head, N blocks before the current one, X vectors a summary, S slots (pages),
P tokens a page, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvscope.methods.block_budget import BlockPlan, layer_token_bytes, layer_token_flops
from kvscope.methods.call import AttentionCall
from kvscope.methods.kernels.dispatch import unsupported_block_scores
from kvscope.methods.shape import Footprint, ModelShape


@dataclass(frozen=True)
class Reads:
    """What one query reads in one layer, all KV heads together.

    Attributes:
        n_tokens: tokens whose K and V it reads, added up over KV heads; a tensor where only the device knows.
        scan_bytes: bytes read to score blocks.
        scan_flops: FLOPs of scoring them.
        n_raw: of these tokens, those of a packed store that are not packed.
    """

    n_tokens: "int | torch.Tensor"
    scan_bytes: int = 0
    scan_flops: int = 0
    n_raw: "int | torch.Tensor" = 0


@dataclass(frozen=True, kw_only=True)
class Query:
    """Everything a score may be made of: one query, one layer.

    Attributes:
        q_HGD: the query, rotation applied.
        kept: what the method keeps of the blocks before the current one, as its store's ``before`` gives it
            (summaries: [N, H, X, D]); None for a method that keeps nothing.
        pages: [S, H, 2, P, D], the current token included.
        n_tokens: tokens in the pages.
        plan: the blocks.
        call: of the layer's attention.
    """

    q_HGD: torch.Tensor
    kept: object
    pages: torch.Tensor
    n_tokens: int
    plan: BlockPlan
    call: AttentionCall

    def scored_by_kernel(self, *, block_tokens: int | None = None) -> bool:
        """Whether the ``block_scores`` kernels take this query; ``block_tokens`` where they read the blocks' keys."""
        _, G, D = self.q_HGD.shape
        return not unsupported_block_scores(
            self.pages.device, dtype=self.pages.dtype, head_dim=D, group=G, block_tokens=block_tokens
        )

    @property
    def n_before(self) -> int:
        """Blocks before the current one: those a score is wanted for. All of them are full."""
        return self.plan.count(self.n_tokens) - 1


@dataclass(frozen=True)
class Scored:
    """Scores of the blocks before the current one, and what they cost.

    Attributes:
        scores_HGN: size 1 in H: one choice for all KV heads. Size over 1 in G: one a query head.
        n_bytes: bytes of the tensors read for them.
        n_flops: FLOPs of the products.
    """

    scores_HGN: torch.Tensor
    n_bytes: int
    n_flops: int


def read_footprint(shape: ModelShape, reads: list[Reads], *, kv_bytes: int, metadata_bytes: int) -> Footprint:
    """Return the footprint of layers that hold ``kv_bytes`` and read ``reads``."""
    n_tokens = _sum([read.n_tokens for read in reads])
    token_bytes = n_tokens * layer_token_bytes(shape)
    if shape.kv is not None:
        n_raw = _sum([read.n_raw for read in reads])
        # A token's share of its page: what its scales take is read with it.
        packed_bytes = -(-(n_tokens - n_raw) * shape.packing().record_bytes // shape.page_tokens)
        token_bytes = n_raw * layer_token_bytes(shape) + packed_bytes
    return Footprint(
        kv_bytes=kv_bytes,
        metadata_bytes=metadata_bytes,
        bytes_read_per_step=token_bytes + sum(read.scan_bytes for read in reads),
        attention_flops_per_step=n_tokens * layer_token_flops(shape) + sum(read.scan_flops for read in reads),
    )


def _sum(counts: "Sequence[int | torch.Tensor]") -> int:
    """Add up counts, with one wait for the device, not one a layer."""
    counted = [count for count in counts if not isinstance(count, int)]
    counted = [count.to(counted[0].device) for count in counted]
    known = sum(count for count in counts if isinstance(count, int))
    return known + (int(torch.stack(counted).sum()) if counted else 0)
