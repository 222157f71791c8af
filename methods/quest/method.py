"""Quest (arXiv 2406.10774): pages of 16 tokens, chosen a query by an upper bound on their tokens' logits.

Shapes: H KV heads, G query heads a KV head, N pages, T tokens a page, D head size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvscope.methods.block_budget import BlockPlan, check_blocks
from kvscope.methods.block_query import Query, Scored
from kvscope.methods.block_sparse import BlockSparse
from kvscope.methods.shape import ModelShape
from kvscope.methods.summaries import Summary, summary_bytes
from kvscope.units import Tokens


@dataclass(frozen=True, kw_only=True)
class QuestConfig:
    """Options of ``quest``.

    Attributes:
        budget_tokens: tokens a query reads in each KV head, the current page included; none: min(2048, max(128,
            length / 16)).
        block_tokens: tokens of a page, the unit of choice (the paper's page; storage has pages of its own).
        dense_layers: first layers of the model that read everything, counted over all decoder layers.
    """

    budget_tokens: Tokens | None = None
    block_tokens: Tokens = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        check_blocks(self.block_tokens, self.budget_tokens)
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers must be 0 or more, got {self.dense_layers}")


class Quest(BlockSparse[QuestConfig]):
    """Top pages of each KV head by the bound sum_d max(q_d min_d, q_d max_d)."""

    name = "quest"
    stays = "every token, and the least and the greatest key of every page in each dimension"
    saves = "reads and FLOPs; the footprint grows by the metadata"
    reads = (
        "the current page and the top pages of each KV head by an upper bound of their logits (the first layers of the "
        "model: every token), and the bounds of every page to choose by"
    )
    source = "Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774"
    cost = (
        "resident = N tokens + N/16 pairs of keys (min, max) a layer; read = min(2048, max(128, N/16)) tokens + those "
        "pairs; N tokens in the first layers"
    )
    paper_block_tokens = 16
    paper_options: ClassVar[dict[str, Any]] = {"budget_tokens": 2048}
    Config = QuestConfig

    def summary(self) -> Summary:
        block = self.config.block_tokens
        return Summary(name=f"key_min_max_{block}", n_vectors=2, of_blocks=min_max, block_tokens=lambda n_tokens: block)

    def sparse_layers(self, shape: ModelShape) -> tuple[int, ...]:
        return tuple(layer for layer in shape.layers if layer >= self.config.dense_layers)

    def score(self, query: Query) -> Scored:
        assert isinstance(query.kept, torch.Tensor)
        n_bytes = query.kept.numel() * query.kept.element_size()
        n_flops = 4 * query.q_HGD.numel() * query.n_before
        if query.scored_by_kernel():
            from kvscope.methods.kernels.block_scores.kernel import quest_scores  # Triton may be missing elsewhere

            return Scored(quest_scores(query.q_HGD, query.kept), n_bytes, n_flops)
        bounds_HGN = upper_bounds(query.q_HGD, query.kept)
        return Scored(bounds_HGN.amax(1, keepdim=True), n_bytes, n_flops)

    def scan_reads(self, shape: ModelShape, n_tokens: int, plan: BlockPlan) -> tuple[int, int]:
        n_scored = plan.count(n_tokens) - 1
        return summary_bytes(shape, 2, n_scored), 4 * n_scored * shape.n_q_heads * shape.head_dim

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return {**super().effective_config(n_tokens, shape), "dense_layers": self.config.dense_layers}


def min_max(k_HNTD: torch.Tensor) -> torch.Tensor:
    """Return the element-wise least and greatest key of each page, [N, H, 2, D]."""
    low_HND, high_HND = torch.aminmax(k_HNTD, dim=2)
    return torch.stack([low_HND, high_HND], 2).transpose(0, 1)


def upper_bounds(q_HGD: torch.Tensor, bounds_NH2D: torch.Tensor) -> torch.Tensor:
    """Return an upper bound of q . k over the keys of each page, fp32 [H, G, N] (section 3.3 of the paper).

    sum_d max(q_d min_d, q_d max_d) picks max_d where q_d is positive and min_d where it is negative, so it is two
    products.
    """
    low_HDN, high_HDN = bounds_NH2D.float().permute(2, 1, 3, 0)
    q_HGD = q_HGD.float()
    return torch.bmm(q_HGD.clamp(min=0), high_HDN) + torch.bmm(q_HGD.clamp(max=0), low_HDN)
