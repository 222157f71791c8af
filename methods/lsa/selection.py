"""What chooses the chunks: the rule (threshold or budget), and the sources of scores it is applied to.

Shapes: L indexed layers, M hidden size, W hidden states scored at once, n candidate chunks, E key size, Q query heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvscope.methods.fp8_keys import dequantize, unpack
from kvscope.methods.lsa.indexer import Indexer, IndexerConfig, logit
from kvscope.methods.lsa.layout import ChunkLayout
from kvscope.methods.store import PromptKV


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which candidates are kept, by their scores. Exactly one is set.

    Attributes:
        threshold: probability in (0, 1).
        n_chunks: candidates kept, those of the highest scores.
    """

    threshold: float | None = None
    n_chunks: int | None = None

    def of_logits(self, logits_n: torch.Tensor) -> torch.Tensor:
        """Return the candidates to keep, ascending, on the CPU. Equal scores are taken in order."""
        if self.n_chunks is not None:
            return _top(logits_n, self.n_chunks)
        assert self.threshold is not None
        return (logits_n >= logit(self.threshold)).nonzero()[:, 0].cpu()

    def of_mass(self, mass_n: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """The same for attention mass: a threshold keeps the fewest candidates that reach it together with ``rest``."""
        if self.n_chunks is not None:
            return _top(mass_n, self.n_chunks)
        assert self.threshold is not None
        # The rest counts first, whatever it weighs: it stays anyway.
        order = torch.argsort(mass_n, dim=0, descending=True, stable=True)
        before = rest + mass_n[order].cumsum(0) - mass_n[order]
        return order[before < self.threshold * (rest + mass_n.sum())].sort().values.cpu()


def _top(score_n: torch.Tensor, n_chunks: int) -> torch.Tensor:
    best = torch.argsort(score_n, dim=0, descending=True, stable=True)[:n_chunks]
    return best.sort().values.cpu()


class Selector:
    """Chooses candidate chunks for one sequence. Either ``choose`` (one set for all layers, before the step) or
    ``choose_by_mass`` (a set a layer, in it) does the work.

    Attributes:
        metadata_bytes: device bytes of what it keeps.
        refresh_bytes, refresh_flops: what one choice reads and computes.
    """

    reads_mass = False
    metadata_bytes = 0
    refresh_bytes = 0
    refresh_flops = 0

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        """Take a hidden state of the current step; ``choose`` sees it from the next step on."""

    def end_step(self) -> None:
        """The states observed belong to a finished step."""

    def choose(self) -> torch.Tensor:
        """Return the candidates to keep, counted from the first candidate, ascending, on the CPU."""
        raise NotImplementedError

    def choose_by_mass(self, mass_n: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """The same from one layer's attention mass over the candidates, and the mass of everything else."""
        raise NotImplementedError

    def close(self) -> None:
        """Drop every tensor."""


class IndexerSelector(Selector):
    """Scores with an indexer. Nothing is chosen twice from the same states, so choosing is lazy and once a refresh."""

    def __init__(
        self,
        indexer: Indexer,
        prompt: PromptKV,
        device: torch.device,
        *,
        layout: ChunkLayout,
        rule: Rule,
        keys_name: str,
        states_name: str | None,
    ) -> None:
        """Take keys and first states from a prompt's metadata.

        Args:
            indexer: on ``device``.
            keys_name, states_name: the collectors' names; without the latter the last hidden state alone is read.

        Raises:
            ValueError: the prompt was prefilled without this indexer's collectors.
        """
        config = indexer.config
        if any(layer not in prompt.metadata.get(name, {}) for name in filter(None, (keys_name, states_name))
               for layer in config.layers):  # fmt: skip
            raise ValueError("the prompt was prefilled without this method's collectors (see union_collectors)")
        self._indexer, self._rule, self._layers = indexer, rule, config.layers
        packed = [prompt.metadata[keys_name][layer][layout.first : layout.last] for layer in config.layers]
        pairs = [unpack(p) for p in packed]
        self._keys_LnE = torch.stack([keys for keys, _ in pairs]).to(device)
        self._scale_Ln = torch.stack([scale for _, scale in pairs]).to(device)
        width = config.lookback_tokens
        first = torch.stack([_first_states(prompt, layer, width, states_name) for layer in config.layers], 1)
        self._states_WLM = first.to(device, copy=True)
        self._incoming: dict[int, torch.Tensor] = {}
        self.metadata_bytes = metadata_bytes(config, len(self._keys_LnE[0]), element_bytes=first.element_size())
        self.refresh_bytes = refresh_bytes(config, layout.n_candidates)
        self.refresh_flops = config.scoring_flops(layout.n_candidates)

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        self._incoming[layer] = hidden_BM[0]

    def end_step(self) -> None:
        newest_LM = torch.stack([self._incoming[layer] for layer in self._layers])
        self._states_WLM[:-1] = self._states_WLM[1:].clone()
        self._states_WLM[-1] = newest_LM
        self._incoming.clear()

    def choose(self) -> torch.Tensor:
        keys = [dequantize(keys, scale) for keys, scale in zip(self._keys_LnE, self._scale_Ln, strict=True)]
        logits_n = self._indexer.logits(self._states_WLM, keys).amax(0)
        return self._rule.of_logits(logits_n)

    def close(self) -> None:
        self._keys_LnE = self._scale_Ln = self._states_WLM = torch.empty(0)
        self._incoming.clear()


class MassSelector(Selector):
    """The upper bound: the model's own attention at the step, over everything in the mirror. Each layer for itself."""

    reads_mass = True

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def choose_by_mass(self, mass_n: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        return self._rule.of_mass(mass_n, rest)


class ScriptedSelector(Selector):
    """Plays back sets chosen beforehand, one a refresh; past the last nothing is chosen."""

    def __init__(self, sets: Sequence[torch.Tensor]) -> None:
        self._sets = list(sets)
        self._next = 0

    def choose(self) -> torch.Tensor:
        chosen = self._sets[self._next] if self._next < len(self._sets) else torch.empty(0, dtype=torch.long)
        self._next += 1
        return chosen


class NothingToChoose(Selector):
    """For prompts without a candidate chunk."""

    def choose(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.long)


def metadata_bytes(config: IndexerConfig, n_candidates: int, *, element_bytes: int) -> int:
    """Return the device bytes an indexer keeps of one sequence: keys and scales, and the states it will score with."""
    states = config.lookback_tokens * len(config.layers) * config.hidden_size * element_bytes
    return n_candidates * config.chunk_key_bytes + states


def refresh_bytes(config: IndexerConfig, n_candidates: int) -> int:
    """Return the bytes one refresh reads: every key with its scale, and the weights of the query side."""
    heads, rank, width = config.heads, config.rank, config.hidden_size
    query_weights = width + width * rank + rank + rank * heads * config.key_dim + (width + 1) * heads + 1
    return n_candidates * config.chunk_key_bytes + len(config.layers) * 4 * query_weights


def _first_states(prompt: PromptKV, layer: int, width: int, states_name: str | None) -> torch.Tensor:
    """Return the last ``width`` states of the prompt [W, M]; a shorter prompt repeats its oldest."""
    states = prompt.last_hidden[layer] if states_name is None else prompt.metadata[states_name][layer]
    missing = width - len(states)
    return states if missing <= 0 else torch.cat([states[:1].expand(missing, -1), states])
