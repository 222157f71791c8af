"""What a collection holds: its description, its documents, and how a document's labels are told.

Shapes: n whole chunks of a prompt, n' with the incomplete last one, L indexed layers, M hidden size, F features a key,
C tokens a chunk, W states before step 0, T decode steps, R recorded steps (those that predict an answer token), K
stored tokens of the prompt.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.label_rule import LabelRule, count_votes, wanted_voters
from kvscope.methods.lsa.indexer_config import Features
from kvscope.methods.lsa.labels import Voters

Answers = Literal["own", "reference"]

STORED_DTYPE = torch.bfloat16
MASS_BYTES = 8  # chunk, voter, mass
TOP_TOKENS = 32  # of each step and layer: stored whatever the draw


@dataclass(frozen=True, kw_only=True)
class CollectionInfo:
    """What a collection holds and how it was made: equal for every shard of it.

    Attributes:
        model, model_revision, dtype: what ran.
        hidden_size: M.
        key_features: F, KV heads x head size of one layer.
        query_heads, head_dim: of one layer.
        kv_bytes_per_token: of the managed layers, in the model's dtype; with compressed entries of the whole cache,
            rounded.
        kept_bytes_per_token: of these the bytes that no method leaves out (HCA entries).
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
        chat_template: hash of the template that prompts are in; None for plain texts (all there was once).
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
    chat_template: str | None = None
    kept_bytes_per_token: int = 0

    @property
    def of_entries(self) -> bool:
        """Whether chunks are a model's compressed entries."""
        return self.features == "entries"

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
        self.wanted_voters(rule)
        return rule

    def wanted_voters(self, rule: LabelRule) -> torch.Tensor:
        """Return which of the recorded voters a rule asks, see ``label_rule.wanted_voters``."""
        return wanted_voters(rule, self.label_layers, self.query_heads, native_index=self.of_entries)

    @property
    def id(self) -> str:
        """Hash of all of it; every shard carries it."""
        values = asdict(self)
        if self.answers == "reference":
            del values["answers"]  # older than the choice: shards written then keep their name
        if self.chat_template is None:
            del values["chat_template"]  # likewise
        if not self.kept_bytes_per_token:
            del values["kept_bytes_per_token"]
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
        features: [L, n, 3, F] or [L, n, C, F]; of compressed entries the model's indexer keys [L, n, F].
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
        angles: [W + T, 2, P], cosine and sine of each state's position; of compressed entries alone.
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
    angles: torch.Tensor | None = None

    @property
    def n_states(self) -> int:
        """W."""
        return len(self.hidden) - self.info.n_steps

    def votes(self, rule: LabelRule, info: CollectionInfo) -> torch.Tensor:
        """Return the votes of every chunk at every recorded step, [R, n']."""
        return count_votes(
            rule,
            row=torch.repeat_interleave(torch.arange(len(self.steps)), self.indptr.long().diff()),
            voter=self.voters.long(),
            chunk=self.indices.long(),
            value=self.values,
            rest_RV=self.rest,
            wanted_V=info.wanted_voters(rule),
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
        return self.hidden[self._before(rows, lookback)]

    def state_angles(self, rows: torch.Tensor, lookback: int) -> torch.Tensor | None:
        """Return the angles of these states, [rows, lookback, 2, P]; None where queries do not rotate."""
        return None if self.angles is None else self.angles[self._before(rows, lookback)]

    def _before(self, rows: torch.Tensor, lookback: int) -> torch.Tensor:
        last = self.steps.long()[rows] + self.n_states
        return last[:, None] - lookback + torch.arange(lookback)


def document_bytes(info: CollectionInfo, *, prompt_tokens: int, n_steps: int) -> int:
    """Estimate the bytes one document takes on disk: keys, states and masses, which are nearly all of it."""
    element_bytes = STORED_DTYPE.itemsize
    n_chunks = prompt_tokens // info.chunk_tokens
    rows = {"stats": 3, "tokens": info.chunk_tokens, "entries": 1}[info.features]
    keys = len(info.layers) * n_chunks * rows * info.key_features
    states = (info.state_tokens + n_steps) * len(info.layers) * info.hidden_size
    queries = n_steps * len(info.layers) * info.query_heads * info.head_dim
    # Of the masses as many as can be above the least: each voter has at most 1 / least_mass of them.
    voters = len(info.label_layers) * (1 + info.query_heads + info.of_entries)
    most = n_chunks if info.least_mass == 0 else min(n_chunks, int(1 / info.least_mass))
    masses = n_steps * (n_chunks + voters * (1 + most * MASS_BYTES // element_bytes))
    tokens = 0
    if info.token_samples:
        L, steps = len(info.layers), n_steps * len(info.layers)
        # Which tokens the steps attend to most differs little from step to step.
        n_kept = min(prompt_tokens, info.token_samples + 2 * TOP_TOKENS * L)
        tokens = n_kept * (L * (info.hidden_size + info.key_features) + steps + 4) + steps * n_steps
    return element_bytes * (keys + states + queries + masses + tokens)
