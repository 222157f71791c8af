"""Random chunks, the ablation of arXiv 2606.09079: the recency window and a random tenth of the chunks before it."""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from kvscope.errors import UsageError
from kvscope.methods.budget import budget_tokens, check_budget, default_recency_tokens
from kvscope.methods.resident import StaticResidency
from kvscope.methods.shape import ModelShape
from kvscope.methods.store import PromptKV, TokenRange
from kvscope.units import Bytes, Tokens


@dataclass(frozen=True, kw_only=True)
class RandomConfig:
    """Options of ``random``.

    Attributes:
        fraction: of the chunks before the recency window that stays; 1 keeps every token.
        chunk_tokens: tokens of a chunk.
        recency_tokens: prompt tokens that always stay; None: min(8192, max(128, length / 64)).
        seed: mixed with the sample's seed and its prompt's hash.
        budget_bytes: bytes for the prompt's KV over all layers; sets the number of chunks, instead of ``fraction``.
        budget_fraction: fraction of the prompt's tokens that stays, recency window included, instead of ``fraction``.
    """

    fraction: float = 0.1
    chunk_tokens: Tokens = 64
    recency_tokens: Tokens | None = None
    seed: int = 0
    budget_bytes: Bytes | None = None
    budget_fraction: float | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget_bytes, self.budget_fraction)
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be between 0 and 1, got {self.fraction}")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be positive, got {self.chunk_tokens}")
        if self.recency_tokens is not None and self.recency_tokens < 0:
            raise ValueError(f"recency_tokens must be 0 or more, got {self.recency_tokens}")


class RandomChunks(StaticResidency[RandomConfig]):
    """The recency window and chunks drawn once a sequence, then every decoded token."""

    name = "random"
    stays = "the last tokens of the prompt, a random tenth of the chunks before them and every decoded token"
    saves = "nine tenths of the bytes and reads; what lies in a chunk not drawn is lost"
    source = "'Random 10%' of Lookahead Sparse Attention, arXiv 2606.09079"
    cost = "resident = read = R + fraction * (N - R) + decoded tokens a layer, R as in recency"
    saving_kind = "freed"
    kv_refusal = ""
    budget_sets_window = False
    Config = RandomConfig

    def n_resident_tokens(self, n_tokens: int, shape: ModelShape | None) -> int:
        if self.keeps_all(n_tokens, shape):
            return n_tokens
        recency_tokens, n_drawn, _ = self._split(n_tokens, shape)
        return recency_tokens + n_drawn * self.config.chunk_tokens

    def keeps_all(self, n_tokens: int, shape: ModelShape | None) -> bool:
        """Whether the options ask for every token of a prompt, those in no chunk included."""
        budgeted = budget_tokens(self.name, n_tokens, options=self.config, shape=shape)
        return self.config.fraction == 1 if budgeted is None else budgeted >= n_tokens

    def resident_ranges(self, prompt: PromptKV) -> list[TokenRange]:
        if self.keeps_all(prompt.n_tokens, prompt.shape):
            return [(0, prompt.n_tokens)]
        recency_tokens, n_drawn, n_chunks = self._split(prompt.n_tokens, prompt.shape)
        text = f"{self.config.seed}/{prompt.seed}/{prompt.prompt_sha256}"
        draw = random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
        chosen = sorted(draw.sample(range(n_chunks), n_drawn))
        C = self.config.chunk_tokens
        drawn = [(chunk * C, (chunk + 1) * C) for chunk in chosen]
        return [*drawn, (prompt.n_tokens - recency_tokens, prompt.n_tokens)]

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        recency_tokens, n_drawn, n_chunks = self._split(n_tokens, shape)
        return {
            "recency_tokens": recency_tokens,
            "chunk_tokens": self.config.chunk_tokens,
            "chunks_drawn": n_drawn,
            "chunks_before_window": n_chunks,
            "fraction": 1.0 if self.keeps_all(n_tokens, shape) else n_drawn / n_chunks if n_chunks else 0.0,
            "seed": self.config.seed,
            "budget_bytes": self.config.budget_bytes,
            "budget_fraction": self.config.budget_fraction,
        }

    def _split(self, n_tokens: int, shape: ModelShape | None) -> tuple[int, int, int]:
        """Return recency tokens, chunks to draw, and whole chunks before the window to draw them from.

        Tokens between the last whole chunk and the window are in no chunk: fewer than ``chunk_tokens``, and a draw of
        unequal chunks would make the bytes depend on the draw. They stay where everything does.
        """
        wanted = self.config.recency_tokens
        recency_tokens = min(n_tokens, default_recency_tokens(n_tokens) if wanted is None else wanted)
        n_chunks = (n_tokens - recency_tokens) // self.config.chunk_tokens
        budgeted = budget_tokens(self.name, n_tokens, options=self.config, shape=shape)
        if budgeted is None:
            n_drawn = round(self.config.fraction * n_chunks)
            if self.config.fraction > 0 and n_chunks:
                n_drawn = max(1, n_drawn)
        elif budgeted < recency_tokens:
            raise UsageError(
                f"Method 'random': the budget holds {budgeted} of {n_tokens} tokens, less than its recency window of "
                f"{recency_tokens}; raise the budget or set recency_tokens lower."
            )
        else:
            n_drawn = min(n_chunks, (budgeted - recency_tokens) // self.config.chunk_tokens)
        return recency_tokens, n_drawn, n_chunks
