"""What an indexer is fitted to and measured by: examples from shards, focal loss, held-out measures.

Shapes: R rows (decode steps) of a document, W states a row, L indexed layers, M hidden size, n candidate chunks, E key
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.document import Document
from kvscope.harness.indexers.collection.places import Place
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.methods.fp8_keys import rounded
from kvscope.methods.lsa.indexer import Indexer, logit


@dataclass(frozen=True)
class Example:
    """A document as training sees it.

    Attributes:
        document: its tensors.
        first, last: the candidate chunks.
        positives: bool [R, n], golden candidates of every recorded step.
        places: where the indexer's layers are among the collection's.
    """

    document: Document
    first: int
    last: int
    positives: torch.Tensor
    places: tuple[int, ...]


def example(place: Place, config: TrainConfig) -> Example | None:
    """Load a document and its labels; None when it has no candidate chunk."""
    collection, index = place
    document, info = collection.load(index), collection.info
    layout = config.layout(document, info.chunk_tokens)
    if not layout.n_candidates:
        return None
    positives = collection.positives(index, config.rule(info), tau=config.tau)[:, layout.first : layout.last]
    places = tuple(info.layers.index(layer) for layer in config.layers or info.layers)
    return Example(document, layout.first, layout.last, positives, places)


def document_loss(indexer: Indexer, found: Example, config: TrainConfig, draws: torch.Generator) -> torch.Tensor:
    """Return the focal loss of some rows of a document over their positives and random negatives."""
    document, positives = found.document, found.positives
    n_rows = len(positives)
    if n_rows > config.batch_rows:
        # The first row of every answer is where decoding begins: those are never left out.
        first = document.refresh_rows(1 << 30)[: config.batch_rows]
        others = torch.ones(n_rows, dtype=torch.bool)
        others[first] = False
        pool = others.nonzero()[:, 0]
        drawn = pool[torch.randperm(len(pool), generator=draws)[: config.batch_rows - len(first)]]
        rows = torch.cat([first, drawn]).sort().values
    else:
        rows = torch.arange(n_rows)
    golden = positives[rows]
    chosen = golden | draw_negatives(golden, config, draws)
    # Scored are the chosen, and the chunks of what may lend them something.
    reach = -(-indexer.config.neighbours // indexer.config.segments_per_chunk)
    used = near(chosen.any(0), reach).nonzero()[:, 0]
    scored = own_logits(indexer, found, rows, config.lookback, chunks=used + found.first)
    device, per_chunk = scored.device, indexer.config.segments_per_chunk
    whole = scored.new_full((*golden.shape, per_chunk), -torch.inf)
    whole = whole.index_copy(1, used.to(device), scored.view(len(rows), -1, per_chunk))
    logits = indexer.chunk_scores(whole.flatten(1))[:, used.to(device)]
    return focal_loss(logits, golden[:, used].to(device), chosen[:, used].to(device), gamma=config.gamma)


def draw_negatives(golden: torch.Tensor, config: TrainConfig, draws: torch.Generator) -> torch.Tensor:
    """Return random non-golden candidates of each row, bool like ``golden`` [rows, n]."""
    wanted = (config.negatives * golden.sum(1)).clamp_min(config.least_negatives)
    score = torch.rand(golden.shape, generator=draws).masked_fill(golden, 2.0)
    rank = score.argsort(1).argsort(1)
    return (rank < wanted[:, None]) & ~golden


def near(mask_n: torch.Tensor, reach: int) -> torch.Tensor:
    """Return a mask [n] that also has every entry at most ``reach`` from one of ``mask_n``."""
    window = 2 * reach + 1
    return F.max_pool1d(mask_n.float()[None], window, stride=1, padding=reach)[0] > 0


def row_logits(
    indexer: Indexer, found: Example, rows: torch.Tensor, lookback: int, *, chunks: torch.Tensor
) -> torch.Tensor:
    """Return the indexer's logits of chunks that follow each other at some rows, [rows, chunks]."""
    return indexer.chunk_scores(own_logits(indexer, found, rows, lookback, chunks=chunks))


def own_logits(
    indexer: Indexer, found: Example, rows: torch.Tensor, lookback: int, *, chunks: torch.Tensor
) -> torch.Tensor:
    """Return logits of the segments of any chunks, before neighbours lend theirs, [rows, segments]; keys quantised."""
    device = next(indexer.parameters()).device
    states = found.document.states(rows, lookback)[:, :, list(found.places)].to(device)
    keys = []
    for layer, place in zip(indexer.config.layers, found.places, strict=True):
        features = found.document.features[place][chunks]
        if indexer.config.segment_tokens is not None:
            features = features.reshape(-1, indexer.config.segment_tokens, features.shape[-1])
        key = indexer.layer(layer).memory(features.to(device))
        keys.append(rounded(key))
    angles = found.document.state_angles(rows, lookback)
    turns = None if angles is None else angles.flatten(0, 1).to(device)
    logits = indexer.logits(states.flatten(0, 1), keys, turns)
    return logits.view(len(rows), lookback, -1).amax(1)


def focal_loss(logits: torch.Tensor, golden: torch.Tensor, chosen: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """Return the focal loss (arXiv 1708.02002, without class weights), mean over the chosen pairs."""
    signed = torch.where(golden, logits, -logits)
    log_p = F.logsigmoid(signed)
    loss = -((1 - log_p.exp()) ** gamma) * log_p
    return (loss * chosen).sum() / chosen.sum().clamp_min(1)


@torch.inference_mode()
def measure(indexer: Indexer, held_out: Sequence[Place], config: TrainConfig) -> dict[str, Any]:
    """Return held-out measures at threshold 0.5, over every recorded step, all candidates scored.

    ``recall`` is a mean over steps that need a candidate, ``precision`` is over all chosen chunks, ``kept_fraction`` is
    of the candidates, ``recall_at_tenth`` is the recall when the best tenth of the candidates is kept, and
    ``refresh_recall`` and ``refresh_recall_at_tenth`` are the same at the steps where decoding refreshes.
    """
    indexer.eval()
    sums = dict.fromkeys(("loss", "documents", "hit", "chosen", "candidates", "steps"), 0.0)
    recalls: list[torch.Tensor] = []
    tenths: list[torch.Tensor] = []
    refreshes: list[torch.Tensor] = []
    refresh_tenths: list[torch.Tensor] = []
    for place in held_out:
        found = example(place, config)
        if found is None:
            continue
        golden = found.positives
        rows = torch.arange(len(golden))
        chunks = torch.arange(found.first, found.last)
        parts = [row_logits(indexer, found, part, config.lookback, chunks=chunks) for part in torch.split(rows, 64)]
        logits = torch.cat(parts).float().cpu()
        everything = torch.ones_like(golden)
        positive = focal_loss(logits, golden, everything & golden, gamma=config.gamma)
        negative = focal_loss(logits, golden, everything & ~golden, gamma=config.gamma)
        sums["loss"] += float(positive + negative)
        sums["documents"] += 1
        chosen = logits >= 0
        needs = golden.any(1)
        n_golden = golden.sum(1).clamp_min(1)
        recall = (chosen & golden).sum(1) / n_golden
        tenth = torch.zeros_like(chosen).scatter(1, logits.topk(max(1, -(-len(chunks) // 10)), 1).indices, True)
        recalls.append(recall[needs])
        in_tenth = (tenth & golden).sum(1) / n_golden
        tenths.append(in_tenth[needs])
        at = found.document.refresh_rows(config.tau)
        refreshes.append(recall[at][needs[at]])
        refresh_tenths.append(in_tenth[at][needs[at]])
        sums["hit"] += int((chosen & golden).sum())
        sums["chosen"] += int(chosen.sum())
        sums["candidates"] += chosen.numel()
        sums["steps"] += len(golden)
    if not sums["documents"]:
        raise UsageError("No held-out document is long enough for a candidate chunk; collect longer prompts.")

    def mean(parts: list[torch.Tensor]) -> float | None:
        joined = torch.cat(parts)
        return round(float(joined.mean()), 4) if len(joined) else None

    return {
        "held_out_loss": round(sums["loss"] / sums["documents"], 5),
        "recall": mean(recalls),
        "refresh_recall": mean(refreshes),
        "recall_at_tenth": mean(tenths),
        "refresh_recall_at_tenth": mean(refresh_tenths),
        "precision": round(sums["hit"] / sums["chosen"], 4) if sums["chosen"] else None,
        "kept_fraction": round(sums["chosen"] / sums["candidates"], 4),
        "held_out_steps": int(sums["steps"]),
    }


def refresh_logits(indexer: Indexer, found: Example, rows: torch.Tensor, lookback: int) -> torch.Tensor:
    """Return the logits of every candidate at some refreshes, [rows, n] in fp32 on the CPU."""
    chunks = torch.arange(found.first, found.last)
    parts = [row_logits(indexer, found, part, lookback, chunks=chunks) for part in torch.split(rows, 64)]
    return torch.cat(parts).float().cpu()


@torch.inference_mode()
def shift_bias(indexer: Indexer, shift: float) -> None:
    """Add ``shift`` to the logit of every chunk: lending and maxima come behind the bias, so it passes through them."""
    for layer in indexer.config.layers:
        indexer.layer(layer).bias.add_(shift)


@torch.inference_mode()
def shift_to_recall(indexer: Indexer, held_out: Sequence[Place], config: TrainConfig, *, target_recall: float) -> float:
    """Shift the bias so that threshold 0.5 keeps ``target_recall`` of the golden chunks at refreshes; return the shift.

    Every golden chunk counts alike; ``lsa calibrate`` counts every refresh alike, as ``lsa eval`` does.

    Raises:
        UsageError: no held-out refresh needs a candidate.
    """
    golden_logits = []
    for place in held_out:
        found = example(place, config)
        if found is None:
            continue
        rows = found.document.refresh_rows(config.tau)
        golden_logits.append(refresh_logits(indexer, found, rows, config.lookback)[found.positives[rows]])
    joined = torch.cat(golden_logits) if golden_logits else torch.empty(0)
    if not len(joined):
        raise UsageError("No held-out refresh needs a chunk, so there is nothing to set the threshold by.")
    shift = logit(0.5) - float(torch.quantile(joined, 1 - target_recall))
    shift_bias(indexer, shift)
    return shift
