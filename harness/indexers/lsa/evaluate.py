"""``kvscope lsa eval``: golden recall against the fraction kept, per length, from shards alone.

Golden are the chunks that the labels of a refresh ask for and that neither sinks nor window hold. Four policies are
compared at the same number of chunks: the indexer, recency (the window grown backwards), random (drawn anew for every
refresh) and the attention oracle (the mass that the model's attention really gave, over the interval).

Shapes: R rows (recorded steps), n candidate chunks.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from kvscope.errors import UsageError
from kvscope.files import make_folder, whole_file
from kvscope.harness.engine.devices import resolve_device
from kvscope.harness.indexers.collection.document import CollectionInfo
from kvscope.harness.indexers.collection.reading import Collection, open_collections
from kvscope.harness.indexers.collection.rechunk import serves
from kvscope.harness.indexers.lsa.lineage import calibration_ids, data_ids
from kvscope.harness.indexers.lsa.objective import Example, Place, TrainConfig, example, refresh_logits
from kvscope.methods.lsa.indexer import ENCODER_FEATURES, Indexer, IndexerConfig, logit
from kvscope.methods.lsa.indexer_files import indexer_folder, indexer_hash, load_indexer
from kvscope.methods.lsa.labels import Voters
from kvscope.methods.lsa.selection import metadata_bytes
from kvscope.paths import check_out, user_path
from kvscope.units import format_length

FRACTIONS = (0.02, 0.03, 0.05, 0.075, 0.1, 0.135, 0.2, 0.3, 0.5, 0.75, 1.0)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
POLICIES = ("indexer", "oracle", "recency", "random")
CSV_FILE, MARKDOWN_FILE, JSON_FILE, FIGURE_STEM = "recall.csv", "recall.md", "recall.json", "recall"
COLUMNS = ("length_tokens", "task", "policy", "setting", "value", "kept_fraction", "kept_bytes_fraction", "recall",
           "refreshes", "refreshes_needing")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to evaluate.

    Attributes:
        tau: decode steps between refreshes; None: the indexer's.
        top_p, voters, votes, least_mass, label_layers: what makes a chunk golden; None: as the collection says.
        sink_tokens, recency_tokens: what always stays.
        seed: of the random policy.
    """

    tau: int | None = None
    top_p: float | None = None
    voters: Voters | None = None
    votes: int | None = None
    least_mass: float | None = None
    label_layers: tuple[int, ...] | None = None
    sink_tokens: int = 4
    recency_tokens: int | None = None
    seed: int = 0


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
            damaged.
    """
    target = user_path(out, what="out")
    check_out(target)
    folder = indexer_folder(indexer_spec)
    indexer = load_indexer(folder).to(resolve_device(device))
    for each in folders:
        check_match(indexer.config, Collection(each).info, folder=str(folder))
    collections = open_collections(folders, chunk_tokens=indexer.config.chunk_tokens, layers=indexer.config.layers)
    info = collections[0].info
    trained_on = data_ids(indexer.config.trained)
    set_on = calibration_ids(indexer.config.trained)
    for collection in collections:
        if collection.id in trained_on | set_on:
            done = "trained" if collection.id in trained_on else "calibrated"
            note(f"note: the indexer was {done} on '{collection.folder}': these figures are no test of it.")
    options = measuring_options(indexer.config, config)
    tau = options.tau
    tallies: dict[tuple[int, str, str, str, float], Tally] = defaultdict(Tally)
    places = [(collection, index) for collection in collections for index in range(len(collection))]
    for place in places:
        add_document(tallies, place, indexer, options, seed=config.seed)
    rows = table_rows(tallies)
    make_folder(target)
    about = {
        "indexer": f"{folder.name}@{indexer_hash(folder)}",
        "indexer_tau": indexer.config.tau,
        "tau": tau,
        "chunk_tokens": info.chunk_tokens,
        "segment_tokens": indexer.config.segment_tokens or info.chunk_tokens,
        "neighbours": indexer.config.neighbours,
        "layers": list(indexer.config.layers),
        "documents": len(places),
        "labels": options.rule(info).text(),
        "collections": [collection.id for collection in collections],
    }
    write_tables(target, rows, about)
    draw(target, rows)
    return rows


def measuring_options(indexer: IndexerConfig, config: EvalConfig) -> TrainConfig:
    """Return how documents are read and labelled to measure an indexer.

    Raises:
        UsageError: a value out of range.
    """
    return TrainConfig(
        tau=indexer.tau if config.tau is None else config.tau,
        layers=indexer.layers,
        top_p=config.top_p,
        voters=config.voters,
        votes=config.votes,
        least_mass=config.least_mass,
        label_layers=config.label_layers,
        sink_tokens=config.sink_tokens,
        recency_tokens=config.recency_tokens,
        lookback=indexer.lookback_tokens,
    )


@dataclass(frozen=True)
class Shares:
    """What an indexer keeps of one prompt, as shares of its KV bytes.

    Attributes:
        static: sinks and window.
        chunk: one chosen chunk.
        metadata: the indexer's keys and states.
    """

    static: float
    chunk: float
    metadata: float


def shares_of(found: Example, info: CollectionInfo, config: IndexerConfig, options: TrainConfig) -> Shares:
    """Return what keeping a document's prompt costs."""
    document = found.document
    layout = document.layout(info.chunk_tokens, sink_tokens=options.sink_tokens, recency_tokens=options.recency_tokens)
    element_bytes = 4 if info.dtype == "float32" else 2
    extra_bytes = metadata_bytes(config, layout.n_candidates, element_bytes=element_bytes)
    return Shares(
        static=layout.static_tokens / layout.n_tokens,
        chunk=layout.chunk_tokens / layout.n_tokens,
        metadata=extra_bytes / (layout.n_tokens * info.kv_bytes_per_token),
    )


def check_match(config: IndexerConfig, info: CollectionInfo, *, folder: str) -> None:
    """Check that an indexer and a collection, as it was recorded, belong together.

    Raises:
        UsageError: they do not; the message names both.
    """
    chunk_tokens = config.chunk_tokens if serves(info, config.chunk_tokens) else info.chunk_tokens
    pairs = (
        ("model", f"{config.model} ({config.model_revision})", f"{info.model} ({info.model_revision})"),
        ("chunk_tokens", config.chunk_tokens, chunk_tokens),
        ("hidden_size", config.hidden_size, info.hidden_size),
        ("key_features", config.key_features, info.key_features),
        ("features", ENCODER_FEATURES[config.encoder], info.features),
    )
    for key, mine, theirs in pairs:
        if mine != theirs:
            raise UsageError(f"Indexer '{folder}' and the collection differ in {key}: {mine} against {theirs}.")
    foreign = sorted(set(config.layers) - set(info.layers))
    if foreign:
        raise UsageError(
            f"Indexer '{folder}' reads layers {', '.join(map(str, config.layers))}, the collection holds "
            f"{', '.join(map(str, info.layers))}."
        )
    if config.lookback_tokens > info.state_tokens:
        raise UsageError(
            f"Indexer '{folder}' scores the last {config.lookback_tokens} states, and the collection keeps "
            f"{info.state_tokens} before an answer; collect again with --states {config.lookback_tokens}."
        )


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
    layout = document.layout(info.chunk_tokens, sink_tokens=options.sink_tokens, recency_tokens=options.recency_tokens)
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
    within = within_cap(scores["indexer"], found, indexer.config, options)
    for threshold in THRESHOLDS:
        add("indexer", "threshold", threshold, (scores["indexer"] >= logit(threshold)) & within)


def ranks(score: torch.Tensor) -> torch.Tensor:
    """Return the place of every candidate by its score, from 0, [rows, n]; equal scores in order."""
    order = score.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))


def within_cap(score: torch.Tensor, found: Example, config: IndexerConfig, options: TrainConfig) -> torch.Tensor:
    """Return which candidates an indexer's cap leaves to a threshold, bool [rows, n]."""
    if config.cap_tokens is None:
        return torch.ones_like(score, dtype=torch.bool)
    layout = found.document.layout(
        config.chunk_tokens, sink_tokens=options.sink_tokens, recency_tokens=options.recency_tokens
    )
    return ranks(score) < layout.budgeted_chunks(config.cap_tokens)


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


def write_tables(folder: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the table as CSV and JSON, and its summary as Markdown."""
    with whole_file(folder / CSV_FILE) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    with whole_file(folder / JSON_FILE) as temporary:
        temporary.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    lines = ["# Golden recall against the fraction kept", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", summary_text(rows, tablefmt="github"), ""]
    with whole_file(folder / MARKDOWN_FILE) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def summary_text(rows: Iterable[dict[str, Any]], *, tablefmt: str = "simple") -> str:
    """Return recall per length at common fractions for each policy, and the indexer at each threshold."""
    rows = [row for row in rows if row["task"] == "all"]
    lengths = sorted({row["length_tokens"] for row in rows})
    wanted = [("fraction", 0.05), ("fraction", 0.1), ("fraction", 0.135), ("fraction", 0.2)]
    wanted += [("threshold", value) for value in (0.3, 0.5, 0.7)]
    table = []
    for policy in POLICIES:
        for setting, value in wanted:
            cells = []
            for length in lengths:
                match = [r for r in rows if (r["length_tokens"], r["policy"], r["setting"], r["value"])
                         == (length, policy, setting, value)]  # fmt: skip
                cells.append(_cell(match[0]) if match else "")
            if any(cells):
                table.append([policy, f"{setting} {value:g}", *cells])
    header = ["policy", "setting", *(format_length(n) for n in lengths)]
    text = tabulate(table, headers=header, tablefmt=tablefmt, disable_numparse=True)
    return f"{text}\n\nEach cell: golden recall at the fraction of prompt KV bytes kept, everything counted."


def _cell(row: dict[str, Any]) -> str:
    recall = "-" if row["recall"] is None else f"{row['recall']:.1%}"
    return f"{recall} at {row['kept_bytes_fraction']:.1%}"


def draw(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw recall over kept fraction, one panel a length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["task"] == "all" and row["setting"] == "fraction" and row["recall"] is not None]
    lengths = sorted({row["length_tokens"] for row in rows})
    if not lengths:
        return
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(3.2 * len(lengths), 3.2), sharey=True, squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=True):
        for policy in POLICIES:
            points = [(r["kept_bytes_fraction"], r["recall"]) for r in rows
                      if (r["length_tokens"], r["policy"]) == (length, policy)]  # fmt: skip
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=policy)
        axis.axhline(0.95, color="0.7", linewidth=0.8, zorder=0)
        axis.set(xscale="log", title=f"{format_length(length)} tokens", xlabel="fraction of KV bytes kept")
    axes[0][0].set_ylabel("golden recall")
    axes[0][-1].legend(frameon=False)
    figure.tight_layout()
    for suffix in ("svg", "png"):
        with whole_file(folder / f"{FIGURE_STEM}.{suffix}") as temporary:
            figure.savefig(temporary, dpi=150, format=suffix)
    pyplot.close(figure)
