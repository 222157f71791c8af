"""Recording over compressed entries: chunks are the model's entries, their features its own indexer keys.

The backend watches (``methods.lsa.observed``); here what it saw becomes what a document stores. Beside attention the
native indexers vote, as in the paper: arXiv 2606.09079 takes the softmax of their scores.

Shapes: L indexed layers, n entries of the prompt, T decode steps, P pairs that rotate.
"""

from typing import Any

import torch

from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.indexers.collection.document import CollectionInfo
from kvscope.harness.indexers.collection.label_rule import voter_masses
from kvscope.harness.indexers.collection.recorder import StepRecord, stored_masses
from kvscope.methods.base import Collector, SequenceCache
from kvscope.methods.lsa.observed import WatchedEntries
from kvscope.methods.store import PromptKV


class EntryRecorder:
    """What ``recorder.Recorder`` is over tokens.

    Attributes:
        method: dense, watched.
    """

    def __init__(self, loaded: LoadedModel, info: CollectionInfo) -> None:
        method = loaded.backend.watched_dense(loaded.model, loaded.shape, info.layers)
        assert method is not None
        self.method, self.info = method, info

    def listeners(self, layers: tuple[int, ...]) -> list[Collector]:
        """Nothing listens to the prefill: the cache has it all."""
        del layers
        return []

    def features(self, prompt: PromptKV, sequence: SequenceCache) -> torch.Tensor:
        """Return the model's indexer keys, [L, n, E]."""
        del prompt
        return torch.stack([_watched(sequence).keys(layer) for layer in self.info.layers])

    def states_before(self, prompt: PromptKV, sequence: SequenceCache) -> torch.Tensor:
        """Return the state of the prompt's last token, [1, L, M]."""
        del prompt
        return torch.stack([_watched(sequence).state_before(layer) for layer in self.info.layers])[None]

    def angles(self, prompt: PromptKV, sequence: SequenceCache, n_steps: int) -> dict[str, torch.Tensor]:
        """Return the angles of the state before the steps and of each step's, [1 + T, 2, P]."""
        positions = range(prompt.n_tokens - 1, prompt.n_tokens + n_steps)
        return {"angles": torch.stack([_watched(sequence).angles(each) for each in positions]).cpu()}

    def take(self, sequence: SequenceCache) -> StepRecord:
        """Return what the last step left, and forget it."""
        step = _watched(sequence).take()
        attention, index = _with_rest(step.attention_CQn), _with_rest(step.index_Cn)
        chunks, voters, values, rest_V = stored_masses(voter_masses(attention, index), self.info.least_mass)
        return StepRecord(
            hidden_LM=step.hidden_LM,
            queries_LF=step.hidden_LM.new_zeros((len(self.info.layers), 0)),
            chunks=chunks, voters=voters, values=values, rest_V=rest_V,
            mass_M=step.attention_CQn.mean(1).amax(0),
            token_mass_LN=torch.empty(0),
        )  # fmt: skip


def _watched(sequence: Any) -> WatchedEntries:
    assert isinstance(sequence, WatchedEntries)
    return sequence


def _with_rest(mass: torch.Tensor) -> torch.Tensor:
    """Return masses [..., n] with what is missing to 1 behind them, [..., n + 1]."""
    return torch.cat([mass, (1 - mass.sum(-1, keepdim=True)).clamp_min(0)], -1)
