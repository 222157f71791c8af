"""``kvscope lsa eval``: golden recall against the fraction kept, per length, from shards alone.

Golden are the chunks that the labels of a refresh ask for and that neither sinks nor window hold. Four policies are
compared at the same number of chunks: the indexer, recency (the window grown backwards), random (drawn anew for every
refresh) and the attention oracle (the mass that the model's attention really gave, over the interval).

Shapes: R rows (recorded steps), n candidate chunks.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kvscope.errors import UsageError
from kvscope.harness.engine.devices import resolve_device
from kvscope.harness.indexers.collection.places import Place, places_of
from kvscope.harness.indexers.lsa.lineage import calibration_ids, data_ids
from kvscope.harness.indexers.lsa.measuring import (
    EvalConfig,
    matching_collections,
    measuring_options,
    ranks,
    shares_of,
    within_bounds,
)
from kvscope.harness.indexers.lsa.objective import Example, example, refresh_logits
from kvscope.harness.indexers.lsa.recall_tables import COLUMNS, POLICIES, write_recall
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.methods.lsa.indexer import Indexer, logit
from kvscope.methods.lsa.indexer_files import indexer_folder, indexer_hash, load_indexer
from kvscope.paths import check_out, user_path

FRACTIONS = (0.02, 0.03, 0.05, 0.075, 0.1, 0.135, 0.2, 0.3, 0.5, 0.75, 1.0)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Tally:
    """Sums over refreshes of one (length, task, policy, setting)."""

    def __init__(self) -> None:
        self.kept = self.kept_bytes = self.recall = 0.0
        self.refreshes = self.needing = 0

    def add(self, *, kept: torch.Tensor, kept_bytes: torch.Tensor, recall: torch.Tensor, needs: torch.Tensor) -> None:
        """Add one document's refreshes."""
        self.kept += float(kept.sum())
        self.kept_bytes += float(kept_bytes.sum())
        self.recall += float(recall[needs].sum())
        self.refreshes += len(needs)
        self.needing += int(needs.sum())

    def row(self) -> dict[str, Any]:
        """Return the means."""
        return {
            "kept_fraction": round(self.kept / self.refreshes, 5),
            "kept_bytes_fraction": round(self.kept_bytes / self.refreshes, 5),
            "recall": round(self.recall / self.needing, 5) if self.needing else None,
            "refreshes": self.refreshes,
            "refreshes_needing": self.needing,
        }


def evaluate(
    folders: Sequence[str | Path],
    indexer_spec: str,
    out: str | Path,
    config: EvalConfig,
    *,
    device: str = "auto",
    note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Measure an indexer on collections it was not trained on; write CSV, Markdown, JSON and a figure.

    A collection recorded in smaller chunks is seen in the indexer's (see ``rechunk``); the oracle's mass is then an
    upper bound of the strongest layer's.

    Returns:
        The table's rows, lengths ascending, ``task`` "all" first.

    Raises:
        UsageError: the indexer belongs to another model, layers or chunk size than the collections, or these are
            damaged, or hold no chunk to choose.
    """
    target = user_path(out, what="out")
    check_out(target)
    folder = indexer_folder(indexer_spec)
    indexer = load_indexer(folder).to(resolve_device(device))
    collections = matching_collections(folders, indexer.config, folder=str(folder))
    info = collections[0].info
    trained_on = data_ids(indexer.config.trained)
    set_on = calibration_ids(indexer.config.trained)
    for collection in collections:
        if collection.id in trained_on | set_on:
            done = "trained" if collection.id in trained_on else "calibrated"
            note(f"note: the indexer was {done} on '{collection.folder}': these figures are no test of it.")
    options = measuring_options(indexer.config, config)
    tallies: dict[tuple[int, str, str, str, float], Tally] = defaultdict(Tally)
    places = places_of(collections)
    for place in places:
        add_document(tallies, place, indexer, options, seed=config.seed)
    if not tallies:
        raise UsageError("No document is long enough for a candidate chunk; collect longer prompts.")
    rows = table_rows(tallies)
    about = {
        "indexer": f"{folder.name}@{indexer_hash(folder)}",
        "indexer_tau": indexer.config.tau,
        "tau": options.tau,
        "chunk_tokens": info.chunk_tokens,
        "segment_tokens": indexer.config.segment_tokens or info.chunk_tokens,
        "neighbours": indexer.config.neighbours,
        "layers": list(indexer.config.layers),
        "documents": len(places),
        "labels": options.rule(info).text(),
        "collections": [collection.id for collection in collections],
    }
    write_recall(target, rows, about)
    return rows


def add_document(
    tallies: dict[tuple[int, str, str, str, float], Tally],
    place: Place,
    indexer: Indexer,
    options: TrainConfig,
    *,
    seed: int,
) -> None:
    """Measure every policy and setting on one document."""
    found = example(place, options)
    if found is None:
        return
    collection, index = place
    document, info = found.document, collection.info
    layout = options.layout(document, info.chunk_tokens)
    rows = document.refresh_rows(options.tau)
    golden = found.positives[rows]
    scores = policy_scores(found, rows, indexer, options, seed=seed, index=index)
    needs, n_golden = golden.any(1), golden.sum(1).clamp_min(1)
    n_tokens, shares = layout.n_tokens, shares_of(found, info, indexer.config, options)

    def add(policy: str, setting: str, value: float, chosen: torch.Tensor) -> None:
        kept = shares.static + chosen.sum(1) * shares.chunk
        measured = {
            "kept": kept,
            "kept_bytes": kept + (shares.metadata if policy == "indexer" else 0.0),
            "recall": (chosen & golden).sum(1) / n_golden,
            "needs": needs,
        }
        for task in ("all", document.info.task):
            tallies[document.info.length_tokens, task, policy, setting, value].add(**measured)

    for policy, score in scores.items():
        rank = ranks(score)
        for fraction in FRACTIONS:
            add(policy, "fraction", fraction, rank < layout.budgeted_chunks(int(fraction * n_tokens)))
    within, filled = within_bounds(scores["indexer"], found, indexer.config, options)
    for threshold in THRESHOLDS:
        add("indexer", "threshold", threshold, ((scores["indexer"] >= logit(threshold)) & within) | filled)


@torch.inference_mode()
def policy_scores(
    found: Example, rows: torch.Tensor, indexer: Indexer, options: TrainConfig, *, seed: int, index: int
) -> dict[str, torch.Tensor]:
    """Return the score of every candidate under each policy, [rows, n]."""
    document = found.document
    chunks = torch.arange(found.first, found.last)
    steps, segments = document.steps.long(), document.segments.long()
    ends = torch.minimum(
        torch.searchsorted(steps, steps + options.tau), torch.searchsorted(segments, segments, right=True)
    )
    mass = torch.stack([document.mass[row : ends[row]].float().amax(0) for row in rows.tolist()])
    draws = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return {
        "indexer": refresh_logits(indexer, found, rows, options.lookback),
        "oracle": mass[:, found.first : found.last],
        "recency": chunks.float().expand(len(rows), -1),
        "random": torch.rand((len(rows), len(chunks)), generator=draws),
    }


def table_rows(tallies: dict[tuple[int, str, str, str, float], Tally]) -> list[dict[str, Any]]:
    """Return the table, sorted."""

    def key(entry: tuple[int, str, str, str, float]) -> tuple[Any, ...]:
        length, task, policy, setting, value = entry
        return (length, task != "all", task, POLICIES.index(policy), setting, value)

    return [{**dict(zip(COLUMNS, entry, strict=False)), **tallies[entry].row()} for entry in sorted(tallies, key=key)]
