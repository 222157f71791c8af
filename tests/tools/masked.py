"""The oracles of eviction: every token stays on the device, and what a method would drop, or not read, is masked.

Shapes: Q query heads, H KV heads, G = Q/H, D head size, S slots (pages), P tokens a page, T tokens, N blocks.
"""

import copy
from dataclasses import replace
from functools import singledispatch

import torch
from eviction_plain import snapkv_kept

from kvscope.methods.adakv.method import AdaKV
from kvscope.methods.attention import Partial, merge_partials
from kvscope.methods.base import SequenceCache
from kvscope.methods.block_sequence import BlockSparseSequence
from kvscope.methods.block_sparse import BlockSparse
from kvscope.methods.eviction.kept import KeptTokens
from kvscope.methods.eviction.stepwise import StepwiseEviction
from kvscope.methods.gather import token_partial
from kvscope.methods.lsa.labels import token_logits
from kvscope.methods.lsa.method import Lsa
from kvscope.methods.lsa.schedule import LsaSequence
from kvscope.methods.resident import ResidentSequence, StaticResidency
from kvscope.methods.shape import Footprint
from kvscope.methods.sliding_window.method import SlidingWindow
from kvscope.methods.sliding_window.sequence import back
from kvscope.methods.snapkv.method import SnapKV
from kvscope.methods.store import PagePool


def masking(method):
    """Return the same method whose sequences mask instead of evicting."""
    oracle = copy.copy(method)
    oracle.open = lambda prompt, device, *, reserve_tokens=0: open_masked(
        method, prompt, torch.device(device), reserve_tokens
    )
    return oracle


@singledispatch
def open_masked(method, prompt, device, reserve_tokens):
    """Open a prompt under the oracle of a method; a new kind of method registers its own here."""
    raise TypeError(f"tests/tools/masked.py has no oracle for {method!r}: write one")


@open_masked.register
def _(method: StaticResidency, prompt, device, reserve_tokens):
    return MaskedResident(prompt, device, ranges=method.resident_ranges(prompt), reserve_tokens=reserve_tokens)


@open_masked.register
def _(method: KeptTokens, prompt, device, reserve_tokens):
    return MaskedKept(prompt, device, kept=method.kept(prompt), reserve_tokens=reserve_tokens)


@open_masked.register
def _(method: SnapKV, prompt, device, reserve_tokens):
    if method.config.interval_steps is None:
        return MaskedKept(prompt, device, kept=method.kept(prompt), reserve_tokens=reserve_tokens)
    return MaskedReapplied(method, prompt, device, reserve_tokens)


@open_masked.register
def _(method: AdaKV, prompt, device, reserve_tokens):
    return MaskedKept(prompt, device, kept=method.kept(prompt), reserve_tokens=reserve_tokens)


@open_masked.register
def _(method: StepwiseEviction, prompt, device, reserve_tokens):
    return MaskedStepwise(method, prompt, device, reserve_tokens)


@open_masked.register
def _(method: SlidingWindow, prompt, device, reserve_tokens):
    window_tokens = method.window_tokens(prompt.n_tokens, prompt.shape)
    sinks = min(method.config.sinks, prompt.n_tokens)
    return MaskedStreaming(prompt, device, sinks=sinks, window_tokens=window_tokens, reserve_tokens=reserve_tokens)


@open_masked.register
def _(method: BlockSparse, prompt, device, reserve_tokens):
    return MaskedBlockSparse(method, prompt, device, reserve_tokens=reserve_tokens)


@open_masked.register
def _(method: Lsa, prompt, device, reserve_tokens):
    def open_with(prompt, device, selector, *, layout, reserve_tokens=0):
        schedule = method.schedule(prompt.shape, selector)
        options = {"layout": layout, "selector": selector, "schedule": schedule, "reserve_tokens": reserve_tokens}
        return MaskedLsa(prompt, torch.device(device), **options)

    oracle = copy.copy(method)
    oracle.open_with = open_with  # a method with choices of its own brings them along
    return oracle.open(prompt, device, reserve_tokens=reserve_tokens)


def masked_partial(call, query, pages, keep_SP):
    """Attention of one query over the kept tokens of pages [S, H, 2, P, D], in fp32 with the logits written out.

    What is kept may differ by head: [H, S, P].
    """
    H, D = pages.shape[1], pages.shape[4]
    k_HTD, v_HTD = (pages[:, :, kind].transpose(0, 1).reshape(H, -1, D).float() for kind in (0, 1))
    logits_HGT = (query.view(H, -1, D).float() * call.scale) @ k_HTD.transpose(1, 2)
    if call.softcap is not None:
        logits_HGT = call.softcap * torch.tanh(logits_HGT / call.softcap)
    keep = keep_SP.flatten() if keep_SP.ndim == 2 else keep_SP.flatten(1)[:, None]
    logits_HGT = logits_HGT.masked_fill(~keep, -torch.inf)
    lse_HG = torch.logsumexp(logits_HGT, -1)
    # A query that may read nothing adds nothing to the union.
    weights_HGT = torch.exp(logits_HGT - lse_HG.clamp_min(torch.finfo(torch.float32).min)[..., None])
    return Partial(weights_HGT @ v_HTD, lse_HG)


def masked_attention(call, pages, keep_SP):
    """``masked_partial`` by itself, [1, Q, 1, D]."""
    part = masked_partial(call, call.query, pages, keep_SP)
    return merge_partials([part], call.query, sink_logits=call.sink_logits)


def stored(pool, layer):
    """Which tokens of a pool's pages are stored, [S, P]."""
    n_slots, P = pool.pages[layer].shape[0], pool.shape.page_tokens
    return (torch.arange(n_slots * P, device=pool.pages[layer].device) < pool.lengths[layer]).view(n_slots, P)


class MaskedResident(ResidentSequence):
    """Of a set chosen at opening."""

    def static_reasons(self):
        return ["a masked step is made anew each time"]

    def __init__(self, prompt, device, *, ranges, reserve_tokens=0):
        super().__init__(prompt, device, ranges=[(0, prompt.n_tokens)], reserve_tokens=reserve_tokens)
        self._dropped = torch.ones(prompt.n_tokens, dtype=torch.bool, device=device)
        for start, end in ranges:
            self._dropped[start:end] = False

    def attend(self, layer, call):
        self.pool.append(layer, call.key, call.value)
        keep = stored(self.pool, layer)
        keep.view(-1)[: len(self._dropped)] &= ~self._dropped
        return masked_attention(call, self.pool.pages[layer], keep)


class MaskedKept(ResidentSequence):
    """Of tokens that differ by head, chosen at opening."""

    def static_reasons(self):
        return ["a masked step is made anew each time"]

    def __init__(self, prompt, device, *, kept, reserve_tokens=0):
        super().__init__(prompt, device, ranges=[(0, prompt.n_tokens)], reserve_tokens=reserve_tokens)
        self._alive = {}
        for layer, heads in kept.items():
            self._alive[layer] = torch.zeros((self.shape.n_kv_heads, prompt.n_tokens), dtype=torch.bool, device=device)
            for alive_N, token_n in zip(self._alive[layer], heads, strict=True):
                alive_N[token_n] = True

    def attend(self, layer, call):
        self.pool.append(layer, call.key, call.value)
        keep = stored(self.pool, layer).expand(self.shape.n_kv_heads, -1, -1).clone()
        alive_HN = self._alive[layer]
        keep.view(len(keep), -1)[:, : alive_HN.shape[1]] &= alive_HN
        return masked_attention(call, self.pool.pages[layer], keep)


class MaskedReapplied(MaskedKept):
    """Of a choice made anew every so many steps, by the attention of the last queries over what is there."""

    def __init__(self, method, prompt, device, reserve_tokens):
        super().__init__(prompt, device, kept=method.kept(prompt), reserve_tokens=reserve_tokens)
        self._config, self._budget = method.config, method.config.wanted_tokens(prompt.n_tokens)
        self._queries = {layer: [] for layer in self.shape.layers}

    def attend(self, layer, call):
        self._alive[layer] = torch.nn.functional.pad(self._alive[layer], (0, 1), value=True)
        attended = super().attend(layer, call)
        self._queries[layer].append(call.query)
        if len(self._queries[layer]) % self._config.interval_steps == 0:
            self._choose(layer, call)
        return attended

    def _choose(self, layer, call):
        n, window, H = self.pool.lengths[layer], self._config.window_tokens, self.shape.n_kv_heads
        rows = []
        for n_after, query in enumerate(reversed(self._queries[layer][-window:])):
            seen = n - n_after
            logits_QT = token_logits(replace(call, query=query), self.pool.pages[layer], n_tokens=seen)
            logits_QT = torch.nn.functional.pad(logits_QT, (0, n_after), value=-torch.inf)
            rows.insert(0, logits_QT)
        logits_HGWT = torch.stack(rows, 1).view(H, -1, window, n)
        for head in range(H):
            alive_n = self._alive[layer][head].nonzero()[:, 0]
            if len(alive_n) <= self._budget:
                continue
            logits_GWT = logits_HGWT[head][..., alive_n]
            if call.sink_logits is not None:
                sink_GW1 = call.sink_logits.view(H, -1)[head][:, None, None].expand(-1, window, 1)
                logits_GWT = torch.cat([logits_GWT, sink_GW1], -1)
            weights_GWT = torch.softmax(logits_GWT, -1)[..., : len(alive_n)]
            whole_GTT = weights_GWT.new_zeros((len(weights_GWT), len(alive_n), len(alive_n)))
            whole_GTT[:, -window:] = weights_GWT
            [places] = snapkv_kept(
                whole_GTT,
                1,
                budget=self._budget,
                window=window,
                kernel=self._config.kernel_size,
                pooling=self._config.pooling,
            )
            self._alive[layer][head] = False
            self._alive[layer][head, alive_n[places]] = True


class MaskedStepwise(SequenceCache):
    """Of a cache of fixed size: every token stays, and those that left are masked. TOVA's rule and H2O's, in words.

    Before a step the least token leaves, where the cache is full; then the step's token enters and is attended to.
    """

    def __init__(self, method, prompt, device, reserve_tokens):
        super().__init__(prompt, device)
        self._pool = PagePool(self.shape, n_tokens=prompt.n_tokens + reserve_tokens, dtype=prompt.dtype, device=device)
        self._pool.load(prompt, [(0, prompt.n_tokens)])
        self._accumulates = method.name == "h2o"
        N, H = prompt.n_tokens, self.shape.n_kv_heads
        self._capacity = method.capacity_tokens(N) or 10**9
        self._recent = method.recent_tokens(self._capacity) if self._accumulates else 0
        self._alive = {layer: torch.ones((H, N), dtype=torch.bool, device=device) for layer in self.shape.layers}
        self._scores = {layer: torch.zeros((H, N), device=device) for layer in self.shape.layers}
        for layer in self.shape.layers if N else ():
            self._scores[layer] += method.scores(prompt, layer).to(device)
            while self._alive[layer][0].sum() > self._capacity:
                # The last tokens of the prompt are the recent ones, before another has come.
                self._drop(layer, is_recent_N=torch.arange(N, device=device) >= N - self._recent)

    def _drop(self, layer, is_recent_N):
        stays_HN = ~self._alive[layer] | is_recent_N
        least_H = self._scores[layer].masked_fill(stays_HN, torch.inf).argmin(1)
        self._alive[layer].scatter_(1, least_H[:, None], False)

    @property
    def n_tokens(self):
        return self._pool.lengths[self.shape.layers[-1]]

    def attend(self, layer, call):
        n = self._pool.lengths[layer]
        if self._alive[layer][0].sum() == self._capacity:
            self._drop(layer, is_recent_N=torch.arange(n, device=self.device) > n - self._recent)
        self._pool.append(layer, call.key, call.value)
        self._alive[layer] = torch.nn.functional.pad(self._alive[layer], (0, 1), value=True)
        pages = self._pool.pages[layer]
        n_room = pages.shape[0] * self.shape.page_tokens
        keep = torch.nn.functional.pad(self._alive[layer], (0, n_room - n - 1))
        logits_HGT = token_logits(call, pages, n_tokens=n + 1).view(len(keep), -1, n + 1)
        logits_HGT = logits_HGT.masked_fill(~self._alive[layer][:, None], -torch.inf)
        if call.sink_logits is None:
            weights_HGT = torch.softmax(logits_HGT, -1)
        else:
            sink_HG1 = call.sink_logits.view(len(keep), -1, 1)
            weights_HGT = torch.softmax(torch.cat([sink_HG1, logits_HGT], -1), -1)[..., 1:]
        if self._accumulates:
            self._scores[layer] = torch.nn.functional.pad(self._scores[layer], (0, 1)) + weights_HGT.sum(1)
        else:
            self._scores[layer] = weights_HGT.mean((0, 1)).expand(len(keep), -1)
        return masked_attention(call, pages, keep.view(len(keep), pages.shape[0], -1))

    def managed_footprint(self):
        return Footprint(kv_bytes=self._pool.n_bytes)

    def close(self):
        self._pool.clear()
        super().close()


class MaskedStreaming(SequenceCache):
    """Of sinks and a ring: two masks over the same full cache, the sinks' query turned back."""

    def __init__(self, prompt, device, *, sinks, window_tokens, reserve_tokens=0):
        super().__init__(prompt, device)
        self._pool = PagePool(self.shape, n_tokens=prompt.n_tokens + reserve_tokens, dtype=prompt.dtype, device=device)
        self._pool.load(prompt, [(0, prompt.n_tokens)])
        self._n_sinks, self._n_window = sinks, window_tokens

    @property
    def n_tokens(self):
        return self._pool.lengths[self.shape.layers[-1]]

    def attend(self, layer, call):
        self._pool.append(layer, call.key, call.value)
        pages, n_tokens = self._pool.pages[layer], self._pool.lengths[layer]
        position_SP = torch.arange(pages.shape[0] * self.shape.page_tokens, device=self.device).view(len(pages), -1)
        first = max(self._n_sinks, n_tokens - self._n_window)
        parts = [masked_partial(call, call.query, pages, (position_SP >= first) & stored(self._pool, layer))]
        if self._n_sinks:
            q_sink = back(call, first - self._n_sinks)
            parts.append(masked_partial(call, q_sink, pages, position_SP < self._n_sinks))
        return merge_partials(parts, call.query, sink_logits=call.sink_logits)

    def managed_footprint(self):
        n_resident = min(self.n_tokens, self._n_sinks + self._n_window)
        return Footprint(
            kv_bytes=self._pool.n_bytes,
            bytes_read_per_step=self.shape.read_bytes(n_resident),
            attention_flops_per_step=self.shape.attention_flops(n_resident),
        )

    def close(self):
        self._pool.clear()
        super().close()


class MaskedBlockSparse(BlockSparseSequence):
    """Of chosen blocks: every page is read, and what the query did not choose is masked."""

    def _attend_chosen(self, query, chosen):
        H, n_blocks = chosen.blocks_HB.shape[0], query.n_before + 1
        read_HN = torch.zeros((H, n_blocks), dtype=torch.bool, device=chosen.blocks_HB.device)
        read_HN.scatter_(1, chosen.blocks_HB, True)  # an entry that does not count repeats one that does
        keep_HT = read_HN.repeat_interleave(query.plan.block_tokens, 1)[:, : query.n_tokens]
        k_HTD, v_HTD = (query.pages[:, :, i].transpose(0, 1).flatten(1, 2)[:, : query.n_tokens] for i in (0, 1))
        options = {"scale": query.call.scale, "softcap": query.call.softcap, "keep_HT": keep_HT}
        return token_partial(query.q_HGD, k_HTD, v_HTD, **options), keep_HT.sum()


class MaskedLsa(LsaSequence):
    """Of recalled chunks: what is not resident is masked."""

    def __init__(self, prompt, device, *, layout, selector, schedule, reserve_tokens=0):
        super().__init__(prompt, device, layout=layout, selector=selector, schedule=schedule)
        self._pool = PagePool(self.shape, n_tokens=prompt.n_tokens + reserve_tokens, dtype=prompt.dtype, device=device)
        self._pool.load(prompt, [(0, prompt.n_tokens)])
        self._ids = dict.fromkeys(self.shape.layers, torch.empty(0, dtype=torch.long))
        self._next = {}
        self._first_refresh()

    def _append(self, layer, k_BH1D, v_BH1D):
        self._pool.append(layer, k_BH1D, v_BH1D)

    def _attend(self, layer, call):
        layout, C = self._layout, self._layout.chunk_tokens
        keep = stored(self._pool, layer)
        flat = keep.view(-1)
        flat[layout.first * C : layout.last * C] = False
        for chunk in self._ids[layer].tolist():
            flat[chunk * C : (chunk + 1) * C] = True
        return masked_attention(call, self._pool.pages[layer], keep)

    def _place(self, layer, wanted):
        if self._schedule.stale and len(self._moved_bytes) > 1:
            self._ids[layer] = self._next.get(layer, self._ids[layer])
            self._next[layer] = wanted
        n_kept = int(torch.isin(wanted, self._ids[layer]).sum())
        if layer not in self._next:
            self._ids[layer] = wanted
        chunk_bytes = self._layout.chunk_tokens * self.shape.layer_bytes_per_token
        return (len(wanted) - n_kept) * chunk_bytes, n_kept

    def _logits(self, layer, call):
        n_prompt, n_tokens = self._layout.n_tokens, self._pool.lengths[layer]
        logits_QT = token_logits(call, self._pool.pages[layer], n_tokens=n_tokens)
        return logits_QT[:, :n_prompt], logits_QT[:, n_prompt:]

    def _chosen_tokens(self, *, arriving=True):
        total = 0
        for layer, ids in self._ids.items():
            coming = self._next.get(layer, ids[:0]) if arriving else ids[:0]
            total += len(torch.unique(torch.cat([ids, coming])))
        return round(total * self._layout.chunk_tokens / len(self._ids))

    def managed_footprint(self):
        n_static = self._pool.lengths[self.shape.layers[-1]] - self._layout.candidate_tokens
        return self._reads(kv_bytes=self._pool.n_bytes, static_tokens=n_static)

    def close(self):
        self._pool.clear()
        super().close()
