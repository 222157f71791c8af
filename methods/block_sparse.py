"""Block-sparse methods: the whole cache stays resident, and each query reads a few blocks of it.

A subclass says how blocks are scored and what that costs; storage, choice, gather, byte counts and the masked oracle
are here. The query's own block is always read and counts as one of the budget's blocks.

Shapes: Q query heads, H KV heads, G = Q/H, N blocks before the current one, B blocks read, T tokens, D head size,
S slots (pages), P tokens a page.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from kvscope.methods.attention import Partial, merge_partials, paged_attention
from kvscope.methods.base import AttentionExtras, CacheMethod, Collector, SequenceCache
from kvscope.methods.block_budget import BlockPlan, layer_token_bytes, layer_token_flops, plan_blocks
from kvscope.methods.gather import Chosen, choose, gather_blocks, token_partial
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.store import PagePool, PromptKV
from kvscope.methods.summaries import Summary, SummaryCollector, SummaryStore, summary_bytes


class BlockConfig(Protocol):
    """What the options of every block-sparse method have."""

    @property
    def budget_tokens(self) -> int | None: ...


ConfigT = TypeVar("ConfigT", bound=BlockConfig)


@dataclass(frozen=True)
class Reads:
    """What one query reads in one layer, all KV heads together.

    Attributes:
        n_tokens: tokens whose K and V it reads, added up over KV heads; a tensor where only the device knows.
        scan_bytes: bytes read to score blocks.
        scan_flops: FLOPs of scoring them.
    """

    n_tokens: "int | torch.Tensor"
    scan_bytes: int = 0
    scan_flops: int = 0


@dataclass(frozen=True, kw_only=True)
class Query:
    """Everything a score may be made of: one query, one layer.

    Attributes:
        q_HGD: the query, rotation applied.
        summaries: [N, H, X, D] of the blocks before the current one; None for a method that keeps none.
        pages: [S, H, 2, P, D], the current token included.
        n_tokens: tokens in the pages.
        plan: the blocks.
        scale, extras: of the layer's attention.
    """

    q_HGD: torch.Tensor
    summaries: torch.Tensor | None
    pages: torch.Tensor
    n_tokens: int
    plan: BlockPlan
    scale: float
    extras: AttentionExtras

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


class BlockSparse(CacheMethod[ConfigT]):
    """Everything resident; a query reads its own block and the best-scored ones.

    Class attributes:
        paper_block_tokens, paper_budget_tokens: the defaults of the paper, used from 32K tokens on.
        per_query_head: whether query heads choose alone, so that a KV head reads the union of its group's choices.
    """

    saving_kind = "resident"
    paper_block_tokens: ClassVar[int]
    paper_budget_tokens: ClassVar[int] = 2048
    per_query_head: ClassVar[bool] = False

    def summary(self) -> Summary | None:
        """Return what is kept of each block, or None."""
        return None

    @abstractmethod
    def score(self, query: Query) -> Scored:
        """Score the blocks before the current one."""

    @abstractmethod
    def scan_reads(self, shape: ModelShape, n_tokens: int, plan: BlockPlan) -> tuple[int, int]:
        """Return bytes and FLOPs of scoring in one layer for the query at the end of ``n_tokens``."""

    def sparse_layers(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the managed layers that choose; the others read everything."""
        return shape.layers

    @property
    def block_option(self) -> int | None:
        """The option block_tokens; None: automatic."""
        found: int | None = getattr(self.config, "block_tokens", self.paper_block_tokens)
        return found

    def blocks(self, n_tokens: int) -> BlockPlan:
        """Return the blocks for a prompt of ``n_tokens``."""
        return plan_blocks(
            n_tokens,
            paper_block_tokens=self.paper_block_tokens,
            paper_budget_tokens=self.paper_budget_tokens,
            block_tokens=self.block_option,
            budget_tokens=self.config.budget_tokens,
        )

    def layer_reads(self, shape: ModelShape, n_tokens: int, plan: BlockPlan) -> Reads:
        """Return what the query at the end of ``n_tokens`` reads in a layer that chooses: the most it can be."""
        H = shape.n_kv_heads
        if plan.reads_all(n_tokens):
            return Reads(H * n_tokens)
        n_chosen = plan.n_blocks - 1
        if self.per_query_head:
            n_chosen = min(shape.n_q_heads // H * n_chosen, plan.count(n_tokens) - 1)
        n_read = n_chosen * plan.block_tokens + plan.tail_tokens(n_tokens)
        return Reads(H * n_read, *self.scan_reads(shape, n_tokens, plan))

    def collectors(self, layer: int) -> list[Collector]:
        summary = self.summary()
        return [] if summary is None else [SummaryCollector(summary, layer)]

    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        if shape is not None and not self.sparse_layers(shape):
            return True
        return self.blocks(n_tokens).reads_all(n_tokens + 1)  # the first query's token included

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        plan = self.blocks(n_tokens)
        return {
            "block_tokens": plan.block_tokens,
            "blocks_read": plan.n_blocks,
            "budget_tokens": plan.budget_tokens,
        }

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        plan, n_total = self.blocks(n_tokens), n_tokens + n_new_tokens
        sparse, summary = self.sparse_layers(shape), self.summary()
        n_vectors = 0 if summary is None else summary.n_vectors
        reads = [self.layer_reads(shape, n_total, plan)] * len(sparse)
        reads += [Reads(shape.n_kv_heads * n_total)] * (len(shape.layers) - len(sparse))
        stock = Footprint(
            kv_bytes=shape.stock_kv_bytes(n_tokens, n_new_tokens),
            bytes_read_per_step=shape.stock_read_bytes(n_total),
            attention_flops_per_step=shape.stock_attention_flops(n_total),
        )
        return stock + read_footprint(
            shape,
            reads,
            kv_bytes=shape.paged_kv_bytes(n_total),
            metadata_bytes=len(sparse) * summary_bytes(shape, n_vectors, n_total // plan.block_tokens),
        )

    def open(
        self, prompt: PromptKV, device: torch.device | str, *, physical: bool = True, reserve_tokens: int = 0
    ) -> SequenceCache:
        sequence = BlockSparseSequence if physical else MaskedBlockSparse
        return sequence(self, prompt, torch.device(device), reserve_tokens=reserve_tokens)


class BlockSparseSequence(SequenceCache):
    """Every token in one pool of pages, summaries beside it; what a query reads is gathered into a small tensor."""

    def __init__(
        self, method: BlockSparse[Any], prompt: PromptKV, device: torch.device, *, reserve_tokens: int = 0
    ) -> None:
        super().__init__(prompt, device)
        self._method = method
        self._plan = method.blocks(prompt.n_tokens)
        self._sparse = method.sparse_layers(self.shape)
        self._pool = PagePool(self.shape, n_tokens=prompt.n_tokens + reserve_tokens, dtype=prompt.dtype, device=device)
        self._pool.load(prompt, [(0, prompt.n_tokens)])
        summary = method.summary()
        self._summaries: SummaryStore | None = None
        if summary is not None:
            self._summaries = SummaryStore(
                summary,
                prompt,
                layers=self._sparse,
                block_tokens=self._plan.block_tokens,
                reserve_tokens=reserve_tokens,
                device=device,
            )
        self._reads: dict[int, Reads] = {}

    @property
    def n_tokens(self) -> int:
        return self._pool.lengths[self.shape.layers[-1]]

    def attend(
        self,
        layer: int,
        q_BQ1D: torch.Tensor,
        k_BH1D: torch.Tensor,
        v_BH1D: torch.Tensor,
        *,
        scale: float,
        extras: AttentionExtras,
    ) -> torch.Tensor:
        self._pool.append(layer, k_BH1D, v_BH1D)
        pages, n_tokens = self._pool.pages[layer], self._pool.lengths[layer]
        H, D = self.shape.n_kv_heads, self.shape.head_dim
        before = None
        if self._summaries is not None and layer in self._sparse:
            self._summaries.appended(layer, pages, n_tokens)
            before = self._summaries.summaries[layer][: self._plan.count(n_tokens) - 1]
        if layer not in self._sparse or self._plan.reads_all(n_tokens):
            self._reads[layer] = Reads(H * n_tokens)
            return paged_attention(
                q_BQ1D,
                pages,
                n_tokens=n_tokens,
                scale=scale,
                softcap=extras.softcap,
                sink_logits=extras.sink_logits,
            )
        query = Query(
            q_HGD=q_BQ1D.view(H, -1, D),
            summaries=before,
            pages=pages,
            n_tokens=n_tokens,
            plan=self._plan,
            scale=scale,
            extras=extras,
        )
        scored = self._method.score(query)
        chosen = choose(scored.scores_HGN, n_chosen=self._plan.n_blocks - 1, current=query.n_before, n_kv_heads=H)
        part, n_read = self._attend_chosen(query, chosen)
        self._reads[layer] = Reads(n_read, scored.n_bytes, scored.n_flops)
        return merge_partials([part], q_BQ1D, sink_logits=extras.sink_logits)

    def _attend_chosen(self, query: Query, chosen: Chosen) -> tuple[Partial, "int | torch.Tensor"]:
        """Return attention over the chosen blocks, and how many tokens were read over all KV heads."""
        block = query.plan.block_tokens
        k_HTD, v_HTD = gather_blocks(
            query.pages,
            chosen.blocks_HB,
            block_tokens=block,
            tail_tokens=query.plan.tail_tokens(query.n_tokens),
        )
        keep_HT = None
        n_read: int | torch.Tensor = k_HTD.shape[0] * k_HTD.shape[1]
        if chosen.keep_HB is not None:
            keep_HT = chosen.keep_HB.repeat_interleave(block, 1)[:, : k_HTD.shape[1]]
            n_read = keep_HT.sum()
        part = token_partial(
            query.q_HGD, k_HTD, v_HTD, scale=query.scale, softcap=query.extras.softcap, keep_HT=keep_HT
        )
        return part, n_read

    def managed_footprint(self) -> Footprint:
        reads = [self._reads[layer] for layer in self.shape.layers if layer in self._reads]
        metadata_bytes = 0 if self._summaries is None else self._summaries.n_bytes
        found = read_footprint(self.shape, reads, kv_bytes=self._pool.n_bytes, metadata_bytes=metadata_bytes)
        if reads:
            return found
        # Nothing was read yet: what a step over this state would read.
        expected = self._method.predict(self.shape, self.n_tokens)
        return Footprint(
            kv_bytes=found.kv_bytes,
            metadata_bytes=found.metadata_bytes,
            bytes_read_per_step=expected.bytes_read_per_step - self.shape.stock_read_bytes(self.n_tokens),
            attention_flops_per_step=expected.attention_flops_per_step
            - self.shape.stock_attention_flops(self.n_tokens),
        )

    def close(self) -> None:
        self._pool.clear()
        self._reads.clear()
        if self._summaries is not None:
            self._summaries.clear()
        super().close()


class MaskedBlockSparse(BlockSparseSequence):
    """The oracle of the tests: every page is read, and what the query did not choose is masked."""

    def _attend_chosen(self, query: Query, chosen: Chosen) -> tuple[Partial, "int | torch.Tensor"]:
        H, n_blocks = chosen.blocks_HB.shape[0], query.n_before + 1
        read_HN = torch.zeros((H, n_blocks), dtype=torch.bool, device=chosen.blocks_HB.device)
        read_HN.scatter_(1, chosen.blocks_HB, True)  # an entry that does not count repeats one that does
        keep_HT = read_HN.repeat_interleave(query.plan.block_tokens, 1)[:, : query.n_tokens]
        k_HTD, v_HTD = (query.pages[:, :, i].transpose(0, 1).flatten(1, 2)[:, : query.n_tokens] for i in (0, 1))
        part = token_partial(
            query.q_HGD, k_HTD, v_HTD, scale=query.scale, softcap=query.extras.softcap, keep_HT=keep_HT
        )
        return part, keep_HT.sum()


def read_footprint(shape: ModelShape, reads: list[Reads], *, kv_bytes: int, metadata_bytes: int) -> Footprint:
    """Return the footprint of layers that hold ``kv_bytes`` and read ``reads``."""
    n_known = sum(read.n_tokens for read in reads if isinstance(read.n_tokens, int))
    counted = [read.n_tokens for read in reads if not isinstance(read.n_tokens, int)]
    # One wait for the device, not one a layer.
    n_tokens = n_known + (int(torch.stack(counted).sum()) if counted else 0)
    return Footprint(
        kv_bytes=kv_bytes,
        metadata_bytes=metadata_bytes,
        bytes_read_per_step=n_tokens * layer_token_bytes(shape) + sum(read.scan_bytes for read in reads),
        attention_flops_per_step=n_tokens * layer_token_flops(shape) + sum(read.scan_flops for read in reads),
    )
