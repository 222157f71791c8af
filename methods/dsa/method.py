"""DSA, the token-sparse attention of DeepSeek-V3.2: the best tokens of each query, one set for all heads.

The tokens are chosen by an indexer. Here it is the attention oracle: the tokens the model's own heads attend to most,
which is what a trained lightning indexer is trained to tell and therefore its upper bound.

Shapes: H KV heads, G query heads a KV head, T tokens, D head size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvscope.methods.block_budget import BlockPlan, check_blocks
from kvscope.methods.block_query import Query, Scored
from kvscope.methods.block_sparse import BlockSparse
from kvscope.methods.gather import cap, page_logits
from kvscope.methods.shape import ModelShape

ORACLE = "oracle"


@dataclass(frozen=True, kw_only=True)
class DSAConfig:
    """Options of ``dsa``.

    Attributes:
        budget_tokens: tokens a query reads, the current one included; none: min(2048, max(128, length / 16)).
        indexer: what chooses. oracle: the attention of all heads, added up, which reads every key to choose. A file
            of a trained lightning indexer is not read yet.
    """

    budget_tokens: int | None = None
    indexer: str = ORACLE

    def __post_init__(self) -> None:
        check_blocks(None, self.budget_tokens)
        if self.indexer != ORACLE:
            raise ValueError(
                f"indexer={self.indexer} cannot be loaded, for no lightning indexer can be trained for an ordinary "
                f"model yet; use indexer={ORACLE}, the upper bound of one"
            )


class DSA(BlockSparse[DSAConfig]):
    """Top tokens, one set for all heads of a layer."""

    name = "dsa"
    stays = "every token"
    saves = "FLOPs and reads of attention; the oracle that chooses reads every key, so half of all reads at most"
    reads = (
        "the current token and the tokens with the most attention summed over all heads, one set for every head of a "
        "layer; and every key to choose by (the oracle: an upper bound of a trained indexer)"
    )
    source = (
        "DeepSeek-V3.2 (transformers' deepseek_v32), with the attention its indexer learns from in that indexer's place"
    )
    cost = "resident = N tokens a layer; read = min(2048, max(128, N/16)) tokens + the keys (half the bytes) of all N"
    paper_block_tokens = 1
    score_kernel = False
    paper_options: ClassVar[dict[str, Any]] = {"budget_tokens": 2048}
    Config = DSAConfig

    def score(self, query: Query) -> Scored:
        logits_HGT = page_logits(query.q_HGD, query.pages, n_tokens=query.n_tokens)
        mass_T = head_sum(logits_HGT * query.scale, softcap=query.extras.softcap, sink_logits=query.extras.sink_logits)
        H, G, D = query.q_HGD.shape
        n_bytes = query.n_tokens * H * D * query.pages.element_size()
        return Scored(mass_T[None, None, : query.n_before], n_bytes, 2 * query.n_tokens * H * G * D)

    def scan_reads(self, shape: ModelShape, n_tokens: int, plan: BlockPlan) -> tuple[int, int]:
        n_bytes = n_tokens * shape.n_kv_heads * shape.head_dim * shape.element_bytes
        return n_bytes, 2 * n_tokens * shape.n_q_heads * shape.head_dim

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return {**super().effective_config(n_tokens, shape), "indexer": self.config.indexer}


def head_sum(
    logits_HGT: torch.Tensor, *, softcap: float | None = None, sink_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the attention each token gets, added up over heads, fp32 [T].

    Args:
        logits_HGT: scaled.
        sink_logits: [H * G], one logit a head that takes mass and has no token.
    """
    logits_HGT = cap(logits_HGT.float(), softcap)
    lse_HG = torch.logsumexp(logits_HGT, -1)
    if sink_logits is not None:
        lse_HG = torch.logaddexp(lse_HG, sink_logits.float().view_as(lse_HG))
    return torch.exp(logits_HGT - lse_HG[..., None]).sum((0, 1))
