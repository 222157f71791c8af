"""``indexer=landmark``: the model's own last queries against bounds of each chunk's keys; nothing is trained.

At a refresh the last queries of every managed layer (the prompt's last at the first one, then those of the steps) meet
the element-wise least and greatest key of each chunk. Quest's upper bound of q . k over a chunk (arXiv 2406.10774,
section 3.3) is turned into shares among the candidates, and one set serves all layers, as with an indexer. Mean keys,
and the best of several means a chunk, were tried and held fewer of the chunks that are needed (docs/log.md).

Shapes: L managed layers, Q query heads, H KV heads, G = Q/H, D head size, W queries, n candidate chunks.
"""

from typing import TYPE_CHECKING

import torch

from kvscope.methods.base import AttentionCall, Collector
from kvscope.methods.kernels.select.reference import fill_selection
from kvscope.methods.lsa.layout import ChunkLayout
from kvscope.methods.lsa.rule import Rule, top_chunks
from kvscope.methods.lsa.selection import Selector
from kvscope.methods.quest.method import min_max, upper_bounds
from kvscope.methods.shape import ModelShape, tensor_bytes
from kvscope.methods.store import PromptKV
from kvscope.methods.summaries import Summary, SummaryCollector, summary_bytes

if TYPE_CHECKING:
    from kvscope.methods.kernels.select.kernel import Selection

#: Queries a refresh scores with.
N_QUERIES = 16
QUERIES_NAME = f"last_queries_{N_QUERIES}"


def bounds_of(chunk_tokens: int) -> Summary:
    """Return what is kept of a chunk: its element-wise least and greatest key."""
    # By the name of quest's: what two methods of a run keep is collected once.
    return Summary(
        name=f"key_min_max_{chunk_tokens}", n_vectors=2, of_blocks=min_max, block_tokens=lambda n_tokens: chunk_tokens
    )


def landmark_collectors(layer: int, chunk_tokens: int) -> list[Collector]:
    """Return what a prefill leaves behind for one managed layer."""
    return [SummaryCollector(bounds_of(chunk_tokens), layer), LastQueries(layer)]


def landmark_metadata_bytes(shape: ModelShape, n_candidates: int) -> int:
    """Return the device bytes of one sequence: bounds, the queries kept, and those of the step that runs."""
    return len(shape.layers) * (summary_bytes(shape, 2, n_candidates) + (N_QUERIES + 1) * _step_bytes(shape))


def landmark_refresh_bytes(shape: ModelShape, n_candidates: int) -> int:
    """Return the bytes one refresh reads: bounds and queries."""
    return len(shape.layers) * (summary_bytes(shape, 2, n_candidates) + N_QUERIES * _step_bytes(shape))


def landmark_refresh_flops(shape: ModelShape, n_candidates: int) -> int:
    """Return the FLOPs of a refresh's products, two a query, head and chunk (a MAC is two)."""
    return len(shape.layers) * N_QUERIES * shape.n_q_heads * shape.head_dim * n_candidates * 4


def _step_bytes(shape: ModelShape) -> int:
    """Bytes of one layer's queries of one token."""
    return shape.n_q_heads * shape.head_dim * shape.element_bytes


class LastQueries(Collector):
    """Keeps the queries of the prompt's last tokens, scaled: their products with keys are logits."""

    hears_attention = True

    def __init__(self, layer: int) -> None:
        self.name, self.layer = QUERIES_NAME, layer
        self._found: torch.Tensor | None = None

    def chunk(self, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, hidden_BSM: torch.Tensor, *, start_tokens: int) -> None:
        """Keys and hidden states are not kept."""

    def attention(self, call: AttentionCall, *, start_tokens: int) -> None:
        del start_tokens
        last = (call.query[0, :, -N_QUERIES:] * call.scale).transpose(0, 1)
        self._found = last if self._found is None else torch.cat([self._found, last])[-N_QUERIES:]

    def finish(self) -> torch.Tensor:
        """Return at most ``N_QUERIES`` queries, oldest first, [W, Q, D], on the model's device."""
        return torch.empty(0) if self._found is None else self._found


class LandmarkSelector(Selector):
    """Chooses the chunks to which a bound promises the most attention."""

    def __init__(self, prompt: PromptKV, device: torch.device, *, layout: ChunkLayout, rule: Rule) -> None:
        """Copy a prompt's bounds and queries.

        Args:
            device: where everything is scored; bounds and queries of layers elsewhere come here.
            rule: with a budget.

        Raises:
            ValueError: the prompt was prefilled without these collectors.
        """
        shape = prompt.shape
        names = (bounds_of(layout.chunk_tokens).name, QUERIES_NAME)
        bounds, queries = (prompt.metadata.get(name, {}) for name in names)
        if any(not len(each.get(layer, ())) for each in (bounds, queries) for layer in shape.layers):
            raise ValueError("the prompt was prefilled without this method's collectors (see union_collectors)")
        assert rule.n_chunks is not None
        self.n_chosen = rule.n_chunks
        candidates = slice(layout.first, layout.last)
        self._bounds = [bounds[layer][candidates].to(device, copy=True) for layer in shape.layers]
        # A short prompt's oldest query stands in for those it lacks: a maximum does not mind.
        self._queries_LWQD = torch.stack([_widened(queries[layer]).to(device) for layer in shape.layers])
        # Written by each step in place: a captured one has fixed addresses.
        self._incoming_LQD = torch.zeros_like(self._queries_LWQD[:, 0])
        self._row = {layer: row for row, layer in enumerate(shape.layers)}
        self._n_heads, self._oldest = shape.n_kv_heads, 0
        self.metadata_bytes = tensor_bytes([*self._bounds, self._queries_LWQD, self._incoming_LQD])
        self.refresh_bytes = landmark_refresh_bytes(shape, layout.n_candidates)
        self.refresh_flops = landmark_refresh_flops(shape, layout.n_candidates)

    def backends(self) -> tuple[str, ...]:
        return ("torch: landmark scores",)

    def query_place(self, layer: int) -> torch.Tensor:
        return self._incoming_LQD[self._row[layer]]

    def end_step(self) -> None:
        # Which query is which does not matter to a maximum, so the newest takes the oldest one's place.
        self._queries_LWQD[:, self._oldest].copy_(self._incoming_LQD)
        self._oldest = (self._oldest + 1) % N_QUERIES

    def scores(self) -> torch.Tensor:
        """Return the greatest share of attention that any layer is promised by any query, heads averaged, fp32 [n]."""
        found: torch.Tensor | None = None
        for bounds_nH2D, queries_WQD in zip(self._bounds, self._queries_LWQD, strict=True):
            W, _, D = queries_WQD.shape
            q_HGD = queries_WQD.view(W, self._n_heads, -1, D).transpose(0, 1).reshape(self._n_heads, -1, D)
            logits_HWGn = upper_bounds(q_HGD, bounds_nH2D).view(self._n_heads, W, -1, len(bounds_nH2D))
            best_n = logits_HWGn.softmax(3).mean((0, 2)).amax(0)
            found = best_n if found is None else torch.maximum(found, best_n)
        assert found is not None
        return found

    def choose(self) -> torch.Tensor:
        return self._best().cpu()

    def choose_into(self, out: "Selection") -> int:
        chosen = self._best()
        fill_selection(out, chosen)
        return len(chosen)

    def _best(self) -> torch.Tensor:
        assert self.n_chosen is not None
        return top_chunks(self.watch(self.scores()), self.n_chosen)

    def close(self) -> None:
        self._bounds = []
        self._queries_LWQD = self._incoming_LQD = torch.empty(0)


def _widened(queries_WQD: torch.Tensor) -> torch.Tensor:
    missing = N_QUERIES - len(queries_WQD)
    return queries_WQD if missing <= 0 else torch.cat([queries_WQD[:1].expand(missing, -1, -1), queries_WQD])
