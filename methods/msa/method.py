"""MSA, the block-sparse attention of MiniMax-M3, in a form without trained parts: blocks by their best key.

Shapes: H KV heads, G query heads a KV head, N blocks, T tokens a block, D head size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvscope.methods.block_budget import BlockPlan, check_blocks
from kvscope.methods.block_query import Query, Scored
from kvscope.methods.block_sparse import BlockSparse
from kvscope.methods.gather import page_logits
from kvscope.methods.shape import ModelShape
from kvscope.units import Tokens


@dataclass(frozen=True, kw_only=True)
class MSAConfig:
    """Options of ``msa``.

    Attributes:
        budget_tokens: tokens a query reads in each KV head, the current block included; none: min(2048, max(128,
            length / 16)).
        block_tokens: tokens of a block; none: 128, or the largest power of two below that leaves the budget sixteen
            blocks.
    """

    budget_tokens: Tokens | None = None
    block_tokens: Tokens | None = None

    def __post_init__(self) -> None:
        check_blocks(self.block_tokens, self.budget_tokens)


class MSA(BlockSparse[MSAConfig]):
    """Top blocks of each KV head by the greatest product of the group's mean query with the block's own keys."""

    name = "msa"
    stays = "every token"
    saves = "less than half of the reads: every key is read to choose, few are attended to; no bytes are saved"
    reads = (
        "the current block and the fifteen blocks of each KV head with the best key for the mean query of its group; "
        "and the keys of every block to choose by, for an ordinary model has no small index keys"
    )
    source = "MiniMax-M3, the indexer of transformers' minimax_m3_vl; here without its trained projections"
    cost = (
        "resident = N tokens a layer; read = 16 b tokens + the keys (half the bytes) of all blocks before the current "
        "one, b = min(128, budget/16), budget = min(2048, max(128, N/16))"
    )
    kv_refusal = "it chooses by the raw keys of every token, which packed pages do not hold"
    paper_block_tokens = 128
    paper_options: ClassVar[dict[str, Any]] = {"budget_tokens": 2048, "block_tokens": 128}
    Config = MSAConfig

    def score(self, query: Query) -> Scored:
        block, n_before = query.plan.block_tokens, query.n_before
        H, _, D = query.q_HGD.shape
        n_products = H * D * n_before * block
        n_bytes, n_flops = n_products * query.pages.element_size(), 2 * n_products
        if query.scored_by_kernel(block_tokens=block):
            from kvscope.methods.kernels.block_scores.kernel import msa_scores  # Triton may be missing elsewhere

            scores_H1N = msa_scores(query.q_HGD, query.pages, n_blocks=n_before, block_tokens=block)
            return Scored(scores_H1N, n_bytes, n_flops)
        q_H1D = query.q_HGD.float().mean(1, keepdim=True)
        best_HN = block_maxima(page_logits(q_H1D, query.pages, n_tokens=n_before * block), block)
        return Scored(best_HN, n_bytes, n_flops)

    def scan_reads(self, shape: ModelShape, n_tokens: int, plan: BlockPlan) -> tuple[int, int]:
        n_products = (plan.count(n_tokens) - 1) * plan.block_tokens * shape.n_kv_heads * shape.head_dim
        return n_products * shape.element_bytes, 2 * n_products


def block_maxima(logits_HGT: torch.Tensor, block_tokens: int) -> torch.Tensor:
    """Return the greatest logit of each whole block, [H, G, N]."""
    return logits_HGT.reshape(*logits_HGT.shape[:2], -1, block_tokens).amax(-1)
