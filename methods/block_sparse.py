"""Block-sparse methods: the whole cache stays resident, and each query reads a few blocks of it.

A subclass says how blocks are scored and what that costs; the rest is shared: the plan of blocks (``block_budget``),
summaries of blocks (``summaries``), choice and gather (``gather``), storage and byte counts
(``block_sequence``). The query's own block is always read and counts as one of the budget's blocks.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from kvscope.methods.base import CacheMethod, Collector, SequenceCache
from kvscope.methods.block_budget import BlockPlan, plan_blocks
from kvscope.methods.block_query import Query, Reads, Scored, read_footprint
from kvscope.methods.block_sequence import BlockSparseSequence
from kvscope.methods.kv_format import KvFormat
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.store import PromptKV
from kvscope.methods.summaries import MetadataStore, Summary, SummaryCollector, SummaryStore, summary_bytes


class BlockConfig(Protocol):
    """What the options of every block-sparse method have."""

    @property
    def budget_tokens(self) -> int | None: ...


ConfigT = TypeVar("ConfigT", bound=BlockConfig)


class BlockSparse(CacheMethod[ConfigT]):
    """Everything resident; a query reads its own block and the best-scored ones.

    Class attributes:
        paper_block_tokens, paper_budget_tokens: the defaults of the paper, used from 32K tokens on.
        score_kernel: whether the ``block_scores`` kernels know its scores.
        scores_room: whether scores of blocks behind the last token do no harm, so that a step of fixed addresses may
            make them.
        one_choice: whether one choice serves all KV heads.
        per_query_head: whether query heads choose alone, so that a KV head reads the union of its group's choices.
    """

    saving_kind = "resident"
    kv_refusal = ""
    spans_devices = True
    through_decode = True
    paper_block_tokens: ClassVar[int]
    paper_budget_tokens: ClassVar[int] = 2048
    score_kernel: ClassVar[bool] = True
    per_query_head: ClassVar[bool] = False
    scores_room: bool = True
    one_choice: bool = False

    def use_kv(self, kv: KvFormat) -> None:
        super().use_kv(kv)
        self.reads_vary = True  # how much of what is chosen lies in the residual, the data decide

    def summary(self) -> Summary | None:
        """Return what is kept of each block's keys, or None."""
        return None

    def open_store(self, prompt: PromptKV, device: torch.device, *, reserve_tokens: int) -> MetadataStore | None:
        """Return a fresh store of what the method keeps beside K and V, or None."""
        summary = self.summary()
        if summary is None:
            return None
        return SummaryStore(
            summary,
            prompt,
            layers=self.sparse_layers(prompt.shape),
            block_tokens=self.blocks(prompt.n_tokens).block_tokens,
            reserve_tokens=reserve_tokens,
            device=device,
        )

    def metadata_bytes(self, shape: ModelShape, n_tokens: int, plan: BlockPlan) -> int:
        """Return the bytes of that store in one layer that chooses, of ``n_tokens`` in all."""
        summary = self.summary()
        return 0 if summary is None else summary_bytes(shape, summary.n_vectors, n_tokens // plan.block_tokens)

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
        n_raw = 0 if shape.kv is None else n_tokens - shape.packed_pages(n_tokens) * shape.page_tokens
        if plan.reads_all(n_tokens):
            return Reads(H * n_tokens, n_raw=H * n_raw)
        n_chosen = plan.n_blocks - 1
        if self.per_query_head:
            n_chosen = min(shape.n_q_heads // H * n_chosen, plan.count(n_tokens) - 1)
        n_read = n_chosen * plan.block_tokens + plan.tail_tokens(n_tokens)
        return Reads(H * n_read, *self.scan_reads(shape, n_tokens, plan), H * min(n_read, n_raw))

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
        plan, n_total, shape = self.blocks(n_tokens), n_tokens + n_new_tokens, self.stored(shape)
        n_raw = 0 if shape.kv is None else n_total - shape.packed_pages(n_total) * shape.page_tokens
        sparse = self.sparse_layers(shape)
        reads = [self.layer_reads(shape, n_total, plan)] * len(sparse)
        reads += [Reads(shape.n_kv_heads * n_total, n_raw=shape.n_kv_heads * n_raw)] * (len(shape.layers) - len(sparse))
        stock = Footprint(
            kv_bytes=shape.stock_kv_bytes(n_tokens, n_new_tokens),
            bytes_read_per_step=shape.stock_read_bytes(n_total),
            attention_flops_per_step=shape.stock_attention_flops(n_total),
        )
        return stock + read_footprint(
            shape,
            reads,
            kv_bytes=shape.paged_kv_bytes(n_total),
            metadata_bytes=len(sparse) * self.metadata_bytes(shape, n_total, plan),
        )

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        return BlockSparseSequence(
            self, self.stored_prompt(prompt), torch.device(device), reserve_tokens=reserve_tokens
        )
