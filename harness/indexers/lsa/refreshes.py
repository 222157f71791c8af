"""The refreshes of documents as an indexer scores them: what a threshold keeps of them, and which one meets a target.

Shapes: r refreshes of a document, n candidate chunks, X candidates over all refreshes of all documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.places import places_of
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.lsa.measuring import Shares, shares_of, within_bounds
from kvscope.harness.indexers.lsa.objective import example, refresh_logits
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.methods.lsa.indexer import Indexer, logit


@dataclass(frozen=True)
class Refreshes:
    """The refreshes of one document as an indexer scores them.

    Attributes:
        logits: fp32 [r, n].
        golden: bool [r, n].
        within: bool [r, n], the best that a cap leaves; all without one.
        filled: bool [r, n], those of them that a least share keeps whatever the threshold; none without one.
        shares: what the document's parts weigh.
    """

    logits: torch.Tensor
    golden: torch.Tensor
    within: torch.Tensor
    filled: torch.Tensor
    shares: Shares

    def chosen(self) -> torch.Tensor:
        """Return what threshold 0.5 keeps, bool [r, n]."""
        return ((self.logits >= logit(0.5)) & self.within) | self.filled


@torch.inference_mode()
def score(indexer: Indexer, collections: Sequence[Collection], options: TrainConfig) -> list[Refreshes]:
    """Return every refresh of every document that has a candidate chunk.

    Raises:
        UsageError: no document has one, or a score is no number.
    """
    found = []
    for collection, index in places_of(collections):
        loaded = example((collection, index), options)
        if loaded is None:
            continue
        rows = loaded.document.refresh_rows(options.tau)
        logits = refresh_logits(indexer, loaded, rows, options.lookback)
        if not logits.isfinite().all():
            raise UsageError(
                f"The indexer gives document {collection.documents[index].name} of '{collection.folder}' scores "
                "that are no finite numbers, so no threshold separates them; train it again."
            )
        shares = shares_of(loaded, collection.info, indexer.config, options)
        within, filled = within_bounds(logits, loaded, indexer.config, options)
        found.append(Refreshes(logits, loaded.positives[rows], within, filled, shares))
    if not found:
        raise UsageError("No document is long enough for a candidate chunk; collect longer prompts.")
    return found


def measures(scored: Sequence[Refreshes]) -> dict[str, Any]:
    """Return what threshold 0.5 gives, means over refreshes as in ``lsa eval``.

    ``recall`` is of the golden chunks where there are any (None: nowhere), ``kept`` the share of the prompt's KV bytes,
    ``kept_candidates`` the share of all candidates, which is what ``kept_fraction`` of an indexer means.
    """
    recalls, kept = [], []
    chosen_total = candidates = 0
    for each in scored:
        chosen = each.chosen()
        needs = each.golden.any(1)
        recalls.append(((chosen & each.golden).sum(1) / each.golden.sum(1).clamp_min(1))[needs])
        kept.append(each.shares.static + chosen.sum(1) * each.shares.chunk + each.shares.metadata)
        chosen_total += int(chosen.sum())
        candidates += chosen.numel()
    recall = torch.cat(recalls)
    return {
        "recall": round(float(recall.mean()), 5) if len(recall) else None,
        "kept": round(float(torch.cat(kept).mean()), 5),
        "kept_candidates": round(chosen_total / candidates, 4),
        "refreshes": sum(map(len, kept)),
        "refreshes_needing": len(recall),
    }


def hit_rate(scored: Sequence[Refreshes]) -> float | None:
    """Return the share of the chunks that later refreshes choose at threshold 0.5 which were resident already.

    None where no document has a second refresh that chooses.
    """
    n_kept = n_chosen = 0
    for each in scored:
        chosen = each.chosen()
        n_kept += int((chosen[1:] & chosen[:-1]).sum())
        n_chosen += int(chosen[1:].sum())
    return round(n_kept / n_chosen, 4) if n_chosen else None


def cut_for_recall(scored: Sequence[Refreshes], target: float) -> float:
    """Return the highest cut at which the mean recall reaches ``target``.

    Raises:
        UsageError: no refresh needs a chunk, or the bounds leave nothing to a threshold: the cap keeps it under the
            target, or the least share over it.
    """
    n_needing = sum(int(each.golden.any(1).sum()) for each in scored)
    if not n_needing:
        raise UsageError(
            "No refresh of these documents needs a chunk, so there is no recall to reach; give --threshold or "
            "--target-kept, or other documents."
        )
    # A golden chunk weighs its share of its refresh, and every refresh the same; what a cap cuts off weighs nothing.
    weights = [
        (each.golden & each.within) / each.golden.sum(1, keepdim=True).clamp_min(1) / n_needing for each in scored
    ]
    values, gained, always = ranked(scored, weights)
    if always >= target - 1e-9 and any(bool(each.filled.any()) for each in scored):
        raise UsageError(
            f"target_recall is {target:g}, and the least share alone has {always:.4f} of the golden chunks, so that no "
            "threshold is found by it; give --threshold or --target-kept, or lower --least-fraction and --least-tokens."
        )
    gained = always + gained
    if float(gained[-1]) < target - 1e-9:
        raise UsageError(
            f"target_recall is {target:g}, and within the cap no threshold has more than {float(gained[-1]):.4f} of "
            "the golden chunks; raise --cap-tokens."
        )
    reached = int((gained < target - 1e-9).sum())  # groups before the one that reaches it
    return between(values, min(reached + 1, len(values)))


def cut_for_kept(scored: Sequence[Refreshes], target: float) -> float:
    """Return the lowest cut at which the mean share of bytes is no more than ``target``.

    Raises:
        UsageError: what stays whatever is chosen is more.
    """
    n_refreshes = sum(len(each.logits) for each in scored)
    always = sum((each.shares.static + each.shares.metadata) * len(each.logits) for each in scored) / n_refreshes
    if always > target:
        raise UsageError(
            f"target_kept is {target:g}, and sinks, window, keys and states alone are {always:.4f} of these prompts; "
            "give more, or longer documents."
        )
    weights = [each.within.double() * each.shares.chunk / n_refreshes for each in scored]
    values, gained, least = ranked(scored, weights)
    always += least
    if always > target:
        raise UsageError(
            f"target_kept is {target:g}, and filled up to the least share {always:.4f} of these prompts stays; give "
            "more, or lower --least-fraction and --least-tokens."
        )
    return between(values, int((always + gained <= target + 1e-9).sum()))


def ranked(scored: Sequence[Refreshes], weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the distinct logits, descending, and the weight of all candidates from the first to each, fp64; those that
    a least share keeps apart, whose weight is the last value."""
    values, where = torch.unique(torch.cat([each.logits.flatten() for each in scored]), return_inverse=True)
    sums = torch.zeros(len(values), dtype=torch.float64)
    left = [weight.double().masked_fill(each.filled, 0) for each, weight in zip(scored, weights, strict=True)]
    sums.index_add_(0, where, torch.cat([weight.flatten() for weight in left]))
    always = sum(float(weight.double()[each.filled].sum()) for each, weight in zip(scored, weights, strict=True))
    return values.double().flip(0), sums.flip(0).cumsum(0), always


def between(values: torch.Tensor, n_kept: int) -> float:
    """Return a cut that keeps the first ``n_kept`` of descending values, midway to the next: rounding moves neither."""
    if n_kept == 0:
        return float(values[0]) + 1.0
    if n_kept == len(values):
        return float(values[-1]) - 1.0
    return float(values[n_kept - 1] + values[n_kept]) / 2
