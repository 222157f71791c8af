"""Where a prompt is cut: what is prefilled densely, and what is fed under the method."""

from typing import TYPE_CHECKING

from kvscope.results.schema import MethodFrom

if TYPE_CHECKING:
    from kvscope.tasks.base import Sample

Ids = tuple[int, ...]


def split_prompt(sample: "Sample", method_from: MethodFrom) -> tuple[Ids, Ids]:
    """Return (tokens to prefill, tokens fed under the method); of the latter there is at least one."""
    return split_ids(sample.ids, sample.question_start, method_from)


def split_ids(ids: Ids, question_start: int, method_from: MethodFrom) -> tuple[Ids, Ids]:
    """Return the same of token ids whose question begins at ``question_start``."""
    split = len(ids) - 1 if method_from == "last_token" else question_start
    return ids[:split], ids[split:]


def random_ids(vocab_size: int, n_tokens: int, *, seed: int) -> Ids:
    """Return random token ids."""
    import numpy as np

    return tuple(np.random.default_rng(seed).integers(0, vocab_size, n_tokens).tolist())
