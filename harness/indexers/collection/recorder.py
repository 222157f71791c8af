"""Dense decode that notes, step by step, what an indexer has to learn: hidden states in, attended chunks out.

Shapes: L indexed layers, M hidden size, Q query heads, n' chunks of the prompt.
"""

from dataclasses import dataclass

import torch

from kvscope.harness.indexers.collection.document import STORED_DTYPE, CollectionInfo
from kvscope.harness.indexers.collection.label_rule import voter_masses
from kvscope.harness.indexers.collection.token_records import TokenStates, head_mean
from kvscope.methods.base import AttentionCall, Collector, SequenceCache, union_collectors
from kvscope.methods.dense.method import Dense
from kvscope.methods.lsa.collectors import ChunkKeys, LastStates
from kvscope.methods.lsa.indexer import chunk_features
from kvscope.methods.lsa.labels import chunk_mass, token_logits
from kvscope.methods.resident import ResidentSequence
from kvscope.methods.shape import ModelShape
from kvscope.methods.store import PromptKV


@dataclass(frozen=True)
class StepRecord:
    """One decode step.

    Attributes:
        hidden_LM: states that entered the indexed layers, [L, M].
        queries_LF: these layers' queries before rotation, heads side by side, [L, Q * head size].
        chunks, voters, values: masses of at least the collection's least, see ``label_rule``.
        rest_V: each voter's mass outside the prompt.
        mass_M: the strongest layer's head-summed mass of each chunk, [n'].
        token_mass_LN: attention to every token so far in the indexed layers, mean over query heads, [L, N] in fp16;
            empty where tokens are not asked for.
    """

    hidden_LM: torch.Tensor
    queries_LF: torch.Tensor
    chunks: torch.Tensor
    voters: torch.Tensor
    values: torch.Tensor
    rest_V: torch.Tensor
    mass_M: torch.Tensor
    token_mass_LN: torch.Tensor


class Recorder(Dense):
    """The dense method, observed."""

    def __init__(self, info: CollectionInfo) -> None:
        super().__init__()
        self.info = info
        self.features_name = f"lsa_features_{info.features}_{info.chunk_tokens}"

    def observed_layers(self, shape: ModelShape) -> tuple[int, ...]:
        del shape
        return self.info.layers

    @property
    def method(self) -> "Recorder":
        """What a session opens: itself."""
        return self

    def listeners(self, layers: tuple[int, ...]) -> list[Collector]:
        """Return what listens to the prefill."""
        return union_collectors([self], layers)

    def features(self, prompt: PromptKV, sequence: SequenceCache) -> torch.Tensor:
        """Return the features of the prompt's chunks, [L, n, ...]."""
        del sequence
        return torch.stack([prompt.metadata[self.features_name][layer] for layer in self.info.layers])

    def states_before(self, prompt: PromptKV, sequence: SequenceCache) -> torch.Tensor:
        """Return the states of the last tokens of the prompt, [W, L, M]; of a short one the first again."""
        del sequence
        return torch.stack([_padded(prompt, layer, self.info.state_tokens) for layer in self.info.layers], 1)

    def angles(self, prompt: PromptKV, sequence: SequenceCache, n_steps: int) -> dict[str, torch.Tensor]:
        """Return nothing: queries over tokens do not rotate."""
        del prompt, sequence, n_steps
        return {}

    def take(self, sequence: SequenceCache) -> StepRecord:
        """Return what the last step left, and forget it."""
        assert isinstance(sequence, RecordingSequence)
        return sequence.take()

    def unsupported(self, shape: ModelShape, device: torch.device | str) -> list[str]:
        del device
        unknown = sorted(set(self.info.layers) & set(shape.unknown_rotation_layers))
        layers = ", ".join(map(str, unknown))
        return [f"the position encoding of layers {layers} cannot be undone"] if unknown else []

    def collectors(self, layer: int) -> list[Collector]:
        if layer not in self.info.layers:
            return []

        def encode(layer: int, k_nCF: torch.Tensor) -> torch.Tensor:
            return chunk_features(k_nCF, self.info.features).to(STORED_DTYPE)

        keys = ChunkKeys(self.features_name, layer, chunk_tokens=self.info.chunk_tokens, encode=encode)
        found: list[Collector] = [keys, LastStates(layer, n_states=self.info.state_tokens)]
        return [*found, TokenStates(layer)] if self.info.token_samples else found

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        return RecordingSequence(prompt, torch.device(device), info=self.info, reserve_tokens=reserve_tokens)


class RecordingSequence(ResidentSequence):
    """Every token resident; each managed layer's attention is reduced to chunks."""

    def __init__(self, prompt: PromptKV, device: torch.device, *, info: CollectionInfo, reserve_tokens: int) -> None:
        super().__init__(prompt, device, ranges=[(0, prompt.n_tokens)], reserve_tokens=reserve_tokens)
        self._info, self._n_prompt = info, prompt.n_tokens
        self._hidden: dict[int, torch.Tensor] = {}
        self._queries: dict[int, torch.Tensor] = {}
        self._mass: list[torch.Tensor] = []
        self._token_mass: list[torch.Tensor] = []

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        self._hidden[layer] = hidden_BM[0].clone()

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        if layer in self._info.layers:
            position = self.pool.lengths[layer]
            plain = call.query if call.rotation is None else call.rotation.back(call.query, position)
            self._queries[layer] = plain[0, :, 0].flatten().clone()
        out = super().attend(layer, call)
        if layer in self._info.label_layers:
            logits_QT = token_logits(call, self.pool.pages[layer], n_tokens=self.pool.lengths[layer])
            if self._info.token_samples and layer in self._info.layers:
                self._token_mass.append(head_mean(logits_QT, call.sink_logits))
            prompt_QT, other_QT = logits_QT[:, : self._n_prompt], logits_QT[:, self._n_prompt :]
            self._mass.append(
                chunk_mass(prompt_QT, other_QT, chunk_tokens=self._info.chunk_tokens, sink_logits=call.sink_logits)
            )
        return out

    def take(self) -> StepRecord:
        """Return what the last step left, and forget it."""
        hidden_LM = torch.stack([self._hidden[layer] for layer in self._info.layers])
        queries_LF = torch.stack([self._queries[layer] for layer in self._info.layers])
        mass, self._mass, self._hidden, self._queries = self._mass, [], {}, {}
        tokens, self._token_mass = self._token_mass, []
        mass_LQM = torch.stack(mass)
        chunks, voters, values, rest_V = stored_masses(voter_masses(mass_LQM), self._info.least_mass)
        strongest = mass_LQM.mean(1).amax(0)[:-1]
        token_mass_LN = torch.stack(tokens) if tokens else torch.empty(0)
        return StepRecord(hidden_LM, queries_LF, chunks, voters, values, rest_V, strongest, token_mass_LN)

    def close(self) -> None:
        self._mass, self._token_mass, self._hidden, self._queries = [], [], {}, {}
        super().close()


def stored_masses(mass_VM: torch.Tensor, least_mass: float) -> tuple[torch.Tensor, ...]:
    """Return chunks, voters and values of the masses that are stored, and each voter's mass outside the prompt.

    Args:
        mass_VM: [V, n' + 1], the last column all the rest.
    """
    # A mass of zero can never be voted for; it is not worth a place.
    kept = mass_VM[:, :-1] >= max(least_mass, torch.finfo(torch.float16).tiny)
    voters, chunks = kept.nonzero(as_tuple=True)
    return chunks, voters, mass_VM[:, :-1][kept], mass_VM[:, -1]


def _padded(prompt: PromptKV, layer: int, width: int) -> torch.Tensor:
    states: torch.Tensor = prompt.metadata[f"last_states_{width}"][layer]
    missing = width - len(states)
    return states if missing <= 0 else torch.cat([states[:1].expand(missing, -1), states])
