"""The rule by which scores choose chunks: a threshold, a budget, or whole pages of them.

Shapes: n candidate chunks, p pages of them.
"""

from dataclasses import dataclass

import torch

from kvscope.methods.lsa.indexer import logit


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which candidates are kept, by their scores. One of ``threshold`` and ``n_chunks`` is set; both with pages.

    Attributes:
        threshold: probability in (0, 1).
        n_chunks: candidates kept, those of the highest scores.
        page_chunks: chunks of a page: whole pages are kept, ``n_chunks`` in all, those with the most chunks that reach
            the threshold. None: each chunk stands for itself.
        n_most: with a threshold the most that are kept, those of the highest scores; None: however many reach it.
        n_least: with a threshold the fewest that are kept: where fewer reach it, those of the highest scores. No more
            than there are; ``n_most`` wins.
    """

    threshold: float | None = None
    n_chunks: int | None = None
    n_most: int | None = None
    n_least: int = 0
    page_chunks: int | None = None

    def n_kept(self, n_chosen: int) -> int:
        """Return how many stay of candidates that reached the threshold."""
        n_kept = max(n_chosen, self.n_least)
        return n_kept if self.n_most is None else min(n_kept, self.n_most)

    def of_logits(self, logits_n: torch.Tensor) -> torch.Tensor:
        """Return the candidates to keep, ascending, on the CPU. Equal scores are taken in order."""
        if self.n_chunks is not None:
            return self.fixed(logits_n).cpu()
        assert self.threshold is not None
        chosen = (logits_n >= logit(self.threshold)).nonzero()[:, 0]
        n_kept = self.n_kept(len(chosen))
        return (chosen if n_kept == len(chosen) else top_chunks(logits_n, n_kept)).cpu()

    def fixed(self, logits_n: torch.Tensor) -> torch.Tensor:
        """The same on the device of the logits, where the number kept is fixed: nothing waits for the device."""
        assert self.n_chunks is not None
        if self.page_chunks is None:
            return top_chunks(logits_n, self.n_chunks)
        assert self.threshold is not None
        reached_n = logits_n >= logit(self.threshold)
        return densest_pages(reached_n, page_chunks=self.page_chunks, n_pages=self.n_chunks // self.page_chunks)

    def of_mass(self, mass_n: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """The same for attention mass: a threshold keeps the fewest candidates that reach it together with ``rest``."""
        if self.n_chunks is not None:
            return top_chunks(mass_n, self.n_chunks).cpu()
        assert self.threshold is not None
        # The rest counts first, whatever it weighs: it stays anyway.
        order = torch.argsort(mass_n, dim=0, descending=True, stable=True)
        before = rest + mass_n[order].cumsum(0) - mass_n[order]
        taken = order[before < self.threshold * (rest + mass_n.sum())]
        n_kept = self.n_kept(len(taken))
        return (taken if n_kept <= len(taken) else order)[:n_kept].sort().values.cpu()


def top_chunks(score_n: torch.Tensor, n_chunks: int) -> torch.Tensor:
    """Return the ``n_chunks`` best, ascending, on the device of the scores. Equal scores are taken in order."""
    return torch.argsort(score_n, dim=0, descending=True, stable=True)[:n_chunks].sort().values


def densest_pages(reached_n: torch.Tensor, *, page_chunks: int, n_pages: int) -> torch.Tensor:
    """Return the chunks of the ``n_pages`` pages with the most chunks that reached the threshold, ascending.

    The rule FlashMemory-DeepSeek-V4 deploys (technical report): a page's score is that number. Pages of equal scores,
    those of nil among them, are taken in order.

    Args:
        reached_n: whether each candidate reached it; whole pages.

    Raises:
        ValueError: the candidates are no whole pages.
    """
    if len(reached_n) % page_chunks:
        raise ValueError(f"{len(reached_n)} candidates are no whole pages of {page_chunks}")
    count_p = reached_n.view(-1, page_chunks).sum(1)
    pages = top_chunks(count_p, n_pages)
    return (pages[:, None] * page_chunks + torch.arange(page_chunks, device=pages.device)).flatten()
