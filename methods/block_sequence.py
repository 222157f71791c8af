"""One sequence under a block-sparse method: gathering what a query chose (the method), masking the rest (the oracle).

Shapes: Q query heads, H KV heads, D head size, N blocks, T tokens.
"""

from typing import TYPE_CHECKING, Any

import torch

from kvscope.methods.attention import Partial, kernel_runs, merge_partials, paged_attention, stored_partial
from kvscope.methods.base import AttentionExtras, SequenceCache
from kvscope.methods.block_query import Query, Reads, read_footprint
from kvscope.methods.gather import Chosen, choose, chosen_store, gather_blocks, token_partial
from kvscope.methods.kernels.dispatch import unsupported_block_scores
from kvscope.methods.shape import Footprint
from kvscope.methods.store import PagePool, PromptKV

if TYPE_CHECKING:
    from kvscope.methods.block_sparse import BlockSparse


class BlockSparseSequence(SequenceCache):
    """Every token in one pool of pages, summaries beside it; what a query reads is gathered into a small tensor."""

    def __init__(
        self, method: "BlockSparse[Any]", prompt: PromptKV, device: torch.device, *, reserve_tokens: int = 0
    ) -> None:
        super().__init__(prompt, device)
        self._method = method
        self._plan = method.blocks(prompt.n_tokens)
        self._sparse = method.sparse_layers(self.shape)
        self._pool = PagePool(self.shape, n_tokens=prompt.n_tokens + reserve_tokens, dtype=prompt.dtype, device=device)
        self._pool.load(prompt, [(0, prompt.n_tokens)])
        self._store = method.open_store(prompt, device, reserve_tokens=reserve_tokens)
        self._reads: dict[int, Reads] = {}

    @property
    def n_tokens(self) -> int:
        return self._pool.lengths[self.shape.layers[-1]]

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        if self._store is not None:
            self._store.observe(layer, hidden_BM)

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
        kept: object = None
        if self._store is not None and layer in self._sparse:
            self._store.appended(layer, pages, n_tokens)
            kept = self._store.before(layer, self._plan.count(n_tokens) - 1)
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
            kept=kept,
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
        block, tail_tokens = query.plan.block_tokens, query.plan.tail_tokens(query.n_tokens)
        q_BQ1D = query.q_HGD.reshape(1, -1, 1, query.q_HGD.shape[2])
        if kernel_runs(q_BQ1D, query.pages):
            store = chosen_store(query.pages, chosen, block_tokens=block, tail_tokens=tail_tokens)
            in_place = stored_partial(q_BQ1D, store, scale=query.scale, softcap=query.extras.softcap)
            counts = store.n_tokens
            return in_place, counts.sum() if isinstance(counts, torch.Tensor) else counts * query.q_HGD.shape[0]
        k_HTD, v_HTD = gather_blocks(
            query.pages,
            chosen.blocks_HB,
            block_tokens=block,
            tail_tokens=tail_tokens,
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

    def backends(self) -> tuple[str, ...]:
        method, shape = self._method, self.shape
        if not method.score_kernel:
            return ("torch: token scores",)
        reasons = unsupported_block_scores(
            self.device,
            dtype=self._pool.dtype,
            head_dim=shape.head_dim,
            group=shape.n_q_heads // shape.n_kv_heads,
            block_tokens=None if method.summary() is not None else self._plan.block_tokens,
        )
        return (f"torch: block scores ({'; '.join(reasons)})",) if reasons else ("triton: block_scores",)

    def managed_footprint(self) -> Footprint:
        reads = [self._reads[layer] for layer in self.shape.layers if layer in self._reads]
        metadata_bytes = 0 if self._store is None else self._store.n_bytes
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
        if self._store is not None:
            self._store.clear()
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
