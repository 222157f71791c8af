"""One sequence of a session, and the cache layers in which all of them meet.

Shapes: n sequences, Q query heads, H KV heads, D head size, M hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad

from kvscope.harness.engine.glue import EngineCache, EngineLayer, cache_argument, widened
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.static_stock import Rings
from kvscope.methods.base import AttentionCall, CacheMethod, Rotation, SequenceCache
from kvscope.methods.joined import Read, joined_attention, joins
from kvscope.methods.step_batch import StepBatch, StepReads
from kvscope.methods.step_counters import StepCounters
from kvscope.methods.store import PromptKV


class Member:
    """A prompt opened under a method, as a session steps it.

    Attributes:
        cache: what the method holds of the sequence. Another object takes its place where a session that failed to be
            a graph opens the prompt anew, so ask for it each time.
        method, prompt: what was opened.
        device: of the model's embeddings.
        observed: layers whose entering hidden states the method wants at each step.
        is_fed: whether a token was fed.
        why_eager: why its own steps cannot be a graph, where one was asked for; empty where they can.
        rests: whether steps leave it as it is, though it has a row in them.
        open_s: seconds it took to open.
    """

    def __init__(self, loaded: LoadedModel, method: CacheMethod[Any], prompt: PromptKV, *, reserve_tokens: int) -> None:
        """Open the prompt, with room for ``reserve_tokens`` steps."""
        self.method, self.prompt, self.device = method, prompt, loaded.device
        self.observed = frozenset(method.observed_layers(loaded.shape))
        self.is_fed, self.open_s, self.why_eager = False, 0.0, ""
        self.rests = self._has_begun = False
        self._open = partial(method.open, prompt, loaded.device, reserve_tokens=reserve_tokens)
        self.cache: SequenceCache = self._open()
        self._rings: Rings | None = None

    @property
    def n_tokens(self) -> int:
        """The position of the next token."""
        return self.cache.n_tokens

    def make_static(self, dtype: torch.dtype, counters: StepCounters) -> None:
        """Fix the addresses of the sequence's steps, those of the model's own sliding-window layers included."""
        self.cache.make_static(counters)
        self._rings = Rings(self.cache, dtype, counters)

    def step_reads(self, layer: int) -> StepReads | None:
        """Return what a step does in a layer, where its addresses are fixed; None: the sequence attends by itself."""
        if self._rings is not None and layer in self._rings.pages:
            return self._rings.reads(layer)
        return None if layer in self.cache.stock else self.cache.step_reads(layer)

    def reopen(self) -> None:
        """Open the prompt anew, as it was at first: addresses are not fixed, what was fed is gone."""
        self.close()
        self.cache, self.is_fed, self._has_begun = self._open(), False, False

    def begin_step(self) -> None:
        """A token is about to be fed. Asked again before it was, nothing happens: a capture goes before its step."""
        if self._has_begun:
            return
        self._has_begun = True
        self.cache.begin_step()
        if self._rings is not None:
            self._rings.place(self.cache.n_tokens)

    def end_step(self) -> None:
        """A token has been fed."""
        self.cache.end_step()
        self.is_fed, self._has_begun = True, False

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Attend the one query of this sequence, [1, Q, 1, D], in a managed layer or in a sliding-window one."""
        if self._rings is not None and layer in self._rings.pages:
            return self._rings.attend(layer, call)
        stock = self.cache.stock.get(layer)
        if stock is None:
            k_width, v_width = call.key.shape[-1], call.value.shape[-1]
            if k_width == v_width:
                return self.cache.attend(layer, call)
            wide = call.over(call.key, widened(call.value, k_width))
            return self.cache.attend(layer, wide)[..., :v_width]
        attended: torch.Tensor = stock.attend(call.over(*stock.update(call.key, call.value)))
        return attended

    def reads(self, layer: int, call: AttentionCall) -> tuple[Read, ...] | None:
        """Store the token and return what its query attends to, as ``SequenceCache.reads``; None: call ``attend``."""
        is_wide = call.key.shape[-1] != call.value.shape[-1]
        if not self.cache.says_reads or layer in self.cache.stock or is_wide:
            return None
        return self.cache.reads(layer, call)

    def close(self) -> None:
        """Drop every tensor."""
        if self._rings is not None:
            self._rings.clear()
            self._rings = None
        self.cache.close()


class Rows:
    """What the layers of a session share: its sequences, and how they attend together.

    Attributes:
        members: the sequences, in the order of a step's rows; they come and go.
        step_rows: rows of every step's forward, a multiple of them where there are more sequences. Those behind the
            sequences are nobody's. Libraries choose how to add up a product by its rows, so that a sequence's numbers
            are then the same whoever shares its step. None: as many rows as sequences.
        batch: of those that can, while a step of fixed addresses runs; None: each attends by itself.
    """

    def __init__(self, *, step_rows: int | None = None) -> None:
        self.members: list[Member] = []
        self.step_rows = step_rows
        self.batch: StepBatch | None = None
        self._together: tuple[int, ...] = ()
        self._together_n: torch.Tensor | None = None

    @property
    def n_rows(self) -> int:
        """Rows of the next step's forward."""
        n = len(self.members)
        if self.step_rows is None or (n == 1 and self.members[0].cache.model_cache is not None):
            return n
        return -(-n // self.step_rows) * self.step_rows

    def logits(
        self, model: Any, tokens_n1: torch.Tensor, positions_n1: torch.Tensor, cache: EngineCache
    ) -> torch.Tensor:
        """Run the model over one token a sequence; return the logits after it [n, V].

        Args:
            tokens_n1, positions_n1: of the sequences, and of the rows behind them where these are there already.
            cache: where all sequences meet; one that brings its own is alone, and calls the model with that.
        """
        n = len(self.members)
        if missing := self.n_rows - len(tokens_n1):
            tokens_n1, positions_n1 = (pad(each, (0, 0, 0, missing)) for each in (tokens_n1, positions_n1))
        arguments = {"input_ids": tokens_n1, "position_ids": positions_n1, "use_cache": True, "logits_to_keep": 1}
        own, name = self.members[0].cache, cache_argument(model)
        if own.model_cache is None:
            out = model(**arguments, **{name: cache})
        else:
            out = own.call_model(model, **arguments, **{name: own.model_cache})
        found: torch.Tensor = out.logits[:n, -1]
        return found

    def make_batch(self) -> None:
        """Let the sequences attend together that can, where there are several.

        Where numbers must not depend on who shares a step, one alone does so, too: its kernels are the same then.
        """
        self.batch, alike = None, self.step_rows is not None
        layers = range(self.members[0].cache.shape.n_layers)
        self._together = tuple(
            b for b, member in enumerate(self.members) if all(member.step_reads(layer) is not None for layer in layers)
        )
        if len(self._together) > (0 if alike else 1):
            self.batch = StepBatch([self.members[b] for b in self._together], alike=alike)
            some = len(self._together) < len(self.members)
            self._together_n = torch.tensor(self._together, device=self.members[0].device) if some else None

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Attend the queries of all sequences, [n, Q, 1, D]."""
        if self.batch is None:
            return self._attend_each(layer, call)
        if self._together_n is None:
            return self._attend_together(self.batch, layer, call)
        together = self._attend_together(self.batch, layer, call.at(self._together_n))
        others = [b for b in range(len(self.members)) if b not in self._together]
        out = together.new_empty((len(self.members), *together.shape[1:]))
        out[self._together_n] = together
        for b in others:
            out[b : b + 1] = self.members[b].attend(layer, call.row(b))
        return out

    @staticmethod
    def _attend_together(batch: StepBatch, layer: int, call: AttentionCall) -> torch.Tensor:
        k_width, v_width = call.key.shape[-1], call.value.shape[-1]
        return batch.attend(layer, call.over(call.key, widened(call.value, k_width)))[..., :v_width]

    def _attend_each(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Attend sequence by sequence, and together where they only have to say what they read."""
        found: dict[int, torch.Tensor] = {}
        reads: dict[int, tuple[Read, ...]] = {}
        for b, member in enumerate(self.members):
            row = call.row(b)
            read = member.reads(layer, row) if joins(call) else None
            if read is None:
                found[b] = member.attend(layer, row)
            else:
                reads[b] = read
        if len(reads) == len(self.members):
            return joined_attention(call, list(reads.values()))
        if reads:
            together = joined_attention(replace(call, query=call.query[list(reads)]), list(reads.values()))
            found |= zip(reads, together[:, None], strict=True)
        return torch.cat([found[b] for b in range(len(self.members))])


class SessionLayer(EngineLayer):
    """One layer of a session. The queries of all its sequences arrive here together, [n, Q, 1, D]."""

    def __init__(self, index: int, rows: Rows, *, rotation: Rotation | None, managed: bool) -> None:
        super().__init__(index)
        self.rotation = rotation
        self._rows, self._managed = rows, managed

    def get_seq_length(self) -> int:
        return max((member.n_tokens for member in self._rows.members), default=0)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if self._managed:
            self._refuse_window(call)
        rows = self._rows
        n, n_rows = len(rows.members), len(call.query)
        if n_rows > n:
            return pad(rows.attend(self.index, call.first(n)), (0, 0, 0, 0, 0, 0, 0, n_rows - n))
        if n == 1 and rows.batch is None:
            return rows.members[0].attend(self.index, call)
        return rows.attend(self.index, call)


def session_cache(loaded: LoadedModel, rows: Rows) -> EngineCache:
    """Return the cache a model is called with for the sequences of ``rows``."""
    managed = set(loaded.shape.layers)
    return EngineCache(
        [
            SessionLayer(
                layer,
                rows,
                rotation=loaded.rotations.get(layer) if layer in managed else None,
                managed=layer in managed,
            )
            for layer in range(loaded.shape.n_layers)
        ]
    )
