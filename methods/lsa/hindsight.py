"""``indexer=hindsight``: what the next tau steps attend to, known from a first decode of the same prompt.

The first decode keeps every chunk and notes, interval by interval, what its steps give their attention to; the
measured one plays these sets back, one for all layers, as an indexer's choices are. A set holds what the interval's
steps attended to most, so it shows how far predicting can get at its size, as far as attention tells what answers need.

Shapes: L managed layers, n candidate chunks.
"""

import torch

from kvscope.methods.lsa.labels import top_p_mask
from kvscope.methods.lsa.rule import Rule, top_chunks
from kvscope.methods.lsa.selection import ScriptedSelector, Selector


class NotingSelector(Selector):
    """Keeps every candidate, and notes of each interval which its steps attend to.

    With a threshold: at every step and of every layer the fewest candidates that hold this share of the attention that
    all candidates get (heads averaged), and the union of these. With a budget: the candidates with the most attention
    that one layer gave at one step.
    """

    reads_mass = True

    def __init__(self, rule: Rule, *, tau: int) -> None:
        self._rule, self._tau = rule, tau
        self._sets: list[torch.Tensor] = []
        self._masses: list[torch.Tensor] = []
        self._most_n: torch.Tensor | None = None
        self._needed_n: torch.Tensor | None = None
        self._n_steps = 0

    def choose_by_mass(self, mass_n: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        del rest  # it stays anyway
        self._masses.append(self.watch(mass_n))
        return torch.arange(len(mass_n))

    def end_step(self) -> None:
        if not self._masses:  # no chunk to choose from
            return
        mass_Ln = torch.stack([mass_n.to(self._masses[0].device) for mass_n in self._masses])
        self._masses.clear()
        most_n = mass_Ln.amax(0)
        self._most_n = most_n if self._most_n is None else torch.maximum(self._most_n, most_n)
        if self._rule.threshold is not None:
            needed_n = top_p_mask(mass_Ln, self._rule.threshold).any(0)
            self._needed_n = needed_n if self._needed_n is None else self._needed_n | needed_n
        self._n_steps += 1
        if self._n_steps % self._tau == 0:
            self._end_interval()

    def sets(self) -> list[torch.Tensor]:
        """Return the candidates to keep in each interval, ascending, on the CPU; the last one ends with the answer."""
        if self._most_n is not None:
            self._end_interval()
        return list(self._sets)

    def _end_interval(self) -> None:
        assert self._most_n is not None
        self._sets.append(self._kept(self._most_n).cpu())
        self._most_n = self._needed_n = None

    def _kept(self, most_n: torch.Tensor) -> torch.Tensor:
        if self._rule.n_chunks is not None:
            return top_chunks(most_n, self._rule.n_chunks)
        assert self._needed_n is not None
        chosen = self._needed_n.nonzero()[:, 0]
        n_kept = self._rule.n_kept(len(chosen))
        if n_kept == len(chosen):
            return chosen
        if n_kept > len(chosen):  # what is needed is not always what gets the most
            return top_chunks(most_n.masked_fill(self._needed_n, torch.inf), n_kept)
        return top_chunks(most_n.masked_fill(~self._needed_n, -1.0), n_kept)


class PlaybackSelector(ScriptedSelector):
    """Plays back the sets of a first decode; an answer that outlasts it keeps the last one."""

    def choose(self) -> torch.Tensor:
        return super().choose() if self._next < len(self._sets) else self._sets[-1]
