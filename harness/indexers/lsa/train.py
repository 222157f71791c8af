"""``kvscope lsa train``: fit an indexer to shards. The model they came from is neither imported nor loaded.

Focal loss over the positives of a step and random negatives, AdamW, cosine, clipping: arXiv 2606.09079's recipe, with
the memory side trained along with the query side, because an ordinary model brings no compressed keys of its own.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from kvscope.errors import UsageError
from kvscope.harness.engine.devices import resolve_device
from kvscope.harness.indexers.collection.document import CollectionInfo
from kvscope.harness.indexers.collection.places import Place, data_record, note_unfinished, places_of, split
from kvscope.harness.indexers.collection.reading import Collection, open_collections
from kvscope.harness.indexers.collection.shards import NATIVE
from kvscope.harness.indexers.lsa.lineage import origin
from kvscope.harness.indexers.lsa.objective import document_loss, example, measure, shift_to_recall
from kvscope.harness.indexers.lsa.train_config import DEFAULT_NEIGHBOURS, TrainConfig
from kvscope.harness.indexers.lsa.warm_start import set_bias, warm_start
from kvscope.harness.indexers.training import opening_record, train_epochs, training_log
from kvscope.methods.lsa.indexer import Indexer
from kvscope.methods.lsa.indexer_config import COMPRESSED_KEY, ENCODER_FEATURES, EncoderKind, Features, IndexerConfig
from kvscope.methods.lsa.indexer_files import indexer_folder, load_indexer, read_indexer_config, save_indexer
from kvscope.paths import check_out, user_path

#: What sets a size that an indexer to begin with has to share.
SIZE_OPTIONS = {
    "layers": "--layers",
    "heads": "--heads",
    "key_dim": "--key-dim",
    "rank": "--rank",
    "encoder": "--encoder",
    "encoder_width": "--encoder-width",
    "neighbours": "--neighbours",
}
MOST_KEY_DIM = 128


def train(
    folders: Sequence[str | Path],
    out: str | Path,
    config: TrainConfig,
    *,
    note: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
    deadline_s: float = math.inf,
) -> dict[str, Any]:
    """Train an indexer and write it to a folder, with one checkpoint an epoch and the log beside it.

    Args:
        folders: of ``lsa collect``; all made for one model.
        note: takes one line an epoch.
        clock, deadline_s: see ``train_epochs``.

    Returns:
        The held-out measures of the epoch that was kept.

    Raises:
        UsageError: bad options, or shards that are damaged, do not fit together, or hold no positive chunk.
    """
    folder = user_path(out, what="out")
    check_out(folder)
    collections = open_collections(folders, chunk_tokens=config.chunk_tokens, layers=config.layers)
    info = collections[0].info
    if info.of_entries:
        config = over_entries(config, collections[0], note)
    check_collected(config, collections, note)
    config.rule(info)
    device = resolve_device(config.device)
    training, held_out = split(places_of(collections), share=config.held_out)
    indexer = starting_point(indexer_config(info, config), config).to(device).train()
    if config.start == str(collections[0].folder / NATIVE):
        # Its scores say which is best, and nothing of how many are good enough.
        set_bias(indexer, training[:: max(1, len(training) // 16)], config)
    elif config.start is None and config.warm_start:
        fits = warm_start(indexer, training, config)
        note("warm start: " + ", ".join(f"layer {layer} queries {fit['query_fit']:.1%} explained"
                                        for layer, fit in zip(indexer.config.layers, fits, strict=True)))  # fmt: skip
    trained: dict[str, Any] = {
        "data": data_record(collections), "labels": config.rule(info).text(), "documents": len(training),
        # Where its start lay is this machine's; what it was stands below.
        "options": {**asdict(config), "start": config.start and Path(config.start).name},
    }  # fmt: skip
    if config.start is not None:
        trained["start"] = origin(indexer_folder(config.start))
    # A run that ends at a time limit leaves checkpoints alone: they say what they were trained on, too.
    indexer.config = replace(indexer.config, trained=trained)
    indexer.revive(config.revive)
    draws = torch.Generator().manual_seed(config.seed)

    def loss_of(place: Place) -> torch.Tensor | None:
        found = example(place, config)
        return None if found is None else document_loss(indexer, found, config, draws)

    with training_log(folder) as say:
        worth = worth_of(config)
        if config.start is not None or config.warm_start or config.keep == "recall":
            before = measure(indexer, held_out, config)
            worth(before)  # what cannot be told is told before an epoch is spent on it
            if config.start is not None:
                say(start=config.start, held_out=before)
            elif config.warm_start:
                say(warm_start=fits, held_out=before)
        say(**opening_record(collections, indexer, config, training=training, held_out=held_out))
        best = train_epochs(
            indexer,
            training,
            config,
            loss_of=loss_of,
            measure=lambda: measure(indexer, held_out, config),
            save=lambda target: save_indexer(indexer, target),
            text=held_out_text,
            worth=worth,
            folder=folder,
            say=say,
            note=note,
            clock=clock,
            deadline_s=deadline_s,
        )
        if config.target_recall is not None:
            shift = shift_to_recall(indexer, held_out, config, target_recall=config.target_recall)
            note(f"bias shifted by {shift:+.3f}: threshold 0.5 keeps {config.target_recall:.0%} of held-out golden")
            best = {**best, "bias_shift": round(shift, 4), **measure(indexer, held_out, config)}
        say(kept=best)
    trained["held_out"] = best
    indexer.config = replace(indexer.config, kept_fraction=best["kept_fraction"], trained=trained)
    save_indexer(indexer, folder)
    return best


def over_entries(config: TrainConfig, collection: Collection, note: Callable[[str], None]) -> TrainConfig:
    """Return the options as they are over compressed entries: one state, nothing lent, and the model's own indexer to
    begin with.

    Raises:
        UsageError: an option that only an encoder of one's own has.
    """
    if config.neighbours or config.segment_tokens:
        raise UsageError(
            "Entries that the model compressed have one key each and lend nothing: leave --neighbours and "
            "--segment-tokens out."
        )
    if config.lookback != 1:
        note("over compressed entries one state is scored: lookback is 1")
    start, native = config.start, collection.folder / NATIVE
    if start is None and config.warm_start:
        start = str(native)
    was = read_indexer_config(indexer_folder(str(native) if start is None else start))
    return replace(
        config, lookback=1, neighbours=0, start=start, heads=config.heads or was.heads, rank=config.rank or was.rank
    )  # fmt: skip


def starting_point(wanted: IndexerConfig, config: TrainConfig) -> Indexer:
    """Return the indexer to begin with: random weights, or those of ``config.start``.

    Raises:
        UsageError: that indexer has another shape or belongs to another model; the message names both sides.
    """
    if config.start is None:
        return Indexer.untrained(wanted, seed=config.seed)
    folder = indexer_folder(config.start)
    found = load_indexer(folder)
    if wanted.encoder == COMPRESSED_KEY and found.config.encoder == COMPRESSED_KEY:
        found.keep_layers(wanted.layers)  # they share nothing, and the model's own indexer has all of them
    free = {"tau", "kept_fraction", "trained", "chunk_tokens", "segment_tokens", "lookback_tokens", "cap_tokens",
            "cap_fraction", "least_tokens", "least_fraction"}  # fmt: skip
    if wanted.model_revision is not None:
        free.add("model")  # a name or the folder of the same weights
    for field in fields(IndexerConfig):
        mine, theirs = (_shown(getattr(each, field.name)) for each in (wanted, found.config))
        if field.name not in free and mine != theirs:
            option = SIZE_OPTIONS.get(field.name)
            mend = f"give {option} {theirs}" if option else "it belongs to another model, start from one of this model"
            raise UsageError(
                f"Indexer '{config.start}' cannot be trained further here: {field.name} is {theirs} there and {mine} "
                f"here; {mend}."
            )
    key_tokens = [each.segment_tokens or each.chunk_tokens for each in (wanted, found.config)]
    if key_tokens[0] != key_tokens[1]:
        raise UsageError(
            f"Indexer '{config.start}' has a key for every {key_tokens[1]} tokens, {key_tokens[0]} were asked for; "
            f"give --segment-tokens {key_tokens[1]}."
        )
    found.config = wanted
    return found


def _shown(value: object) -> str:
    """Return a value of a configuration as its option takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def worth_of(config: TrainConfig) -> Callable[[dict[str, Any]], float]:
    """Return what an epoch is worth by its held-out measures."""

    def recall(measures: dict[str, Any]) -> float:
        found = measures["refresh_recall_at_tenth"]
        if found is None:
            raise UsageError(
                "No held-out refresh needs a chunk, so keep=recall has nothing to choose an epoch by; use keep=loss, "
                "or collect longer prompts."
            )
        return float(found)

    return recall if config.keep == "recall" else lambda measures: -float(measures["held_out_loss"])


def check_collected(config: TrainConfig, collections: Sequence[Collection], note: Callable[[str], None]) -> None:
    """Check options against what was collected.

    Raises:
        UsageError: the encoder, the segments or the lookback need other than what is stored.
    """
    info = collections[0].info
    needed = None if config.encoder is None else ENCODER_FEATURES[config.encoder]
    if needed is not None and needed != info.features:
        made = "of compressed entries" if needed == "entries" else f"made with --features {needed}"
        raise UsageError(f"Encoder '{config.encoder}' needs a collection {made}, this one holds '{info.features}'.")
    if config.segment_tokens is not None and (info.features != "tokens" or info.chunk_tokens % config.segment_tokens):
        raise UsageError(
            f"segment_tokens is {config.segment_tokens}: it must divide the chunk of {info.chunk_tokens} tokens, and "
            "the collection must hold every key (--features tokens)."
        )
    states = min(collection.info.state_tokens for collection in collections)
    if config.lookback > states:
        raise UsageError(f"lookback is {config.lookback}, and the collection keeps {states} states before an answer.")
    note_unfinished(collections, note)


def indexer_config(info: CollectionInfo, config: TrainConfig) -> IndexerConfig:
    """Return the configuration of the indexer to train."""
    encoders: dict[Features, EncoderKind] = {"tokens": "pooled", "stats": "stats", "entries": COMPRESSED_KEY}
    return IndexerConfig(
        model=info.model,
        model_revision=info.model_revision,
        layers=config.layers or info.layers,
        chunk_tokens=info.chunk_tokens,
        tau=config.tau,
        hidden_size=info.hidden_size,
        key_features=info.key_features,
        heads=config.heads or info.query_heads,
        key_dim=config.key_dim or min(MOST_KEY_DIM, info.key_features),
        rank=config.rank or max(1, info.hidden_size // 2),
        encoder=config.encoder or encoders[info.features],
        encoder_width=config.encoder_width,
        lookback_tokens=config.lookback,
        segment_tokens=config.segment_tokens,
        neighbours=neighbours_of(config),
    )


def neighbours_of(config: TrainConfig) -> int:
    """Return how many segments on either side one lends its score to."""
    if config.neighbours is not None:
        return config.neighbours
    return DEFAULT_NEIGHBOURS if config.start is None else read_indexer_config(indexer_folder(config.start)).neighbours


def held_out_text(fields: dict[str, Any]) -> str:
    """Return held-out measures in one phrase."""

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    return (
        f"{fields['held_out_loss']:.4f}: recall {text(fields['recall'])} (at refreshes "
        f"{text(fields['refresh_recall'])}), precision {text(fields['precision'])}, kept "
        f"{text(fields['kept_fraction'])}; best tenth {text(fields['recall_at_tenth'])} (at refreshes "
        f"{text(fields['refresh_recall_at_tenth'])})"
    )
