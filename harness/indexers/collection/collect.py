"""``kvscope lsa collect``: run the model once over documents and store what an indexer is trained on, shard by shard.

A shard is on disk whole or not at all; the same call again continues after the last whole one.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.files import make_folder
from kvscope.harness.engine.backend import require_token_attention
from kvscope.harness.engine.chat import AUTO, chat_tokenizer
from kvscope.harness.engine.host_threads import few_host_threads
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.presets import refuse_preset
from kvscope.harness.indexers.collection.document import Answers, CollectionInfo, Document, document_bytes
from kvscope.harness.indexers.collection.entries import entries_of, save_native
from kvscope.harness.indexers.collection.entry_recorder import EntryRecorder
from kvscope.harness.indexers.collection.label_rule import LabelRule
from kvscope.harness.indexers.collection.make_document import Job, make_document
from kvscope.harness.indexers.collection.recorder import Recorder
from kvscope.harness.indexers.collection.shards import (
    NATIVE,
    check_shard,
    collection_info,
    read_manifest,
    write_manifest,
    write_shard,
)
from kvscope.harness.passes.progress import Progress
from kvscope.methods.lsa.indexer_config import Features
from kvscope.methods.lsa.labels import Voters
from kvscope.paths import check_out, user_path
from kvscope.units import format_bytes, format_length, parse_length

if TYPE_CHECKING:
    from kvscope.tasks.base import Task

DISK_MARGIN = 1.1
#: Chunks and labels of docs/lsa-study.md: without a least mass nearly every chunk is labelled, and nothing is learnt.
DEFAULT_CHUNK_TOKENS, DEFAULT_TOP_P, DEFAULT_LEAST_MASS = 16, 0.9, 0.2


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What to collect.

    Attributes:
        model: as ``kvscope run --model``.
        tasks: task specs.
        lengths_tokens: prompt and answer together.
        samples: documents per task and length.
        seed: of the documents. Keep it away from the seeds that evaluate.
        chunk_tokens: tokens of a chunk; None: 16, and over compressed entries those of one, which is all there is.
        layers: indexed layers; None: every managed layer.
        features: ``tokens`` (every key) or ``stats`` (mean, maximum and minimum of a chunk's keys, a fraction of the
            disk); compressed entries have a key each.
        top_p, votes, voters, least_mass: how labels are told unless training asks otherwise, see ``LabelRule``; masses
            below ``least_mass`` are not stored.
        state_tokens: hidden states kept before step 0, the most an indexer can look back; over compressed entries 1.
        shard_documents: documents a shard.
        token_samples: random tokens of each prompt of which state, keys and attention are stored for training a
            lightning indexer (``dsa``), beside those that steps attend to most; 0: none.
        answers: ``own``: the model's, greedily decoded; ``reference``: the task's, fed whatever the model would say.
        chat_template, device, dtype: as ``kvscope run``.
    """

    model: str = "reference"
    tasks: tuple[str, ...]
    lengths_tokens: tuple[int, ...]
    samples: int
    seed: int
    chunk_tokens: int | None = None
    layers: tuple[int, ...] | None = None
    features: Features = "tokens"
    top_p: float = DEFAULT_TOP_P
    votes: int = 1
    voters: Voters = "layer"
    least_mass: float = DEFAULT_LEAST_MASS
    state_tokens: int = 16
    shard_documents: int = 16
    token_samples: int = 0
    answers: Answers = "own"
    chat_template: str = AUTO
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        LabelRule(top_p=self.top_p, votes=self.votes, voters=self.voters, least_mass=self.least_mass)
        for name in ("samples", "chunk_tokens", "state_tokens", "shard_documents"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.token_samples < 0:
            raise UsageError(f"token_samples must be 0 or more, got {self.token_samples}.")
        if self.features not in ("stats", "tokens"):
            raise UsageError(f"features must be stats or tokens, got {self.features!r}.")
        if self.answers not in get_args(Answers):
            raise UsageError(f"answers must be {' or '.join(get_args(Answers))}, got {self.answers!r}.")
        if not self.tasks or not self.lengths_tokens:
            raise UsageError("At least one task and one length are needed: --task NAME --length TOKENS.")


def collect(
    config: CollectConfig,
    out: str | Path,
    *,
    progress: Progress,
    loaded: LoadedModel | None = None,
    goes_on: Callable[[], bool] = lambda: True,
) -> Path:
    """Collect into a folder; the same call again continues after the last whole shard.

    Args:
        loaded: the model, where the caller has it; None: it is loaded.
        goes_on: asked before every shard; where it says no, the collection stays unfinished.

    Raises:
        UsageError: bad options, a chat template that cannot be used, or a folder that holds another collection.
        EnvironmentProblem: the disk is too small.
    """
    folder = user_path(out, what="out")
    check_out(folder)
    tasks = make_tasks(config.tasks, samples=config.samples)
    refuse_preset(config.model, "collect")
    loaded = loaded or load_model(config.model, device=config.device, dtype=config.dtype)
    chat = chat_tokenizer(loaded.tokenizer, config.chat_template)
    check_lengths(tasks, config.lengths_tokens, chat or loaded.tokenizer, loaded)
    info = replace(describe(config, loaded), chat_template=None if chat is None else chat.sha256)
    jobs = [
        Job(task, parse_length(length), sample)
        for length in sorted(config.lengths_tokens)
        for task in tasks
        for sample in range(config.samples)
    ]
    groups = [jobs[at : at + config.shard_documents] for at in range(0, len(jobs), config.shard_documents)]
    shards = resume(folder, info)
    need_bytes = sum(estimate_bytes(info, job) for group in groups[len(shards) :] for job in group)
    check_disk(folder, int(need_bytes * DISK_MARGIN))
    progress.note(
        f"{len(jobs)} documents in {len(groups)} shards, {len(shards)} of them there already; about "
        f"{format_bytes(need_bytes)} to write, {format_bytes(free_bytes(folder))} free."
    )
    left = groups[len(shards) :]
    progress.begin(cells=len(left), work_tokens=sum(job.length_tokens for group in left for job in group))
    recorder = EntryRecorder(loaded, info) if info.of_entries else Recorder(info)
    if info.of_entries and not shards:
        save_native(loaded, info, folder / NATIVE)
    for group in left:
        if not goes_on():
            break
        number = len(shards)
        progress.begin_cell(f"shard {number + 1} of {len(groups)}", steps=len(group))
        documents = []
        with few_host_threads(str(loaded.device)):
            for job in group:
                progress.begin_step(f"{job.task.name} {format_length(job.length_tokens)} {job.sample}")
                documents.append(make_document(loaded, recorder, info, job, seed=config.seed, chat=chat))
                progress.end_step(work_tokens=job.length_tokens)
        name = f"shard-{number:05d}.safetensors"
        size_bytes = write_shard(folder / name, documents, info)
        infos = [asdict(document.info) for document in documents]
        shards.append({"file": name, "bytes": size_bytes, "documents": infos})
        write_manifest(folder, info, shards, complete=number + 1 == len(groups))
        progress.end_cell(f"{format_bytes(size_bytes)}, {positive_text(documents, info)}")
    return folder


def check_lengths(tasks: "Sequence[Task]", lengths_tokens: Sequence[int], tokenizer: Any, loaded: LoadedModel) -> None:
    """Refuse lengths that the model does not take, or that have no room for a task.

    Raises:
        UsageError: naming the length, and the task or the model.
    """
    lengths = [parse_length(length) for length in lengths_tokens]
    if max(lengths) > loaded.max_length_tokens:
        raise UsageError(
            f"Length {max(lengths):,} is over the {loaded.max_length_tokens:,} tokens that model '{loaded.name}' "
            "takes: use shorter lengths or another model."
        )
    for task in tasks:
        least_tokens = task.min_length_tokens(tokenizer)
        if min(lengths) < least_tokens:
            raise UsageError(
                f"Length {min(lengths):,} is too short for task {task.name!r}: it needs at least {least_tokens:,} "
                "tokens."
            )


def make_tasks(specs: Sequence[str], *, samples: int = 1) -> "list[Task]":
    """Return the tasks of specs.

    Raises:
        UsageError: one is none, or has fewer samples.
    """
    from kvscope.tasks.registry import create_tasks

    return create_tasks(specs, samples=samples)


def describe(config: CollectConfig, loaded: LoadedModel) -> CollectionInfo:
    """Return the description of a collection.

    Raises:
        UsageError: layers that kvscope does not manage in this model.
    """
    shape = loaded.shape
    layers = config.layers or shape.layers
    foreign = sorted(set(layers) - set(shape.layers))
    if foreign:
        raise UsageError(
            f"Layers {', '.join(map(str, foreign))} of model '{loaded.name}' cannot be indexed: kvscope manages "
            f"{', '.join(map(str, shape.layers))}."
        )
    if loaded.backend.native_indexer(loaded.model, ()) is None:
        require_token_attention(loaded.backend, model=loaded.name, what="kvscope lsa collect and train")
        kind: dict[str, Any] = {
            "kv_bytes_per_token": shape.kv_bytes_per_token, "features": config.features,
            "chunk_tokens": config.chunk_tokens or DEFAULT_CHUNK_TOKENS, "state_tokens": config.state_tokens,
        }  # fmt: skip
    else:
        kind = entries_of(loaded, chunk_tokens=config.chunk_tokens, token_samples=config.token_samples)
    return CollectionInfo(
        model=loaded.name,
        model_revision=shape.revision,
        dtype=str(loaded.dtype).removeprefix("torch."),
        hidden_size=shape.hidden_size,
        key_features=shape.indexed_features,
        query_heads=shape.n_q_heads,
        head_dim=shape.head_dim,
        layers=tuple(sorted(layers)),
        label_layers=shape.layers,
        top_p=config.top_p,
        voters=config.voters,
        least_mass=config.least_mass,
        votes=config.votes,
        tasks=tuple(config.tasks),
        lengths_tokens=tuple(sorted(config.lengths_tokens)),
        samples=config.samples,
        seed=config.seed,
        token_samples=config.token_samples,
        answers=config.answers,
        **kind,
    )


def resume(folder: Path, info: CollectionInfo) -> list[dict[str, Any]]:
    """Return the shards of a folder that are whole, making the folder if need be.

    Raises:
        UsageError: the folder holds another collection, or cannot be written.
    """
    make_folder(folder)
    if not (folder / "manifest.json").is_file():
        return []
    manifest = read_manifest(folder)
    there = collection_info(manifest, folder)
    for key, mine in asdict(info).items():
        theirs = getattr(there, key)
        if mine != theirs:
            raise UsageError(
                f"Folder '{folder}' holds another collection: {key} is {theirs} there and {mine} here. Give another "
                "--out, or the options it was begun with."
            )
    shards: list[dict[str, Any]] = []
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            break  # deleted because it was damaged: made again from here on
        check_shard(path, size_bytes=shard["bytes"], info=info)
        shards.append(shard)
    return shards


def estimate_bytes(info: CollectionInfo, job: Job) -> int:
    """Estimate a document's bytes before it is made."""
    return document_bytes(info, prompt_tokens=job.length_tokens, n_steps=job.task.max_new_tokens + 1)


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk a folder is on."""
    return shutil.disk_usage(folder).free


def check_disk(folder: Path, need_bytes: int) -> None:
    """Raise EnvironmentProblem when a disk is too small."""
    if need_bytes > free_bytes(folder):
        raise EnvironmentProblem(
            f"The collection needs about {format_bytes(need_bytes)} and the disk of '{folder}' has "
            f"{format_bytes(free_bytes(folder))} free; take fewer samples, shorter lengths or --features stats."
        )


def positive_text(documents: Sequence[Document], info: CollectionInfo) -> str:
    """Return how many chunks a step needs, in a few words."""
    rule = info.rule()
    found = [int((document.votes(rule, info) >= rule.votes).sum()) for document in documents]
    rows = sum(len(document.steps) for document in documents)
    return f"{sum(found) / max(1, rows):.1f} positive chunks a step"
