"""Which prompt tokens always stay and which chunks are chosen, for one prompt length. No torch."""

from dataclasses import dataclass
from math import gcd

TokenRange = tuple[int, int]


def bound_of(n_tokens: int, *, tokens: int | None, fraction: float | None) -> int | None:
    """Return the most, or least, tokens of a prompt that stay by a threshold: the larger of a number and a fraction.

    A number alone runs out on long prompts, of whose length the window is a share; a fraction alone is short where
    bytes are not (docs/lsa-study.md).

    Returns:
        Tokens, sinks and window included; None where neither bounds.
    """
    bounds = [] if tokens is None else [tokens]
    if fraction is not None:
        bounds.append(int(fraction * n_tokens))
    return max(bounds, default=None)


def bounds_error(
    *, cap_tokens: int | None, cap_fraction: float | None, least_tokens: int | None, least_fraction: float | None
) -> str | None:
    """Return what is wrong with the values of a cap and of a least share; None where nothing is."""
    if cap_tokens is not None and cap_tokens < 1:
        return f"cap_tokens must be 1 or more, got {cap_tokens}"
    if cap_fraction is not None and not 0 < cap_fraction <= 1:
        return f"cap_fraction must be above 0 and at most 1, got {cap_fraction}"
    if least_tokens is not None and least_tokens < 0:
        return f"least_tokens must be 0 or more, got {least_tokens}"
    if least_fraction is not None and not 0 <= least_fraction <= 1:
        return f"least_fraction must be between 0 and 1, got {least_fraction}"
    return None


@dataclass(frozen=True, kw_only=True)
class ChunkLayout:
    """A prompt cut into chunks of ``chunk_tokens`` from its start.

    Sinks and recency window are widened to whole chunks (to whole pages where pages are chosen), so that every token is
    in exactly one of three places: in the sinks, in the window (with the last, incomplete chunk), or in one of the
    candidate chunks between them.

    Attributes:
        n_tokens: prompt tokens prefilled.
        chunk_tokens: tokens of a chunk.
        sink_tokens: first tokens that stay, before widening.
        recency_tokens: last tokens that stay, before widening.
        page_chunks: chunks of a page; candidates are whole pages, counted from the prompt's start.
    """

    n_tokens: int
    chunk_tokens: int
    sink_tokens: int
    recency_tokens: int
    page_chunks: int = 1

    def unit_tokens(self, page_tokens: int) -> int:
        """Return the tokens that are recalled in one piece: the most that divide a chunk and a page."""
        return gcd(self.chunk_tokens, page_tokens)

    @property
    def n_whole(self) -> int:
        """Whole chunks of the prompt."""
        return self.n_tokens // self.chunk_tokens

    @property
    def n_chunks(self) -> int:
        """Chunks of the prompt, the incomplete last one included."""
        return -(-self.n_tokens // self.chunk_tokens)

    @property
    def first(self) -> int:
        """First candidate chunk."""
        page_tokens = self.page_chunks * self.chunk_tokens
        return min(-(-self.sink_tokens // page_tokens), self.n_tokens // page_tokens) * self.page_chunks

    @property
    def last(self) -> int:
        """Chunk behind the last candidate; not below ``first``."""
        before_window = max(0, self.n_tokens - self.recency_tokens)
        page_tokens = self.page_chunks * self.chunk_tokens
        return max(self.first, before_window // page_tokens * self.page_chunks)

    @property
    def n_candidates(self) -> int:
        """Chunks to choose from; each is whole."""
        return self.last - self.first

    @property
    def candidate_tokens(self) -> int:
        """Tokens of the candidate chunks."""
        return self.n_candidates * self.chunk_tokens

    @property
    def static_tokens(self) -> int:
        """Tokens that always stay: sinks and window, widened."""
        return self.n_tokens - self.candidate_tokens

    @property
    def static_ranges(self) -> list[TokenRange]:
        """Token ranges of sinks and window."""
        if not self.n_candidates:
            return [(0, self.n_tokens)]
        C = self.chunk_tokens
        ranges = [(0, self.first * C), (self.last * C, self.n_tokens)]
        return [(start, end) for start, end in ranges if end > start]

    def budgeted_chunks(self, budget_tokens: int) -> int:
        """Return how many candidates fit a budget of prompt tokens that sinks and window are counted in."""
        return max(0, min(self.n_candidates, (budget_tokens - self.static_tokens) // self.chunk_tokens))
