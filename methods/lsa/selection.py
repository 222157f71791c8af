"""What chooses the chunks of one sequence: the contract of a selector, and those that need no indexer.

Shapes: M hidden size, R rows of scores, n candidate chunks, Q query heads, D head size.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvscope.methods.kernels.select.reference import fill_selection
from kvscope.methods.lsa.rule import Rule

if TYPE_CHECKING:
    from kvscope.methods.kernels.select.kernel import Selection


class Selector:
    """Chooses candidate chunks for one sequence. Either ``choose`` (one set for all layers, before the step) or
    ``choose_by_mass`` (a set a layer, in it) does the work.

    Attributes:
        metadata_bytes: device bytes of what it keeps.
        refresh_bytes, refresh_flops: what one choice reads and computes.
        n_chosen: size of every choice, where it is fixed.
        most_new: chunks of a choice that the one before had not, where that is bounded.
        scored: a scalar on the device that is not finite where a score is not; None before there are any.
    """

    reads_mass = False
    n_chosen: int | None = None
    most_new: int | None = None
    scored: torch.Tensor | None = None
    metadata_bytes = 0
    refresh_bytes = 0
    refresh_flops = 0

    def backends(self) -> tuple[str, ...]:
        """Return what computes the scores and the choice, for the row."""
        return ()

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        """Take a hidden state of the current step; ``choose`` sees it from the next step on."""

    def query_place(self, layer: int) -> torch.Tensor | None:
        """Return where a step leaves its scaled query in a managed layer, [Q, D]; None: queries are not asked for.

        ``choose`` sees them from the next step on.
        """
        del layer
        return None

    def end_step(self) -> None:
        """The states observed, and the queries left, belong to a finished step."""

    def choose(self) -> torch.Tensor:
        """Return the candidates to keep, counted from the first candidate, ascending, on the CPU.

        Raises:
            TypeError: it chooses in the step, by ``choose_by_mass``.
        """
        raise TypeError(f"{type(self).__name__} chooses in the step, by the attention there")

    def choose_into(self, out: "Selection") -> int:
        """``choose`` into tensors on the device; return how many were chosen, also if ``out`` has room for fewer.

        Waits for the device only where no other than the device knows the number.
        """
        chosen = self.choose()
        fill_selection(out, chosen.to(out.n.device))
        return len(chosen)

    def choose_by_mass(self, mass_n: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """The same from one layer's attention mass over the candidates, and the mass of everything else.

        Raises:
            TypeError: it chooses before the step, by ``choose``.
        """
        raise TypeError(f"{type(self).__name__} chooses before the step, without its attention")

    def watch(self, scores: torch.Tensor) -> torch.Tensor:
        """Take scores into ``scored``; return them."""
        found = scores.sum(dtype=torch.float32)
        self.scored = found if self.scored is None else self.scored + found.to(self.scored.device)
        return scores

    def close(self) -> None:
        """Drop every tensor."""


class ScoringSelector(Selector):
    """Scores every candidate by what the steps before left."""

    @abstractmethod
    def logits(self) -> torch.Tensor:
        """Return the scores of all candidates: a row for each layer and state [R, n] or their maximum [1, n], fp32."""


class MassSelector(Selector):
    """The model's own attention at the refreshing step, over everything in the mirror. Each layer for itself.

    No bound on what an indexer can do: what one step attends to does not tell what the interval's others need.
    """

    reads_mass = True

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def choose_by_mass(self, mass_n: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        return self._rule.of_mass(self.watch(mass_n), rest)


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
