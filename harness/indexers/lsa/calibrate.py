"""``kvscope lsa calibrate``: choose what an indexer keeps at threshold 0.5, by a shift of its bias; nothing is trained.

The weights stay what they are, at most rounded. So one training gives indexers for several chunk sizes (a chunk's score
is that of its best segment) and for several shares of the prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from kvscope.errors import UsageError
from kvscope.harness.engine.devices import resolve_device
from kvscope.harness.indexers.collection.places import data_record, note_unfinished
from kvscope.harness.indexers.lsa.label_share import MOST_KEPT
from kvscope.harness.indexers.lsa.lineage import data_ids, origin
from kvscope.harness.indexers.lsa.measuring import EvalConfig, matching_collections, measuring_options
from kvscope.harness.indexers.lsa.objective import shift_bias
from kvscope.harness.indexers.lsa.refreshes import Refreshes, cut_for_kept, cut_for_recall, measures, score
from kvscope.methods.lsa.indexer import Indexer, logit
from kvscope.methods.lsa.indexer_config import IndexerConfig
from kvscope.methods.lsa.indexer_files import indexer_folder, load_indexer, save_indexer
from kvscope.methods.lsa.layout import bounds_error
from kvscope.paths import check_out, user_path

WeightDtype = Literal["float32", "bfloat16"]
DEFAULT_TARGET_RECALL = 0.98
BOUNDS = ("cap_tokens", "cap_fraction", "least_tokens", "least_fraction")


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What to set, and by which measure: ``threshold``, ``target_recall`` or ``target_kept``; else a recall of 0.98.

    Attributes:
        chunk_tokens: of the indexer that is written, a multiple of the tokens that share a key; None: as it is.
        threshold: what is kept at this threshold is kept at 0.5 afterwards.
        target_recall: least golden recall at refreshes, the mean over those that need a chunk, as ``lsa eval`` has it.
        target_kept: largest mean share of the prompt's KV bytes kept at refreshes: chosen chunks, sinks, window,
            indexer keys and states.
        cap_tokens, cap_fraction: most tokens of a prompt that stay, as a number, or as a fraction of the prompt where
            that is more; stored with the indexer, and all measures are taken under it. None: the indexer's.
        least_tokens, least_fraction: least tokens of a prompt that stay, in the same way; the cap wins.
        dtype: of the stored weights. Biases stay in float32: they hold the threshold.
        measure: refresh interval and labels.
    """

    chunk_tokens: int | None = None
    threshold: float | None = None
    target_recall: float | None = None
    target_kept: float | None = None
    cap_tokens: int | None = None
    cap_fraction: float | None = None
    least_tokens: int | None = None
    least_fraction: float | None = None
    dtype: WeightDtype = "float32"
    measure: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if len(self.target) != 1:
            given = ", ".join(self.target)
            raise UsageError(f"Give one of threshold, target_recall and target_kept; given: {given}.")
        ((name, value),) = self.target.items()
        if not 0 < value < 1:
            raise UsageError(f"{name} must lie between 0 and 1, both excluded, got {value}.")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise UsageError(f"chunk_tokens must be 1 or more, got {self.chunk_tokens}.")
        if error := bounds_error(**self.bounds):
            raise UsageError(f"{error}.")
        if self.dtype not in get_args(WeightDtype):
            raise UsageError(f"dtype must be {' or '.join(get_args(WeightDtype))}, got {self.dtype!r}.")

    @property
    def bounds(self) -> dict[str, Any]:
        """What bounds the threshold, by name; None: as the indexer has it."""
        return {name: getattr(self, name) for name in BOUNDS}

    @property
    def target(self) -> dict[str, float]:
        """What was asked for, by name."""
        names = ("threshold", "target_recall", "target_kept")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given or {"target_recall": DEFAULT_TARGET_RECALL}


def calibrate(
    folders: Sequence[str | Path],
    indexer_spec: str,
    out: str | Path,
    config: CalibrateConfig,
    *,
    device: str = "auto",
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write an indexer whose threshold 0.5 keeps what was asked for.

    Returns:
        ``threshold``, which became 0.5; ``shift`` of the bias; measures ``before`` and ``after`` at 0.5, both in the
        chunks that were asked for, before with the weights as they were; ``warning``, a sentence where that keeps more
        than 30 % of a prompt, else None.

    Raises:
        UsageError: bad options, an indexer and collections that do not belong together, or a target these documents
            cannot meet.
    """
    folder, target = indexer_folder(indexer_spec), user_path(out, what="out")
    check_out(target)
    if target.resolve() == folder.resolve():
        raise UsageError(f"--out '{out}' is the indexer itself; give another folder, it is not overwritten.")
    indexer = load_indexer(folder).to(resolve_device(device))
    indexer.config = in_chunks(indexer.config, config.chunk_tokens, folder=str(folder))
    given = {name: value for name, value in config.bounds.items() if value is not None}
    indexer.config = replace(indexer.config, **given)
    collections = matching_collections(folders, indexer.config, folder=str(folder))
    note_unfinished(collections, note)
    trained_on = data_ids(indexer.config.trained)
    for collection in collections:
        if collection.id in trained_on:
            note(f"note: the indexer was trained on '{collection.folder}': other documents will have a lower recall.")
    options = measuring_options(indexer.config, config.measure)

    scored = score(indexer, collections, options)
    before = measures(scored)
    if config.dtype == "bfloat16":
        round_weights(indexer)  # first, so that the target is met by the weights that are stored
        scored = score(indexer, collections, options)
    cut = cut_of(scored, config)
    shift_bias(indexer, -cut)
    after = measures(score(indexer, collections, options))
    found = {
        "threshold": round(float(torch.sigmoid(torch.tensor(cut, dtype=torch.float64))), 6),
        "shift": round(-cut, 6), "before": before, "after": after, "warning": warning_of(after),
    }  # fmt: skip
    record = {
        "target": config.target, **found,
        **{name: getattr(indexer.config, name) for name in BOUNDS},
        "chunk_tokens": indexer.config.chunk_tokens, "dtype": config.dtype, "tau": options.tau,
        "labels": options.rule(collections[0].info).text(), "sink_tokens": options.sink_tokens,
        "recency_tokens": options.recency_tokens, "documents": len(scored), "data": data_record(collections),
    }  # fmt: skip
    trained = {"calibration": record, "start": origin(folder)}
    indexer.config = replace(indexer.config, kept_fraction=after["kept_candidates"], trained=trained)
    store(indexer.cpu(), target, dtype=config.dtype)
    return found


def in_chunks(config: IndexerConfig, chunk_tokens: int | None, *, folder: str) -> IndexerConfig:
    """Return the configuration of the same weights for another chunk size.

    Raises:
        UsageError: no multiple of the tokens that share a key.
    """
    if chunk_tokens is None:
        return config
    key_tokens = config.segment_tokens or config.chunk_tokens
    if chunk_tokens % key_tokens:
        raise UsageError(
            f"chunk_tokens is {chunk_tokens}, and indexer '{folder}' has a key for every {key_tokens} tokens; give a "
            f"multiple of {key_tokens}."
        )
    return replace(config, chunk_tokens=chunk_tokens, segment_tokens=None if chunk_tokens == key_tokens else key_tokens)


def cut_of(scored: Sequence[Refreshes], config: CalibrateConfig) -> float:
    """Return the logit from which on chunks are to be kept.

    Raises:
        UsageError: the target cannot be met.
    """
    ((name, value),) = config.target.items()
    if name == "threshold":
        return logit(value)
    return cut_for_recall(scored, value) if name == "target_recall" else cut_for_kept(scored, value)


def warning_of(measured: dict[str, Any]) -> str | None:
    """Return what is wrong with an indexer that keeps nearly everything; None where it does not."""
    if measured["kept"] <= MOST_KEPT:
        return None
    return (
        f"warning: threshold 0.5 keeps {measured['kept']:.1%} of these prompts, and above {MOST_KEPT:.0%} there is "
        "little to save: its recall says nothing. Lower the target, or train on labels that ask for less."
    )


@torch.inference_mode()
def round_weights(indexer: Indexer) -> None:
    """Round every weight but the biases of the layers to bfloat16, in place."""
    for name, weight in indexer.named_parameters():
        if name not in bias_names(indexer):
            weight.copy_(weight.bfloat16())


def bias_names(indexer: Indexer) -> set[str]:
    """Return the names of what the threshold is shifted by: one number a layer."""
    return {f"layers.{layer}.bias" for layer in indexer.config.layers}


def store(indexer: Indexer, folder: Path, *, dtype: WeightDtype) -> None:
    """Write an indexer in a dtype, see ``CalibrateConfig.dtype``."""
    for name, weight in indexer.named_parameters():
        if dtype == "bfloat16" and name not in bias_names(indexer):
            weight.data = weight.data.bfloat16()
    save_indexer(indexer, folder)


def summary_text(found: dict[str, Any]) -> str:
    """Return what was done and what it keeps, before and after."""
    from tabulate import tabulate

    def row(name: str) -> list[str]:
        measured = found[name]
        recall = "-" if measured["recall"] is None else f"{measured['recall']:.2%}"
        return [name, recall, f"{measured['kept']:.2%}", f"{measured['kept_candidates']:.2%}"]

    header = ["threshold 0.5", "golden recall", "prompt bytes kept", "candidates kept"]
    text = tabulate([row("before"), row("after")], headers=header, disable_numparse=True)
    return (
        f"{text}\n\nMeans over {found['after']['refreshes']} refreshes. What was threshold {found['threshold']:.4g} is "
        f"0.5 now: bias shifted by {found['shift']:+.4f}." + (f"\n\n{found['warning']}" if found["warning"] else "")
    )
