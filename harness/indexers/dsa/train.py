"""``kvscope dsa train``: fit a lightning indexer to shards of ``lsa collect``. The model is not even imported.

DSA-style: DeepSeek-V3.2 first trains its indexer this way, against the attention summed over heads, with the model
frozen, and then trains the model along with the chosen tokens; the second half is left out.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from kvscope.files import whole_file
from kvscope.harness.engine.devices import resolve_device
from kvscope.harness.indexers.collection.document import CollectionInfo
from kvscope.harness.indexers.collection.places import Place, data_record, note_unfinished, places_of, split
from kvscope.harness.indexers.collection.reading import open_collections
from kvscope.harness.indexers.dsa.objective import DsaTrainConfig, check_tokens, document_loss, example, measure
from kvscope.harness.indexers.dsa.warm_start import warm_start
from kvscope.harness.indexers.training import opening_record, train_epochs, training_log
from kvscope.methods.dsa.indexer_files import FILES
from kvscope.methods.dsa.lightning import Lightning, LightningConfig, default_sizes
from kvscope.methods.indexer_files import listed, prompts_text
from kvscope.paths import check_out, user_path

CARD_FILE = "README.md"


def train(
    folders: Sequence[str | Path],
    out: str | Path,
    config: DsaTrainConfig,
    *,
    note: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
    deadline_s: float = math.inf,
) -> dict[str, Any]:
    """Train an indexer and write it to a folder, with one checkpoint an epoch and the log beside it.

    Args:
        folders: of ``lsa collect --token-samples``; all made for one model.
        note: takes one line an epoch.
        clock, deadline_s: see ``train_epochs``.

    Returns:
        The held-out measures of the epoch that was kept.

    Raises:
        UsageError: bad options, or shards that are damaged, do not fit together, or hold no single tokens.
    """
    folder = user_path(out, what="out")
    check_out(folder)
    collections = open_collections(folders)
    check_tokens(collections)
    note_unfinished(collections, note)
    info = collections[0].info
    device = resolve_device(config.device)
    training, held_out = split(places_of(collections), share=config.held_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        indexer = Lightning(indexer_config(info, config)).to(device)
    draws = torch.Generator().manual_seed(config.seed)

    def loss_of(place: Place) -> torch.Tensor:
        return document_loss(indexer, example(place, device), config, draws)

    with training_log(folder) as say:
        say(**opening_record(collections, indexer, config, training=training, held_out=held_out))
        if config.warm_start:
            fits, start = warm_start(indexer, training), measure(indexer, held_out)
            say(warm_start=fits, held_out=start)
            for layer, found in zip(indexer.config.layers, fits, strict=True):
                note(
                    f"warm start of layer {layer}: states explain {found['query_fit']:.1%} of the queries and "
                    f"{found['key_fit']:.1%} of the keys"
                )
            note(f"warm start: held-out {measures_text(start)}")
        best = train_epochs(
            indexer,
            training,
            config,
            loss_of=loss_of,
            measure=lambda: measure(indexer, held_out),
            save=lambda target: FILES.save(indexer, target),
            text=measures_text,
            folder=folder,
            say=say,
            note=note,
            clock=clock,
            deadline_s=deadline_s,
        )
        say(kept=best)
    indexer.eval()
    trained = {
        "data": data_record(collections),
        "documents": len(training),
        "held_out": best,
        "options": asdict(config),
    }
    indexer.config = replace(indexer.config, trained=trained)
    FILES.save(indexer, folder)
    with whole_file(folder / CARD_FILE) as temporary:
        temporary.write_text(card_text(indexer.config), encoding="utf-8")
    return best


def card_text(config: LightningConfig) -> str:
    """Return an indexer's card: what it is, for which model, what it was trained on, and how it did on held-out."""
    trained, held_out = config.trained, config.trained["held_out"]
    lines = [
        f"# Lightning indexer for {config.model}",
        "",
        "DSA-style: trained by `kvscope dsa train`, the model frozen, on KL(attention summed over heads || softmax I).",
        "DeepSeek-V3.2 trains the model along with its indexer; that half is left out. It takes no positions.",
        "",
        f"- model: {config.model}, weights {config.model_revision}; it is refused on any other",
        f"- layers {listed(config.layers)}, one indexer each: {config.heads} heads x {config.key_dim}",
        f"- keys: {config.key_dim} fp8 values and one fp32 scale, {config.token_key_bytes} bytes a token and layer",
        f"- weights: {len(config.layers) * config.layer_weight_bytes:,} bytes in fp32",
        f"- held-out: {measures_text(held_out)}, over {held_out['held_out_rows']} decode steps",
        f"- documents: {trained['documents']}, the held-out ones besides",
    ]
    lines += [line for group in _alike(trained["data"]) for line in _data_lines(group)]
    options = ", ".join(f"{key} {value}" for key, value in trained["options"].items() if key != "device")
    return "\n".join([*lines, f"- options: {options}", ""])


def _alike(collections: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return collections in groups of neighbours that differ in their seed alone."""

    def kind(data: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(data.get(key, "")) for key in ("tasks", "lengths_tokens", "samples", "chat_template"))

    return [list(group) for _, group in groupby(collections, key=kind)]


def _data_lines(group: Sequence[dict[str, Any]]) -> list[str]:
    data, seeds = group[0], listed([each["seed"] for each in group])
    lengths = ", ".join(f"{length:,}" for length in data["lengths_tokens"])
    lines = [
        f"- data: {', '.join(data['tasks'])} at {lengths} tokens, {data['samples']} a cell, "
        f"seed{'s' if len(group) > 1 else ''} {seeds}"
    ]
    if "chat_template" in data:  # older collections were of plain texts, and did not say so
        lines.append(f"- prompts of these: {prompts_text(data['chat_template'])}")
    return lines


def measures_text(fields: dict[str, Any]) -> str:
    """Return held-out measures in one phrase."""
    return (
        f"KL {fields['held_out_loss']:.4f}, attention held {fields['mass_recall']:.1%} (the best choice "
        f"{fields['oracle_recall']:.1%})"
    )


def indexer_config(info: CollectionInfo, config: DsaTrainConfig) -> LightningConfig:
    """Return the configuration of the indexer to train."""
    heads, key_dim = default_sizes(info.query_heads, info.head_dim)
    return LightningConfig(
        model=info.model,
        model_revision=info.model_revision,
        layers=info.layers,
        hidden_size=info.hidden_size,
        heads=config.heads or heads,
        key_dim=config.key_dim or key_dim,
    )
