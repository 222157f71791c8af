"""Chunks chosen by an indexer, or drawn as one of random weights would move, and what a choice keeps and reads.

Shapes: R rows of scores, L indexed layers, M hidden size, W hidden states scored at once, n candidate chunks, s their
segments (as many unless the indexer cuts chunks), E key size, K chunks of a choice.
"""

from typing import TYPE_CHECKING

import torch

from kvscope.methods.fp8_keys import dequantize, unpack
from kvscope.methods.kernels.dispatch import unsupported_scores
from kvscope.methods.kernels.select.reference import fill_selection
from kvscope.methods.lsa.indexer import Indexer, logit
from kvscope.methods.lsa.indexer_config import IndexerConfig
from kvscope.methods.lsa.layout import ChunkLayout
from kvscope.methods.lsa.rule import Rule, top_chunks
from kvscope.methods.lsa.selection import ScoringSelector, Selector
from kvscope.methods.shape import tensor_bytes
from kvscope.methods.store import PromptKV

if TYPE_CHECKING:
    from kvscope.methods.kernels.select.kernel import Selection


class IndexerSelector(ScoringSelector):
    """Scores with an indexer. Nothing is chosen twice from the same states, so choosing is lazy and once a refresh."""

    def __init__(
        self,
        indexer: Indexer,
        prompt: PromptKV,
        device: torch.device,
        *,
        layout: ChunkLayout,
        rule: Rule,
        keys_name: str,
        states_name: str | None,
    ) -> None:
        """Take keys and first states from a prompt's metadata.

        Args:
            device: where everything is scored; states of layers elsewhere come here.
            indexer: on ``device``.
            keys_name, states_name: the collectors' names; without the latter the last hidden state alone is read.

        Raises:
            ValueError: the prompt was prefilled without this indexer's collectors.
        """
        config = indexer.config
        if any(layer not in prompt.metadata.get(name, {}) for name in filter(None, (keys_name, states_name))
               for layer in config.layers):  # fmt: skip
            raise ValueError("the prompt was prefilled without this method's collectors (see union_collectors)")
        self._indexer, self._rule, self._layers = indexer, rule, config.layers
        first, last = (bound * config.segments_per_chunk for bound in (layout.first, layout.last))
        packed = [prompt.metadata[keys_name][layer][first:last] for layer in config.layers]
        pairs = [unpack(p) for p in packed]
        self._keys_LsE = torch.stack([keys for keys, _ in pairs]).to(device)
        self._scale_Ls = torch.stack([scale for _, scale in pairs]).to(device)
        width = config.lookback_tokens
        states = [_first_states(prompt, layer, width, states_name).to(device) for layer in config.layers]
        self._states_WLM = torch.stack(states, 1)  # a copy
        # Written by each step in place: a captured one has fixed addresses.
        self._incoming_LM = torch.zeros_like(self._states_WLM[-1])
        self._row = {layer: row for row, layer in enumerate(config.layers)}
        self.kernel_reasons = unsupported_scores(device, key_dim=config.key_dim, n_heads=config.heads)
        self._threshold: torch.Tensor | None = None
        self.n_chosen = rule.n_chunks
        self.metadata_bytes = tensor_bytes((self._keys_LsE, self._scale_Ls, self._states_WLM, self._incoming_LM))
        self.refresh_bytes = refresh_bytes(config, layout.n_candidates)
        self.refresh_flops = config.scoring_flops(layout.n_candidates)

    def backends(self) -> tuple[str, ...]:
        if self.kernel_reasons:
            return (f"torch: chunk scores ({'; '.join(self.kernel_reasons)})",)
        return (f"triton: {'indexer_score' if self.n_chosen is not None else 'indexer_score, select'}",)

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        self._incoming_LM[self._row[layer]].copy_(hidden_BM[0])

    def end_step(self) -> None:
        if len(self._states_WLM) > 1:
            self._states_WLM[:-1] = self._states_WLM[1:].clone()
        self._states_WLM[-1].copy_(self._incoming_LM)

    def logits(self) -> torch.Tensor:
        if not self.kernel_reasons:
            logits_Rs = self._kernel_logits()
            config = self._indexer.config
            if not config.neighbours and config.segments_per_chunk == 1:
                return logits_Rs
            return self._indexer.chunk_scores(logits_Rs.amax(0, keepdim=True)).contiguous()
        keys = [dequantize(keys, scale) for keys, scale in zip(self._keys_LsE, self._scale_Ls, strict=True)]
        return self._indexer.chunk_scores(self._indexer.logits(self._states_WLM, keys).amax(0, keepdim=True))

    def _kernel_logits(self) -> torch.Tensor:
        from kvscope.methods.kernels.indexer_score.kernel import indexer_score

        layers = [self._indexer.token_layer(layer) for layer in self._layers]
        encoded = [layer.query(self._states_WLM[:, row]) for row, layer in enumerate(layers)]
        # Queries in fp16 and keys widened, exactly: rounding queries to fp8 would choose other chunks than the torch
        # path does, and reading the keys takes as long either way.
        logits_LWs = indexer_score(
            torch.stack([q for q, _ in encoded]),
            torch.stack([weight for _, weight in encoded]),
            torch.stack([layer.bias for layer in layers]),
            self._keys_LsE,
            self._scale_Ls,
            query_precision="fp16",
        )
        return logits_LWs.flatten(0, 1)

    def choose(self) -> torch.Tensor:
        logits_Rn = self.watch(self.logits())
        if self.kernel_reasons or self._rule.n_chunks is not None:
            return self._rule.of_logits(logits_Rn.amax(0))
        from kvscope.methods.kernels.select.kernel import empty_selection

        n = logits_Rn.shape[1]
        found = empty_selection(n, n, logits_Rn.device)
        self._select(logits_Rn, found)
        n_chosen = int(found.n)
        if self._rule.n_kept(n_chosen) != n_chosen:
            return self._rule.of_logits(logits_Rn.amax(0))
        return found.chunks_K[:n_chosen].long().cpu()

    def choose_into(self, out: "Selection") -> int:
        logits_Rn = self.watch(self.logits())
        if self._rule.n_chunks is None:
            self._select(logits_Rn, out)
            n_chosen = int(out.n)
            n_kept = self._rule.n_kept(n_chosen)
            if n_kept != n_chosen:  # the best are those over the threshold, so that filling up displaces none
                fill_selection(out, top_chunks(logits_Rn.amax(0), n_kept))
            return n_kept
        # A stable order, not the k-th best score as a threshold: equal scores at the edge would be one too many.
        chosen = self._rule.fixed(logits_Rn.amax(0))
        fill_selection(out, chosen)
        return len(chosen)

    def _select(self, logits_Rn: torch.Tensor, out: "Selection") -> None:
        from kvscope.methods.kernels.select.ops import select

        assert self._rule.threshold is not None
        if self._threshold is None:
            self._threshold = torch.full((1,), logit(self._rule.threshold), device=logits_Rn.device)
        select(logits_Rn, self._threshold, out)

    def close(self) -> None:
        self._keys_LsE = self._scale_Ls = self._states_WLM = self._incoming_LM = torch.empty(0)
        self._threshold = None


class SyntheticSelector(Selector):
    """Scores as an indexer of random weights does, for the bytes and the time of it, then draws: at each choice a share
    of the chunks chosen before is replaced by others, as a trained indexer's choices were measured to move.

    The weights' own choices would follow noise, and move nearly everything.
    """

    def __init__(self, indexer: ScoringSelector, *, layout: ChunkLayout, churn: float, seed: int) -> None:
        """Draw for one sequence.

        Args:
            indexer: with a budget: every choice has the same size K.
            churn: share of K that a choice replaces; fewer where too few others are there.
        """
        assert indexer.n_chosen is not None
        self._indexer, self.n_chosen = indexer, indexer.n_chosen
        self.metadata_bytes, self.refresh_bytes = indexer.metadata_bytes, indexer.refresh_bytes
        self.refresh_flops = indexer.refresh_flops
        n_others = layout.n_candidates - self.n_chosen
        self.most_new = min(round(churn * self.n_chosen), n_others)
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._is_held_n: torch.Tensor | None = None

    def backends(self) -> tuple[str, ...]:
        return self._indexer.backends()

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        self._indexer.observe(layer, hidden_BM)

    def end_step(self) -> None:
        self._indexer.end_step()

    def choose(self) -> torch.Tensor:
        return self._draw().cpu()

    def choose_into(self, out: "Selection") -> int:
        fill_selection(out, self._draw())
        assert self.n_chosen is not None
        return self.n_chosen

    def _draw(self) -> torch.Tensor:
        """Return the next choice, ascending, on the device; nothing waits for the device."""
        scores_n = self.watch(self._indexer.logits()).amax(0)
        n, K = len(scores_n), self.n_chosen
        assert K is not None
        if self._generator is None:
            self._generator = torch.Generator(scores_n.device).manual_seed(self._seed)
        draw_n = torch.rand(n, generator=self._generator, device=scores_n.device)
        n_new = K if self._is_held_n is None else self.most_new
        assert n_new is not None
        held_n = (
            torch.zeros(n, dtype=torch.bool, device=scores_n.device) if self._is_held_n is None else self._is_held_n
        )
        others = draw_n.masked_fill(held_n, -1.0).topk(n_new).indices
        stay = draw_n.masked_fill(~held_n, -1.0).topk(K - n_new).indices
        chosen = torch.cat((stay, others)).sort().values
        self._is_held_n = torch.zeros_like(held_n).index_fill_(0, chosen, value=True)
        return chosen

    def close(self) -> None:
        self._indexer.close()
        self._is_held_n = None


def metadata_bytes(config: IndexerConfig, n_candidates: int, *, element_bytes: int) -> int:
    """Return the device bytes an indexer keeps of one sequence: keys and scales, the states it will score with, and
    those of the step that runs."""
    states = (config.lookback_tokens + 1) * len(config.layers) * config.hidden_size * element_bytes
    return n_candidates * config.chunk_key_bytes + states


def refresh_bytes(config: IndexerConfig, n_candidates: int) -> int:
    """Return the bytes one refresh reads: every key with its scale, the weights of the query side, and what lending
    costs."""
    heads, rank, width = config.heads, config.rank, config.hidden_size
    query_weights = width + width * rank + rank + rank * heads * config.key_dim + (width + 1) * heads + 1
    weights = len(config.layers) * query_weights + 2 * config.neighbours
    return n_candidates * config.chunk_key_bytes + 4 * weights


def _first_states(prompt: PromptKV, layer: int, width: int, states_name: str | None) -> torch.Tensor:
    """Return the last ``width`` states of the prompt [W, M]; a shorter prompt repeats its oldest."""
    states = prompt.last_hidden[layer] if states_name is None else prompt.metadata[states_name][layer]
    missing = width - len(states)
    return states if missing <= 0 else torch.cat([states[:1].expand(missing, -1), states])
