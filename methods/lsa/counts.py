"""How much of a prompt ``lsa`` keeps and how often it chooses again, as its options and its indexer settle it.

An option that is left open is the trained indexer's, where one chooses.
"""

import math
from collections.abc import Callable

from kvscope.methods.budget import default_recency_tokens
from kvscope.methods.lsa.indexer_config import IndexerConfig
from kvscope.methods.lsa.layout import ChunkLayout, bound_of
from kvscope.methods.lsa.options import (
    DEFAULT_CHUNK_TOKENS,
    DEFAULT_TAU,
    DEPLOYED_LENGTH_TOKENS,
    DEPLOYED_PAGE_TOKENS,
    DEPLOYED_PAGES,
    PAGES,
    LsaConfig,
)
from kvscope.methods.lsa.rule import Rule

#: Share of the resident chunks that a refresh replaces, by the steps between refreshes: 1 - hit rate of the reference
#: model's trained indexer at 16K (docs/measurement.md).
TRAINED_CHURN = {4: 0.09, 16: 0.24, 64: 0.55}


class ChunkCounts:
    """Numbers of chunks, tokens and steps.

    Args:
        config: the options.
        trained: returns the trained indexer's configuration, None without one; asked only for what options leave open.
        chunk_tokens: tokens of a chunk, where the model settles that.
    """

    def __init__(
        self, config: LsaConfig, trained: Callable[[], IndexerConfig | None], *, chunk_tokens: int | None = None
    ) -> None:
        self._config, self._trained = config, trained
        self._chunk_tokens = config.chunk_tokens if chunk_tokens is None else chunk_tokens

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        if self._chunk_tokens is not None:
            return self._chunk_tokens
        trained = self._trained()
        return DEFAULT_CHUNK_TOKENS if trained is None else trained.chunk_tokens

    @property
    def tau(self) -> int:
        """Decode steps between refreshes."""
        if self._config.tau is not None:
            return self._config.tau
        trained = self._trained()
        return DEFAULT_TAU if trained is None else trained.tau

    def layout(self, n_tokens: int) -> ChunkLayout:
        """Return how a prompt of ``n_tokens`` is cut."""
        wanted = self._config.recency_tokens
        return ChunkLayout(
            n_tokens=n_tokens,
            chunk_tokens=self.chunk_tokens,
            sink_tokens=self._config.effective_sink_tokens,
            recency_tokens=default_recency_tokens(n_tokens) if wanted is None else wanted,
            page_chunks=self.page_chunks,
        )

    def uneven_pages(self) -> str | None:
        """Return why pages cannot be made of chunks; None where they can."""
        page_tokens, chunk_tokens = self._config.page_tokens, self.chunk_tokens
        if self._config.policy != PAGES or page_tokens % chunk_tokens == 0:
            return None
        return f"page_tokens={page_tokens} is no multiple of the indexer's chunks of {chunk_tokens} tokens"

    @property
    def page_chunks(self) -> int:
        """Chunks of what is chosen as one: 1 unless pages are."""
        return max(1, self._config.page_tokens // self.chunk_tokens) if self._config.policy == PAGES else 1

    def rule(self, layout: ChunkLayout) -> Rule:
        """Return which candidates are kept of a prompt cut like this."""
        config = self._config
        if config.policy == PAGES:
            n_chunks = self._n_pages(layout) * layout.page_chunks
            return Rule(threshold=config.threshold, n_chunks=n_chunks, page_chunks=layout.page_chunks)
        if not config.budgeted:
            cap_tokens = self.cap_tokens(layout.n_tokens)
            n_most = None if cap_tokens is None else layout.budgeted_chunks(cap_tokens)
            n_least = layout.budgeted_chunks(self.least_tokens(layout.n_tokens))
            return Rule(threshold=config.threshold, n_most=n_most, n_least=n_least)
        return Rule(n_chunks=layout.budgeted_chunks(self._budget_tokens(layout)))

    def _budget_tokens(self, layout: ChunkLayout) -> int:
        if self._config.budget_tokens is not None:
            return self._config.budget_tokens
        return int((self._config.effective_fraction or 0.0) * layout.n_tokens)

    def _n_pages(self, layout: ChunkLayout) -> int:
        """Return K_max of a prompt: as given, what a budget has room for, or the deployed number."""
        config, n_all = self._config, layout.n_candidates // layout.page_chunks
        if config.budgeted:
            return layout.budgeted_chunks(self._budget_tokens(layout)) // layout.page_chunks
        if config.pages is not None:
            return min(n_all, config.pages)
        deployed_tokens = DEPLOYED_PAGES * DEPLOYED_PAGE_TOKENS * layout.n_tokens / DEPLOYED_LENGTH_TOKENS
        return min(n_all, max(1, round(deployed_tokens / config.page_tokens)))

    def cap_tokens(self, n_tokens: int) -> int | None:
        """Return the most tokens of a prompt of ``n_tokens`` that a threshold keeps; None: any number."""
        config = self._config
        if config.capped or config.fallback_ratio is not None:
            return bound_of(n_tokens, tokens=config.cap_tokens, fraction=config.cap_fraction)
        trained = self._trained()
        return None if trained is None else trained.cap(n_tokens)

    def least_tokens(self, n_tokens: int) -> int:
        """Return the least tokens of a prompt of ``n_tokens`` that stay by a threshold, as far as the cap allows."""
        config = self._config
        if config.filled:
            return bound_of(n_tokens, tokens=config.least_tokens, fraction=config.least_fraction) or 0
        trained = self._trained()
        return 0 if trained is None else trained.least(n_tokens) or 0

    @property
    def churn(self) -> float:
        """Share of the resident chunks that a refresh of a synthetic selection replaces."""
        if self._config.churn is not None:
            return self._config.churn
        nearest = min(TRAINED_CHURN, key=lambda tau: abs(math.log(tau / self.tau)))
        return TRAINED_CHURN[nearest]
