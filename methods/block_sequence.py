"""One sequence under a block-sparse method: what a query chose is gathered and read.

Shapes: Q query heads, H KV heads, D head size, N blocks, T tokens.
"""

from typing import TYPE_CHECKING, Protocol

import torch

from kvscope.methods.attention import (
    Partial,
    kernel_runs,
    merge_partials,
    stored_attention,
    stored_partial,
)
from kvscope.methods.base import AttentionCall
from kvscope.methods.block_budget import BlockPlan
from kvscope.methods.block_query import Query, Reads, Scored, read_footprint
from kvscope.methods.gather import Chosen, choose, chosen_store, gather_blocks, token_partial
from kvscope.methods.kernels.dispatch import unsupported_block_scores
from kvscope.methods.packed_pool import PackedPool
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.static_step import PagedSequence, Pool, StepPages, open_pool, write_token
from kvscope.methods.step_batch import StepReads
from kvscope.methods.store import PromptKV
from kvscope.methods.summaries import MetadataStore, Summary

if TYPE_CHECKING:
    from kvscope.methods.block_rows import ChoiceRows
    from kvscope.methods.step_counters import StepCounters


class BlockChooser(Protocol):
    """What a sequence asks its method; ``block_sparse.BlockSparse`` says what each answer means."""

    @property
    def score_kernel(self) -> bool: ...

    @property
    def per_query_head(self) -> bool: ...

    @property
    def scores_room(self) -> bool: ...

    @property
    def one_choice(self) -> bool: ...

    def blocks(self, n_tokens: int) -> BlockPlan: ...

    def sparse_layers(self, shape: ModelShape) -> tuple[int, ...]: ...

    def summary(self) -> Summary | None: ...

    def open_store(self, prompt: PromptKV, device: torch.device, *, reserve_tokens: int) -> MetadataStore | None: ...

    def score(self, query: Query) -> Scored: ...

    def layer_reads(self, shape: ModelShape, n_tokens: int, plan: BlockPlan) -> Reads: ...

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint: ...


class BlockSparseSequence(PagedSequence):
    """Every token in one pool of pages, summaries beside it; what a query reads is gathered into a small tensor."""

    def __init__(
        self, method: BlockChooser, prompt: PromptKV, device: torch.device, *, reserve_tokens: int = 0
    ) -> None:
        super().__init__(prompt, device)
        self._method = method
        self._plan = method.blocks(prompt.n_tokens)
        self._sparse = method.sparse_layers(self.shape)
        self._pool = open_pool(self.shape, n_tokens=prompt.n_tokens + reserve_tokens, dtype=prompt.dtype, device=device)
        self._pool.load(prompt, [(0, prompt.n_tokens)])
        self._store = method.open_store(prompt, device, reserve_tokens=reserve_tokens)
        self._reads: dict[int, Reads] = {}
        self._scored: torch.Tensor | None = None
        self._last_tokens = prompt.n_tokens + reserve_tokens
        # What chose last in each layer, and for whom; and what chooses for this sequence alone.
        self._choices: dict[int, tuple[ChoiceRows, int]] = {}
        self._alone: dict[int, ChoiceRows] = {}

    @property
    def n_tokens(self) -> int:
        return self._pool.lengths[self.shape.layers[-1]]

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        if self._store is not None:
            self._store.observe(layer, hidden_BM)

    # -- steps at fixed addresses

    @property
    def _appended(self) -> Pool:
        return self._pool

    @property
    def count_11(self) -> torch.Tensor:
        assert isinstance(self._step, StepPages)
        return self._step.count_11

    @property
    def plan(self) -> BlockPlan:
        return self._plan

    @property
    def choice_key(self) -> object:
        return (id(self._method), self._plan.block_tokens)

    @property
    def choice_heads(self) -> tuple[int, int]:
        H = self.shape.n_kv_heads
        if self._method.one_choice:
            return 1, 1
        return H, self.shape.n_q_heads // H if self._method.per_query_head else 1

    def pages_of(self, layer: int) -> torch.Tensor:
        return self._pool.pages[layer]

    def static_reasons(self) -> list[str]:
        reasons = super().static_reasons()
        if isinstance(self._pool, PackedPool):
            reasons.append("what a query chose of packed pages is unpacked token by token, in torch")
        if self.device.type != "cuda":
            reasons.append("a step that chooses blocks needs the kernels, which a GPU has")
        if not self._method.scores_room:
            reasons.append("the attention oracle weighs blocks against each other, which only the host counts")
        if self._plan.reads_all(self.n_tokens + 1) != self._plan.reads_all(self._last_tokens):
            reasons.append("the context outgrows what a query reads while it decodes")
        return reasons

    @property
    def static_version(self) -> int:
        return super().static_version + (0 if self._store is None else self._store.moves)

    def make_static(self, counters: "StepCounters") -> None:
        super().make_static(counters)
        if self._store is not None:
            self._store.make_static(self.count_11)

    def step_reads(self, layer: int) -> StepReads | None:
        if self._step is None:
            return None
        place = self._step.place_of(layer)
        if not self._chooses(layer):
            return StepReads(place=place, stores=self._step.stores(layer))
        return StepReads(place=place, chooser=self)

    def room_scores(self, layer: int, call: AttentionCall) -> torch.Tensor:
        pages, block = self._pool.pages[layer], self._plan.block_tokens
        n_blocks = len(pages) * self.shape.page_tokens // block
        query = Query(
            q_HGD=call.query.view(self.shape.n_kv_heads, -1, self.shape.head_dim),
            kept=None if self._store is None else self._store.before(layer, n_blocks),
            pages=pages,
            n_tokens=n_blocks * block + 1,
            plan=self._plan,
            call=call,
        )
        return self._method.score(query).scores_HGN

    def chose(self, layer: int, choice: "ChoiceRows", row: int) -> None:
        self._choices[layer] = (choice, row)

    def begin_step(self) -> None:
        if self._step is None:
            return
        if self._store is not None:
            self._store.make_room(self.n_tokens + 1)
            # A block that the last token filled is scored from this step on.
            for layer in self._sparse:
                self._store.appended(layer, self._pool.keys, self.n_tokens)
        self._step.place()

    def end_step(self) -> None:
        if self._step is None:
            return
        self._step.placed()
        if self._store is not None:
            self._store.end_step()

    def _chooses(self, layer: int) -> bool:
        return layer in self._sparse and not self._plan.reads_all(self._last_tokens)

    def _attend_static(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Attend as a batch of one."""
        from kvscope.methods.block_rows import ChoiceRows

        reads = self.step_reads(layer)
        assert reads is not None
        write_token(reads.place, call.key, call.value)
        stores = reads.stores
        if reads.chooser is not None:
            choice = self._alone.get(layer)
            if choice is None or choice.pages[0] is not self._pool.pages[layer]:
                choice = self._alone[layer] = ChoiceRows([self], layer)
            self._choices[layer] = (choice, 0)
            choice.choose(call, [0])
            stores = (choice.store(0),)
        return stored_attention(call, stores)

    def _static_reads(self) -> list[Reads]:
        """Return what the last step read, layer by layer; before the first, what one would."""
        found = []
        for layer in self.shape.layers:
            if not self._chooses(layer):
                found.append(Reads(self.shape.n_kv_heads * self.n_tokens))
                continue
            reads = self._method.layer_reads(self.shape, self.n_tokens, self._plan)
            if self._method.per_query_head and layer in self._choices:
                choice, row = self._choices[layer]
                reads = Reads(choice.read_R[row], reads.scan_bytes, reads.scan_flops)
            found.append(reads)
        return found

    # -- steps as they come

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        if self._step is not None:
            return self._attend_static(layer, call)
        pool = self._pool
        pool.append(layer, call.key, call.value)
        pages, n_tokens = pool.pages[layer], pool.lengths[layer]
        n_raw = 0
        if isinstance(pool, PackedPool):
            pages, n_raw = pool.residual(layer), pool.residual_tokens(layer)
        H, D = self.shape.n_kv_heads, self.shape.head_dim
        kept: object = None
        if self._store is not None and layer in self._sparse:
            self._store.appended(layer, self._pool.keys, n_tokens)
            kept = self._store.before(layer, self._plan.count(n_tokens) - 1)
        if layer not in self._sparse or self._plan.reads_all(n_tokens):
            self._reads[layer] = Reads(H * n_tokens, n_raw=H * n_raw)
            return pool.attend(layer, call)
        query = Query(
            q_HGD=call.query.view(H, -1, D), kept=kept, pages=pages, n_tokens=n_tokens, plan=self._plan, call=call
        )
        scored = self._method.score(query)
        total = scored.scores_HGN.sum(dtype=torch.float32)
        self._scored = total if self._scored is None else self._scored + total.to(self._scored.device)
        chosen = choose(scored.scores_HGN, n_chosen=self._plan.n_blocks - 1, current=query.n_before, n_kv_heads=H)
        n_read: int | torch.Tensor
        raw: int | torch.Tensor
        if isinstance(pool, PackedPool):
            part, n_read, raw = self._attend_unpacked(pool, layer, query, chosen)
        else:
            (part, n_read), raw = self._attend_chosen(query, chosen), 0
        self._reads[layer] = Reads(n_read, scored.n_bytes, scored.n_flops, raw)
        return merge_partials([part], call.query, sink_logits=call.sink_logits)

    def _attend_chosen(self, query: Query, chosen: Chosen) -> tuple[Partial, "int | torch.Tensor"]:
        """Return attention over the chosen blocks, and how many tokens were read over all KV heads."""
        block, tail_tokens = query.plan.block_tokens, query.plan.tail_tokens(query.n_tokens)
        call = query.call
        if kernel_runs(call.query, query.pages):
            store = chosen_store(query.pages, chosen, block_tokens=block, tail_tokens=tail_tokens)
            in_place = stored_partial(call.query, store, scale=call.scale, softcap=call.softcap)
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
        part = token_partial(query.q_HGD, k_HTD, v_HTD, scale=call.scale, softcap=call.softcap, keep_HT=keep_HT)
        return part, n_read

    def _attend_unpacked(
        self, pool: PackedPool, layer: int, query: Query, chosen: Chosen
    ) -> tuple[Partial, torch.Tensor, torch.Tensor]:
        """Return attention over the chosen blocks, the tokens read over all KV heads, and those that are not packed."""
        block, call = query.plan.block_tokens, query.call
        n_tokens = (chosen.blocks_HB.shape[1] - 1) * block + query.plan.tail_tokens(query.n_tokens)
        within = torch.arange(block, device=chosen.blocks_HB.device)
        token_HT = (chosen.blocks_HB[:, :, None] * block + within).flatten(1)[:, :n_tokens]
        k_HTD, v_HTD = (each.to(pool.dtype) for each in pool.tokens(layer, token_HT))
        keep_HT = None
        if chosen.keep_HB is not None:
            keep_HT = chosen.keep_HB.repeat_interleave(block, 1)[:, :n_tokens]
        part = token_partial(query.q_HGD, k_HTD, v_HTD, scale=call.scale, softcap=call.softcap, keep_HT=keep_HT)
        read_HT = torch.ones_like(token_HT, dtype=torch.bool) if keep_HT is None else keep_HT
        is_raw_HT = token_HT >= query.n_tokens - pool.residual_tokens(layer)
        return part, read_HT.sum(), (read_HT & is_raw_HT).sum()

    def scored(self) -> torch.Tensor | None:
        if not self._choices:
            return self._scored
        found = [choice.checked_R[row] for choice, row in self._choices.values()]
        return torch.stack(found).sum()

    def backends(self) -> tuple[str, ...]:
        method, shape = self._method, self.shape
        # What is chosen of packed pages is unpacked in torch wherever the rest runs.
        packed = () if shape.kv is None else (f"torch: what is chosen of pages packed as {shape.kv.name}",)
        if not method.score_kernel:
            return (*packed, "torch: token scores")
        reasons = unsupported_block_scores(
            self.device,
            dtype=self._pool.dtype,
            head_dim=shape.head_dim,
            group=shape.n_q_heads // shape.n_kv_heads,
            block_tokens=None if method.summary() is not None else self._plan.block_tokens,
        )
        return (*packed, f"torch: block scores ({'; '.join(reasons)})" if reasons else "triton: block_scores")

    def managed_footprint(self) -> Footprint:
        if self._step is None:
            reads = [self._reads[layer] for layer in self.shape.layers if layer in self._reads]
        else:
            reads = self._static_reads()
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
        self._release_step()
        self._choices.clear()
        self._alone.clear()
        self._pool.clear()
        self._reads.clear()
        if self._store is not None:
            self._store.clear()
        super().close()
