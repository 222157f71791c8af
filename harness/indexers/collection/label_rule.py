"""How positives are told from stored attention masses: any rule can be tried on a collection without the model.

A voter is a layer (its head-summed mass) or one head of a layer; over compressed entries also the native indexer of a
layer (the softmax of its scores). Voters are numbered: the label layers in order, then the heads of the first one, of
the second one, and so on, then the native indexers.

Shapes: R recorded steps, V voters, n' chunks of the prompt, X stored masses.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch

from kvscope.errors import UsageError
from kvscope.methods.lsa.labels import Voters


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """The paper's rule with its numbers open, see ``methods.lsa.labels.chunk_votes``.

    Attributes:
        top_p: share of a voter's attention that its chunks hold.
        voters: ``layer``, ``head``, or ``index`` (the native indexer of each layer, as in the paper).
        votes: votes that make a chunk positive.
        least_mass: attention a chunk needs for a voter's vote.
        layers: layers that vote; None: every one recorded.
    """

    top_p: float = 0.6
    voters: Voters = "layer"
    votes: int = 1
    least_mass: float = 0.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if self.voters not in get_args(Voters):
            raise UsageError(f"voters must be {', '.join(get_args(Voters))}, got {self.voters!r}.")
        if self.votes < 1:
            raise UsageError(f"votes must be 1 or more, got {self.votes}.")
        if not 0 <= self.least_mass < 1:
            raise UsageError(f"least_mass must be 0 or more and below 1, got {self.least_mass}.")

    def changed(self, **values: Any) -> "LabelRule":
        """Return the rule with the values that are not None in place of its own."""
        return replace(self, **{key: value for key, value in values.items() if value is not None})

    def text(self) -> dict[str, Any]:
        """Return it for the record."""
        return asdict(self)


def voter_masses(mass_LQM: torch.Tensor, index_LM: torch.Tensor | None = None) -> torch.Tensor:
    """Return the masses of every voter, [V, n' + 1], from those of heads [L, Q, n' + 1] and of native indexers."""
    index = [] if index_LM is None else [index_LM]
    return torch.cat([mass_LQM.mean(1), mass_LQM.flatten(0, 1), *index])


def wanted_voters(
    rule: LabelRule, label_layers: tuple[int, ...], query_heads: int, *, native_index: bool = False
) -> torch.Tensor:
    """Return which voters a rule asks, bool [V].

    Args:
        native_index: whether native indexers were recorded.

    Raises:
        UsageError: a layer, or a kind of voter, that was not recorded.
    """
    if rule.voters == "index" and not native_index:
        raise UsageError("voters=index asks the native indexers of a model, and this collection's model has none.")
    asked = label_layers if rule.layers is None else rule.layers
    foreign = sorted(set(asked) - set(label_layers))
    if foreign:
        raise UsageError(
            f"Layers {', '.join(map(str, foreign))} were not recorded for labels; the collection has "
            f"{', '.join(map(str, label_layers))}."
        )
    chosen = torch.tensor([layer in asked for layer in label_layers])
    nobody = torch.zeros_like(chosen)
    parts = {
        "layer": nobody, "head": nobody.repeat_interleave(query_heads), **({"index": nobody} if native_index else {}),
    }  # fmt: skip
    parts[rule.voters] = chosen.repeat_interleave(query_heads) if rule.voters == "head" else chosen
    return torch.cat(list(parts.values()))


def count_votes(
    rule: LabelRule,
    *,
    row: torch.Tensor,
    voter: torch.Tensor,
    chunk: torch.Tensor,
    value: torch.Tensor,
    rest_RV: torch.Tensor,
    wanted_V: torch.Tensor,
    n_chunks: int,
) -> torch.Tensor:
    """Return the votes of every chunk at every step, [R, n'].

    Args:
        row, voter, chunk, value: stored masses [X]; those left out are smaller than ``rule.least_mass``.
        rest_RV: each voter's mass outside the prompt. It takes part in the ranking and gets no vote.
        wanted_V: from ``wanted_voters``.
    """
    asked = wanted_V[voter]
    row, voter, chunk, value = row[asked], voter[asked], chunk[asked], value[asked].double()
    votes = torch.zeros((len(rest_RV), n_chunks), dtype=torch.int32)
    if not len(row):
        return votes
    key = row * len(wanted_V) + voter
    order = torch.argsort(value, dim=0, descending=True, stable=True)
    order = order[torch.argsort(key[order], dim=0, stable=True)]
    key, value = key[order], value[order]
    total = value.cumsum(0)
    first = torch.cat([torch.ones(1, dtype=torch.bool), key[1:] != key[:-1]])
    start = (total - value)[first].repeat_interleave(
        torch.diff(torch.cat([first.nonzero()[:, 0], key.new_tensor([len(key)])]))
    )
    rest = rest_RV.double()[row[order], voter[order]]
    before = total - value - start + torch.where(rest > value, rest, 0.0)
    taken = order[(before < rule.top_p) & (value >= rule.least_mass)]
    return votes.index_put_((row[taken], chunk[taken]), torch.ones(len(taken), dtype=torch.int32), accumulate=True)
