"""A method whose budget is given as a share of dense's bytes, of those it holds or of those it reads.

The budget is looked for prompt by prompt, by the method's own ``predict``: that of the bytes nearest to the share, and
of equal bytes the most tokens, so that no page is half empty when decoding begins. What it came to is in the row, and
so are its bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.methods.base import CacheMethod, Collector, SequenceCache
from kvscope.methods.options import BUDGETS, READ_SHARE_OPTION, SHARE_OPTION, Share, share_text
from kvscope.methods.shape import Footprint, ModelShape

if TYPE_CHECKING:
    import torch

    from kvscope.methods.store import PromptKV

DECODED_TOKENS = 32
"""Bytes are those behind so many decoded tokens, of the method and of dense: at opening, pages have no room for one."""
_REFUSED_BYTES = -1
"""Of a budget that the method refuses because it is too small."""


class AtShare(CacheMethod[Any]):
    """A method at a share of dense's bytes. It runs as the method itself does, with the budget of each prompt."""

    def __init__(
        self,
        method: CacheMethod[Any],
        share: Share,
        *,
        sets: str,
        label: str,
        dense: CacheMethod[Any] | None = None,
    ) -> None:
        """Check that the budget is of the kind that is asked for.

        Args:
            method: with a placeholder for the budget.
            sets: the option that holds it.
            dense: what the share is of, as it runs on the model's cache; None: as on pages of K and V.

        Raises:
            UsageError: it is of another kind, or something else decides it.
        """
        from kvscope.methods.dense.method import Dense  # it loads torch

        super().__init__(method.config, label=label)
        # What the method's class says of itself (name, stays, saving_kind, ...) is said here by the instance.
        vars(self).update({each: getattr(method, each) for each in CacheMethod.__annotations__})
        self.share = share
        self.base, self.dense = method, dense or Dense()
        self.base.label = label
        self.sets = sets
        _check(method, share)
        self._found: dict[tuple[int, ModelShape], CacheMethod[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        """Return what only the method itself has."""
        if name == "base":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def kind(self) -> type[Any]:
        return self.base.kind

    def over(self, base: CacheMethod[Any], *, dense: CacheMethod[Any]) -> CacheMethod[Any]:
        """Return the same over the forms that the method and dense have on a model's cache."""
        return self if base is self.base else AtShare(base, self.share, sets=self.sets, label=self.label, dense=dense)

    def at(self, n_tokens: int, shape: ModelShape) -> CacheMethod[Any]:
        """Return the method with its budget for a prompt of ``n_tokens``.

        Raises:
            UsageError: no budget up to the whole prompt is enough for it.
        """
        key = n_tokens, replace(shape, kv=None)
        if key not in self._found:
            self._found[key] = self._with(self._nearest_tokens(*key), n_tokens)
        return self._found[key]

    def _nearest_tokens(self, n_tokens: int, shape: ModelShape) -> int:
        wanted_bytes = self.share.of * self._counted(self.dense.predict(shape, n_tokens, DECODED_TOKENS))

        def n_bytes(n_budget: int) -> int:
            try:
                return self._counted(self._with(n_budget, n_tokens).predict(shape, n_tokens, DECODED_TOKENS))
            except (UsageError, ValueError):
                return _REFUSED_BYTES

        budgets = range(1, max(1, n_tokens) + 1)
        if n_bytes(budgets[-1]) == _REFUSED_BYTES:
            return self._least_tokens(n_tokens, lambda n_budget: n_bytes(n_budget) != _REFUSED_BYTES)
        first = min(bisect_left(budgets, wanted_bytes, key=n_bytes), len(budgets) - 1)
        around = {n_bytes(budgets[max(0, first - 1)]), n_bytes(budgets[first])} - {_REFUSED_BYTES}
        nearest_bytes = min(around, key=lambda found: (abs(found - wanted_bytes), found))
        return budgets[bisect_right(budgets, nearest_bytes, key=n_bytes) - 1]

    def _least_tokens(self, n_tokens: int, takes: Callable[[int], bool]) -> int:
        """Return the least budget that the method takes where the whole prompt is less than that (two blocks)."""
        if self.sets != "budget_tokens":
            return n_tokens  # a fraction is no more than all of it: refused by the method, in its own words
        beyond = range(n_tokens + 1, max(n_tokens + 1, BUDGETS[self.sets]) + 1)
        return beyond[min(bisect_left(beyond, True, key=takes), len(beyond) - 1)]

    def _counted(self, footprint: Footprint) -> int:
        return footprint.bytes_read_per_step if self.share.reads else footprint.device_bytes

    def _with(self, n_budget: int, n_tokens: int) -> CacheMethod[Any]:
        """Return the method with a budget; what is no option (a trained indexer) is shared."""
        # A fraction is cut to whole tokens by those who read it.
        value = n_budget if self.sets == "budget_tokens" else min(1.0, (n_budget + 0.5) / max(1, n_tokens))
        method = copy(self.base)
        method.config = replace(self.base.config, **{self.sets: value})
        return method

    # -- as the method itself

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        return self.at(n_tokens, shape).predict(shape, n_tokens, n_new_tokens)

    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        return self.share.of == 1 if shape is None else self.at(n_tokens, shape).is_noop(n_tokens, shape)

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        asked = {self.share.option: self.share.of}
        return asked if shape is None else self.at(n_tokens, shape).effective_config(n_tokens, shape) | asked

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        return self.at(prompt.n_tokens, prompt.shape).open(prompt, device, reserve_tokens=reserve_tokens)

    def describe(self) -> dict[str, Any]:
        found = self.base.describe()
        return found | {"options": found["options"] | {self.sets: None, self.share.option: self.share.of}}

    def require(self, shape: ModelShape) -> None:
        self.base.require(shape)

    def unsupported(self, shape: ModelShape, device: torch.device | str) -> list[str]:
        return self.base.unsupported(shape, device)

    def observed_layers(self, shape: ModelShape) -> tuple[int, ...]:
        return self.base.observed_layers(shape)

    def collectors(self, layer: int) -> list[Collector]:
        return self.base.collectors(layer)

    def trained_part(self, shape: ModelShape) -> str | None:
        return self.base.trained_part(shape)

    def trained_prompts(self, shape: ModelShape) -> str | None:
        return self.base.trained_prompts(shape)


def _check(method: CacheMethod[Any], share: Share) -> None:
    """Refuse a share that does not decide what the method holds, or reads.

    Raises:
        UsageError: saying what to ask for.
    """
    owner, asked = f"Method '{method.name}'", share_text(share)
    holds_all = method.saving_kind == "resident"
    if holds_all and not share.reads:
        raise UsageError(
            f"{owner} holds every token whatever it reads: ask for {READ_SHARE_OPTION}, a share of dense's reads, "
            f"instead of {asked}."
        )
    if share.reads and not holds_all:
        raise UsageError(
            f"{owner} reads what it holds: ask for {SHARE_OPTION}, a share of dense's bytes, instead of {asked}."
        )
    if getattr(method.config, "block_tokens", 1) is None:
        raise UsageError(
            f"{owner}: blocks are made of the prompt before a budget is known, and their automatic size depends on "
            f"it; give block_tokens beside {asked}."
        )
    if method.rehearsal() is not None:
        raise UsageError(f"{owner}: {asked} sets a budget, and a method that decodes twice has none; leave it out.")
