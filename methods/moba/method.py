"""MoBA (arXiv 2502.13189): blocks of 512 tokens, chosen by each query head by the mean of their keys.

Shapes: H KV heads, G query heads a KV head, N blocks, T tokens a block, D head size.
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
class MoBAConfig:
    """Options of ``moba``.

    Attributes:
        budget_tokens: tokens each query head chooses, the current block included; none: min(2048, max(128,
            length / 16)).
        block_tokens: tokens of a block; none: 512, or the largest power of two below that leaves the budget four
            blocks.
    """

    budget_tokens: Tokens | None = None
    block_tokens: Tokens | None = None

    def __post_init__(self) -> None:
        check_blocks(self.block_tokens, self.budget_tokens)


class MoBA(BlockSparse[MoBAConfig]):
    """Top blocks of each query head by q . mean(keys); a KV head reads the union of its group's."""

    name = "moba"
    stays = "every token, and the mean key of every block"
    saves = "reads and FLOPs; the footprint grows by the metadata"
    reads = (
        "the current block and the three blocks with the best mean key for each query head, as the union over the "
        "query heads of a KV head; and the mean of every block to choose by"
    )
    needs_training = "the model"
    source = "Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189"
    cost = (
        "resident = N tokens + N/b mean keys a layer; read = at most b + 3 b G tokens + the means, "
        "b = min(512, budget/4), budget = min(2048, max(128, N/16)), G query heads a KV head"
    )
    reads_vary = True
    per_query_head = True
    paper_block_tokens = 512
    paper_options: ClassVar[dict[str, Any]] = {"budget_tokens": 2048, "block_tokens": 512}
    Config = MoBAConfig

    def summary(self) -> Summary:
        config = self.config
        block = f"auto_{config.budget_tokens or 'auto'}" if config.block_tokens is None else str(config.block_tokens)
        return Summary(
            name=f"key_mean_{block}",
            n_vectors=1,
            of_blocks=mean,
            block_tokens=lambda n_tokens: self.blocks(n_tokens).block_tokens,
        )

    def score(self, query: Query) -> Scored:
        assert isinstance(query.kept, torch.Tensor)
        means_NHD = query.kept[:, :, 0]
        n_bytes = means_NHD.numel() * means_NHD.element_size()
        n_flops = 2 * query.q_HGD.numel() * query.n_before
        if query.scored_by_kernel():
            from kvscope.methods.kernels.block_scores.kernel import moba_scores  # Triton may be missing elsewhere

            return Scored(moba_scores(query.q_HGD, query.kept), n_bytes, n_flops)
        gate_HGN = torch.bmm(query.q_HGD.float(), means_NHD.float().permute(1, 2, 0))
        return Scored(gate_HGN, n_bytes, n_flops)

    def scan_reads(self, shape: ModelShape, n_tokens: int, plan: BlockPlan) -> tuple[int, int]:
        n_scored = plan.count(n_tokens) - 1
        return summary_bytes(shape, 1, n_scored), 2 * n_scored * shape.n_q_heads * shape.head_dim


def mean(k_HNTD: torch.Tensor) -> torch.Tensor:
    """Return the mean key of each block, [N, H, 1, D]; added up in fp32."""
    return k_HNTD.float().mean(2, keepdim=True).to(k_HNTD.dtype).transpose(0, 1)
