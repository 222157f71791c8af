"""What ``lsa collect`` stores and everything behind it reads: safetensors shards with a manifest. No model is loaded.

Shapes: n whole chunks of a prompt, n' with the incomplete last one, L indexed layers, M hidden size, F features a key,
C tokens a chunk, W states before step 0, T decode steps, R recorded steps (those that predict an answer token), K
stored tokens of the prompt.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.label_rule import LabelRule, count_votes, wanted_voters
from kvscope.harness.indexers.collection.rechunk import chunk_factor, rechunked
from kvscope.methods.budget import default_recency_tokens
from kvscope.methods.lsa.indexer import Features
from kvscope.methods.lsa.labels import Voters
from kvscope.methods.lsa.layout import ChunkLayout

Answers = Literal["own", "reference"]

FORMAT = 2
MANIFEST = "manifest.json"
STORED_DTYPE = torch.bfloat16
MASS_BYTES = 8  # chunk, voter, mass
_TENSORS = (
    "features",
    "hidden",
    "steps",
    "segments",
    "indptr",
    "indices",
    "voters",
    "values",
    "rest",
    "mass",
    "queries",
)
_TOKEN_TENSORS = ("tokens", "token_weights", "token_states", "token_keys", "token_mass", "step_mass")
TOP_TOKENS = 32  # of each step and layer: stored whatever the draw


@dataclass(frozen=True, kw_only=True)
class CollectionInfo:
    """What a collection holds and how it was made: equal for every shard of it.

    Attributes:
        model, model_revision, dtype: what ran.
        hidden_size: M.
        key_features: F, KV heads x head size of one layer.
        query_heads, head_dim: of one layer.
        kv_bytes_per_token: of the managed layers, in the model's dtype.
        layers: indexed layers: their keys and the hidden states entering them are stored.
        label_layers: layers whose attention was recorded.
        chunk_tokens: C.
        features: what is stored of the keys (see ``chunk_features``).
        top_p, voters, votes, least_mass: how labels are told unless one asks otherwise. Masses below ``least_mass`` are
            not stored, so no other rule may ask for less.
        state_tokens: W.
        tasks, lengths_tokens, samples, seed: the documents.
        token_samples: random prompt tokens of which state, keys and attention are stored, beside those that a step
            attends to most; 0: none of it is stored.
        answers: whose answers were fed: the model's ``own``, or the task's ``reference`` (all there was once).
    """

    model: str
    model_revision: str
    dtype: str
    hidden_size: int
    key_features: int
    query_heads: int
    head_dim: int
    kv_bytes_per_token: int
    layers: tuple[int, ...]
    label_layers: tuple[int, ...]
    chunk_tokens: int
    features: Features
    top_p: float
    voters: Voters
    least_mass: float
    votes: int
    state_tokens: int
    tasks: tuple[str, ...]
    lengths_tokens: tuple[int, ...]
    samples: int
    seed: int
    token_samples: int = 0
    answers: Answers = "reference"

    def rule(self, **values: Any) -> LabelRule:
        """Return how labels are told, with values that are not None in place of the collection's.

        Raises:
            UsageError: a value out of range, or smaller masses than were stored.
        """
        own = LabelRule(top_p=self.top_p, voters=self.voters, votes=self.votes, least_mass=self.least_mass)
        rule = own.changed(**values)
        if rule.least_mass < self.least_mass:
            raise UsageError(
                f"least_mass is {rule.least_mass}, and the collection stores no mass below {self.least_mass}; collect "
                "again with a smaller --least-mass."
            )
        wanted_voters(rule, self.label_layers, self.query_heads)
        return rule

    @property
    def id(self) -> str:
        """Hash of all of it; every shard carries it."""
        values = asdict(self)
        if self.answers == "reference":
            del values["answers"]  # older than the choice: shards written then keep their name
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class DocumentInfo:
    """One document of a shard."""

    task: str
    question_type: str
    length_tokens: int
    sample: int
    prompt_tokens: int
    n_steps: int

    @property
    def name(self) -> str:
        """The document in words, and the key of train/held-out splits."""
        return f"{self.task}/{self.length_tokens}/{self.sample}"


@dataclass(frozen=True, kw_only=True)
class Document:
    """The tensors of one document.

    Attributes:
        features: [L, n, 3, F] or [L, n, C, F].
        hidden: [W + T, L, M], states entering the indexed layers: of the W tokens before step 0, then of every step.
        steps: [R], decode steps that predict an answer token, ascending.
        segments: [R], which answer each belongs to.
        indptr, indices, voters, values: CSR of attention masses, a row a recorded step: chunk, voter (see
            ``label_rule``) and mass.
        rest: [R, V], what each voter's attention gave to no chunk of the prompt.
        mass: [R, n'], the strongest layer's head-summed attention.
        queries: [T, L, Q * head size], the model's own queries before rotation: training starts from them.
        tokens: [K], sampled tokens of the prompt, ascending; this and what follows only with ``token_samples``.
        token_weights: [K] in fp32, how many tokens of the prompt each stands for; they add up to the prompt.
        token_states: [L, K, M], states of those tokens entering the indexed layers.
        token_keys: [L, K, F], their keys before rotation.
        token_mass: [R, L, K], attention of the recorded steps to each of them, mean over query heads.
        step_mass: [R, L, T], the same to the tokens of the decode steps; 0 behind the step itself.
    """

    info: DocumentInfo
    features: torch.Tensor
    hidden: torch.Tensor
    steps: torch.Tensor
    segments: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    voters: torch.Tensor
    values: torch.Tensor
    rest: torch.Tensor
    mass: torch.Tensor
    queries: torch.Tensor
    tokens: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None
    token_states: torch.Tensor | None = None
    token_keys: torch.Tensor | None = None
    token_mass: torch.Tensor | None = None
    step_mass: torch.Tensor | None = None

    @property
    def n_states(self) -> int:
        """W."""
        return len(self.hidden) - self.info.n_steps

    def layout(self, chunk_tokens: int, *, sink_tokens: int, recency_tokens: int | None) -> ChunkLayout:
        """Return how its prompt is cut."""
        n_tokens = self.info.prompt_tokens
        return ChunkLayout(
            n_tokens=n_tokens,
            chunk_tokens=chunk_tokens,
            sink_tokens=sink_tokens,
            recency_tokens=default_recency_tokens(n_tokens) if recency_tokens is None else recency_tokens,
        )

    def votes(self, rule: LabelRule, info: CollectionInfo) -> torch.Tensor:
        """Return the votes of every chunk at every recorded step, [R, n']."""
        return count_votes(
            rule,
            row=torch.repeat_interleave(torch.arange(len(self.steps)), self.indptr.long().diff()),
            voter=self.voters.long(),
            chunk=self.indices.long(),
            value=self.values,
            rest_RV=self.rest,
            wanted_V=wanted_voters(rule, info.label_layers, info.query_heads),
            n_chunks=self.mass.shape[1],
        )

    def positives(self, rule: LabelRule, info: CollectionInfo, *, tau: int) -> torch.Tensor:
        """Return the labels, bool [R, n']: chunks with enough votes in any step of [t, t + tau) of the same answer."""
        once = self.votes(rule, info) >= rule.votes
        total = torch.cat([torch.zeros_like(once[:1]), once]).int().cumsum(0)
        # Rows ascend by step and answers do not overlap, so an interval is a range of rows.
        steps, segments = self.steps.long(), self.segments.long()
        end = torch.minimum(torch.searchsorted(steps, steps + tau), torch.searchsorted(segments, segments, right=True))
        return total[end] > total[:-1]

    def refresh_rows(self, tau: int) -> torch.Tensor:
        """Return the rows at which decoding this answer would refresh: every tau-th step of an answer, [rows]."""
        segments, steps = self.segments.long(), self.steps.long()
        first = steps[torch.searchsorted(segments, segments)]
        return ((steps - first) % tau == 0).nonzero()[:, 0]

    def states(self, rows: torch.Tensor, lookback: int) -> torch.Tensor:
        """Return what a refresh before each of ``rows`` scores with: the states before it, [rows, lookback, L, M]."""
        last = self.steps.long()[rows] + self.n_states
        return self.hidden[last[:, None] - lookback + torch.arange(lookback)]


class Collection:
    """A folder of shards, opened for reading; documents load one at a time.

    Attributes:
        id: of what was recorded, whatever chunk size it is seen in.
        info: its description, with the chunk size it is seen in.
        complete: whether it was collected to its end.
        documents: what it holds.
    """

    def __init__(self, folder: str | Path, *, chunk_tokens: int | None = None) -> None:
        """Check the manifest and every shard it lists.

        Args:
            chunk_tokens: see it in chunks of this size, a multiple of the recorded one.

        Raises:
            UsageError: no collection there, a shard that is missing, truncated or from another collection, or a chunk
                size it cannot be seen in.
        """
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        recorded = collection_info(manifest, self.folder)
        self.id = recorded.id
        self._factor = chunk_factor(recorded, chunk_tokens)
        self.info = replace(recorded, chunk_tokens=recorded.chunk_tokens * self._factor)
        self.complete = bool(manifest["complete"])
        self.documents: list[DocumentInfo] = []
        self._where: list[tuple[Path, int]] = []
        self._positives: dict[tuple[int, LabelRule, int], torch.Tensor] = {}
        for shard in manifest["shards"]:
            path = self.folder / shard["file"]
            check_shard(path, size_bytes=shard["bytes"], info=recorded)
            for index, values in enumerate(shard["documents"]):
                self.documents.append(DocumentInfo(**values))
                self._where.append((path, index))
        if not self.documents:
            raise UsageError(f"Collection '{folder}' holds no document yet; run kvscope lsa collect to its end.")

    def __len__(self) -> int:
        return len(self.documents)

    def positives(self, index: int, rule: LabelRule, *, tau: int) -> torch.Tensor:
        """Return a document's labels; they are worked out once."""
        key = (index, rule, tau)
        if key not in self._positives:
            self._positives[key] = self.load(index).positives(rule, self.info, tau=tau)
        return self._positives[key]

    def load(self, index: int) -> Document:
        """Read one document; large tensors are mapped, not copied, until they are used."""
        path, number = self._where[index]
        try:
            with safe_open(path, framework="pt") as file:
                names = _tensor_names(self.info)
                tensors = {name: file.get_tensor(f"{number}/{name}") for name in names}
        except (OSError, SafetensorError) as error:
            raise UsageError(f"Shard '{path}' cannot be read ({error}); delete it and run collect again.") from error
        document = Document(info=self.documents[index], **tensors)
        return document if self._factor == 1 else rechunked(document, self._factor)


def open_collections(
    folders: Sequence[str | Path], *, chunk_tokens: int | None = None, layers: tuple[int, ...] | None = None
) -> list[Collection]:
    """Open collections that are to be used together.

    Args:
        chunk_tokens: see them in chunks of this size; None: as they were recorded.
        layers: the indexed layers that are wanted: all hold these, and may hold others; None: all hold the same.

    Raises:
        UsageError: as ``Collection``, or two of them were made differently; the message names both.
    """
    if not folders:
        raise UsageError("Give at least one folder that kvscope lsa collect wrote: --data DIR.")
    opened = [Collection(folder, chunk_tokens=chunk_tokens) for folder in folders]
    same = (
        *("model_revision", "label_layers", "chunk_tokens", "features", "hidden_size", "key_features"),
        *("query_heads", "head_dim"),
        *("top_p", "voters", "votes", "least_mass"),
        *(() if layers else ("layers",)),
    )
    for each in opened:
        foreign = sorted(set(layers or ()) - set(each.info.layers))
        if foreign:
            raise UsageError(
                f"Layers {', '.join(map(str, foreign))} are not in collection '{each.folder}', which holds "
                f"{', '.join(map(str, each.info.layers))}."
            )
    first = opened[0]
    for other in opened[1:]:
        for key in same:
            mine, theirs = getattr(first.info, key), getattr(other.info, key)
            if mine != theirs:
                raise UsageError(
                    f"Collections '{first.folder}' and '{other.folder}' cannot be mixed: {key} is {mine} in the one "
                    f"and {theirs} in the other."
                )
    return opened


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        UsageError: missing, unreadable, or of a format this kvscope does not know.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
    except FileNotFoundError:
        raise UsageError(f"'{folder}' is no collection: {MANIFEST} is missing; give a folder of lsa collect.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"'{path}' cannot be read ({error}); collect again into a new folder.") from error
    if version != FORMAT:
        raise UsageError(f"'{path}' has format {version}, this kvscope knows {FORMAT}; collect again.")
    return manifest


def collection_info(manifest: Mapping[str, Any], folder: Path) -> CollectionInfo:
    """Return the collection's description from its manifest.

    Raises:
        UsageError: keys are missing or unknown.
    """
    values = {"answers": "reference", **manifest.get("collection", {})}
    names = {field.name for field in fields(CollectionInfo)}
    if set(values) != names:
        odd = ", ".join(sorted(names ^ set(values)))
        raise UsageError(f"'{folder / MANIFEST}' is damaged ({odd}); collect again into a new folder.")
    for key in ("layers", "label_layers", "tasks", "lengths_tokens"):
        values[key] = tuple(values[key])
    return CollectionInfo(**values)


def check_shard(path: Path, *, size_bytes: int, info: CollectionInfo) -> None:
    """Check that a shard is whole and belongs to a collection, without reading its tensors.

    Raises:
        UsageError: it is not.
    """
    mend = "delete it and run the same kvscope lsa collect again"
    if not path.is_file():
        raise UsageError(f"Shard '{path}' is missing; {mend}.")
    found_bytes = path.stat().st_size
    if found_bytes != size_bytes:
        raise UsageError(
            f"Shard '{path}' is truncated or was changed: {found_bytes:,} bytes, the manifest says {size_bytes:,}; "
            f"{mend}."
        )
    try:
        with safe_open(path, framework="pt") as file:
            owner = (file.metadata() or {}).get("collection")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"Shard '{path}' is not a safetensors file ({error}); {mend}.") from error
    if owner != info.id:
        raise UsageError(
            f"Shard '{path}' belongs to collection {owner}, its folder to {info.id}: shards of two collections were "
            f"mixed; {mend}."
        )


def write_shard(path: Path, documents: Sequence[Document], info: CollectionInfo) -> int:
    """Write a shard; it appears whole or not at all. Returns its bytes."""
    tensors = {
        f"{number}/{name}": getattr(document, name).contiguous()
        for number, document in enumerate(documents)
        for name in _tensor_names(info)
    }
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"collection": info.id})
    os.replace(temporary, path)
    return path.stat().st_size


def _tensor_names(info: CollectionInfo) -> tuple[str, ...]:
    return (*_TENSORS, *(_TOKEN_TENSORS if info.token_samples else ()))


def write_manifest(folder: Path, info: CollectionInfo, shards: Sequence[Mapping[str, Any]], *, complete: bool) -> None:
    """Write the manifest; it appears whole or not at all."""
    manifest = {"format": FORMAT, "complete": complete, "collection": asdict(info), "shards": list(shards)}
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


def document_bytes(info: CollectionInfo, *, prompt_tokens: int, n_steps: int) -> int:
    """Estimate the bytes one document takes on disk: keys, states and masses, which are nearly all of it."""
    element_bytes = STORED_DTYPE.itemsize
    n_chunks = prompt_tokens // info.chunk_tokens
    rows = 3 if info.features == "stats" else info.chunk_tokens
    keys = len(info.layers) * n_chunks * rows * info.key_features
    states = (info.state_tokens + n_steps) * len(info.layers) * info.hidden_size
    queries = n_steps * len(info.layers) * info.query_heads * info.head_dim
    # Of the masses as many as can be above the least: each voter has at most 1 / least_mass of them.
    voters = len(info.label_layers) * (1 + info.query_heads)
    most = n_chunks if info.least_mass == 0 else min(n_chunks, int(1 / info.least_mass))
    masses = n_steps * (n_chunks + voters * (1 + most * MASS_BYTES // element_bytes))
    tokens = 0
    if info.token_samples:
        L, steps = len(info.layers), n_steps * len(info.layers)
        # Which tokens the steps attend to most differs little from step to step.
        n_kept = min(prompt_tokens, info.token_samples + 2 * TOP_TOKENS * L)
        tokens = n_kept * (L * (info.hidden_size + info.key_features) + steps + 4) + steps * n_steps
    return element_bytes * (keys + states + queries + masses + tokens)
