"""The attention of one step for many sequences at fixed addresses: a few launches a layer, however many there are.

Shapes: B sequences, Q query heads, H KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from kvscope.methods.kernels.paged_decode.inputs import PagedKV, TokenPlace

if TYPE_CHECKING:
    from kvscope.methods.block_rows import ChoiceRows, ChoosingSequence
    from kvscope.methods.call import AttentionCall, Rotation
    from kvscope.methods.kernels.paged_decode.rows import RowTable


#: Tokens that one program of attention takes where its work must not depend on other sequences: enough to be worth a
#: program, few enough that one long sequence alone fills a GPU.
ALIKE_PART_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class StepReads:
    """What one sequence does in one layer of a step.

    Attributes:
        place: where its token is stored.
        stores: what attention reads, one or two; empty where ``chooser`` chooses it.
        turn_1: how many positions to turn the query back for the second store, int32 [1]; None: not at all.
        chooser: the sequence, where the query chooses what it reads.
        query_place: where the scaled query is left for a later choice, [Q, D]; None: nowhere.
    """

    place: TokenPlace
    stores: tuple[PagedKV, ...] = ()
    turn_1: torch.Tensor | None = None
    chooser: ChoosingSequence | None = None
    query_place: torch.Tensor | None = None


def keep_query(call: AttentionCall, place: torch.Tensor | None, *, row: int = 0) -> None:
    """Leave the query of one sequence of a step where it asked for it, scaled: its products with keys are logits."""
    if place is None:
        return
    query_QD = call.query[row, :, 0]
    if place.device == query_QD.device:
        torch.mul(query_QD, call.scale, out=place)
    else:
        place.copy_(query_QD * call.scale)


class StepSource(Protocol):
    """A sequence, as a step sees it."""

    def step_reads(self, layer: int) -> StepReads | None:
        """Return what the sequence does in a layer; None: it attends by itself."""
        ...


class StepBatch:
    """The sequences of one step, in the order of its rows; they do not change, nor do their addresses."""

    def __init__(self, sources: Sequence[StepSource], *, alike: bool = False) -> None:
        """Begin.

        Args:
            alike: what a sequence attends to is added up in the same order whoever else is in the step.
        """
        self._sources, self._part_tokens = tuple(sources), ALIKE_PART_TOKENS if alike else None
        self._layers: dict[int, _Layer] = {}
        self._angles: dict[Rotation, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self) -> None:
        """A step begins."""
        self._angles.clear()

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Store the token of every sequence and attend. The call is of all of them, the result [B, Q, 1, D]."""
        found = self._layers.get(layer)
        if found is None:
            found = self._layers[layer] = _Layer(layer, self._sources, part_tokens=self._part_tokens)
        return found.attend(call, self._angles_of)

    def _angles_of(self, rotation: Rotation, turn_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tables of a step's turns; the layers that share a rotation share them."""
        if rotation not in self._angles:
            self._angles[rotation] = rotation.angles_at(turn_B1)
        return self._angles[rotation]


class _Layer:
    """One layer of a batch."""

    def __init__(self, layer: int, sources: Sequence[StepSource], *, part_tokens: int | None) -> None:
        from kvscope.methods.block_rows import ChoiceRows
        from kvscope.methods.kernels.paged_decode.rows import RowTable  # Triton may be missing where it is not used

        reads = [_required(source.step_reads(layer)) for source in sources]
        groups: dict[object, list[int]] = {}
        for b, each in enumerate(reads):
            if each.chooser is not None:
                groups.setdefault(each.chooser.choice_key, []).append(b)
        stores = [each.stores for each in reads]
        self._query_places = [(b, each.query_place) for b, each in enumerate(reads) if each.query_place is not None]
        self._choices: list[tuple[ChoiceRows, list[int]]] = []
        device = reads[0].place.pages.device
        for rows in groups.values():
            choosers = [chooser for b in rows if (chooser := reads[b].chooser) is not None]
            choice = ChoiceRows(choosers, layer, alike=part_tokens is not None)
            self._choices.append((choice, rows))
            for r, b in enumerate(rows):
                stores[b] = (choice.store(r),)
        self._table: RowTable = RowTable(stores, [each.place for each in reads], part_tokens=part_tokens)
        turns = [each.turn_1 for each in reads]
        if any(turn is not None for turn in turns):
            self._none_1 = torch.zeros(1, dtype=torch.int32, device=device)
            self._turns = [self._none_1 if turn is None else turn for turn in turns]
        else:
            self._turns = []

    def attend(
        self,
        call: AttentionCall,
        angles_of: Callable[[Rotation, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        for b, place in self._query_places:
            keep_query(call, place, row=b)
        self._table.append(call.key, call.value)
        for choice, rows in self._choices:
            choice.choose(call, rows)
        turned = None
        if self._turns and call.rotation is not None:
            turned = call.rotation.back_by(call.query, *angles_of(call.rotation, torch.stack(self._turns).long()))
        return self._table.attend(
            call.query, scale=call.scale, softcap=call.softcap, sink_logits=call.sink_logits, turned_BQ1D=turned
        )


def _required(reads: StepReads | None) -> StepReads:
    if reads is None:
        raise ValueError("a sequence that attends by itself is not of a batch")
    return reads
