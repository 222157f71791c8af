"""What the queries of one step choose, for all sequences of one method together, at fixed addresses.

Scores are made a sequence at a time, by the method; everything behind them (mask, best blocks, page tables) is done
once for all. Scores cover every block there is room for: what lies behind the current one is masked by counts that the
device reads, so that a captured step stays right as sequences grow.

Shapes: R sequences, H KV heads, X choices a KV head (1, or the query heads of a group), N blocks there is room for,
B blocks of a choice, W entries of a table, Q query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from kvscope.methods.kernels.paged_decode.inputs import PagedKV

if TYPE_CHECKING:
    from kvscope.methods.block_budget import BlockPlan
    from kvscope.methods.call import AttentionCall


class ChoosingSequence(Protocol):
    """A sequence whose queries choose.

    Attributes:
        choice_key: equal for sequences whose choices are made together.
        plan: of its blocks.
    """

    @property
    def choice_key(self) -> object: ...

    @property
    def plan(self) -> BlockPlan: ...

    @property
    def choice_heads(self) -> tuple[int, int]:
        """KV heads that choose for themselves (or 1, for all), and choices of each: the first sizes of the scores."""
        ...

    def pages_of(self, layer: int) -> torch.Tensor:
        """Return the layer's pages [S, H, 2, P, D]."""
        ...

    @property
    def count_11(self) -> torch.Tensor:
        """Tokens stored with the step's, int32 [1, 1]."""
        ...

    def room_scores(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Return the scores of every block there is room for, [H or 1, X, N], whatever they are past the last token."""
        ...

    def chose(self, layer: int, choice: ChoiceRows, row: int) -> None:
        """Take note that a layer's choices are made by row ``row`` of ``choice``."""
        ...


class ChoiceRows:
    """The choices of one layer.

    Attributes:
        pages: the layer's pages of each sequence.
        read_R: tokens read over all KV heads by the last step, int64.
        checked_R: a sum over the scores of all steps, not finite where a score was not.
    """

    def __init__(self, sequences: Sequence[ChoosingSequence], layer: int, *, alike: bool = False) -> None:
        """Make room for the choices.

        Args:
            alike: what a sequence chooses, and the order in which it reads that, must not depend on the others: of
                equal scores the first ones count, and blocks are read in order. What a top-k makes of both depends on
                how many scores there are, and on how many are wanted of them.
        """
        self._sequences, self._layer, self._alike = tuple(sequences), layer, alike
        self.pages = [sequence.pages_of(layer) for sequence in sequences]
        pages = self.pages[0]
        self._H, self._P = pages.shape[1], pages.shape[3]
        self._block = sequences[0].plan.block_tokens
        device, R = pages.device, len(sequences)
        n_chosen = [sequence.plan.n_blocks - 1 for sequence in sequences]
        self._most, self._differ = max(n_chosen), len(set(n_chosen)) > 1
        self._chosen_R1 = torch.tensor(n_chosen, device=device)[:, None]
        self._n_blocks = max(len(own) * self._P // self._block for own in self.pages)
        self._block_N = torch.arange(self._n_blocks, device=device)
        self._last_page_R11 = torch.tensor([len(own) - 1 for own in self.pages], device=device)[:, None, None]
        self.read_R = torch.zeros(R, dtype=torch.long, device=device)
        self.checked_R = torch.zeros(R, device=device)
        heads, self._X = sequences[0].choice_heads
        n_entries = min(self._X * self._most, self._n_blocks) + 1
        self._by_page = self._block % self._P == 0
        width = n_entries * (self._block // self._P if self._by_page else self._block)
        self._entry_B = torch.arange(n_entries, device=device)
        self._within = torch.arange(self._block // self._P if self._by_page else self._block, device=device)
        self._table_RHW = torch.zeros((R, heads, width), dtype=torch.int32, device=device)
        self._counts_RH = torch.zeros((R, heads if self._X > 1 else 1), dtype=torch.int32, device=device)
        for row, sequence in enumerate(sequences):
            sequence.chose(layer, self, row)

    def store(self, row: int) -> PagedKV:
        """Return what a sequence's attention reads; ``choose`` writes it anew."""
        table, count = self._table_RHW[row : row + 1], self._counts_RH[row : row + 1]
        if self._by_page:
            return PagedKV(pages=self.pages[row], n_tokens=count, page_table=table)
        return PagedKV(pages=self.pages[row], n_tokens=count, tokens=table)

    def choose(self, call: AttentionCall, rows: Sequence[int]) -> None:
        """Choose for the queries in ``rows`` of a call, the step's tokens stored already."""
        count_R = torch.cat([sequence.count_11 for sequence in self._sequences])[:, 0].long()
        before_R1 = ((count_R - 1) // self._block)[:, None]
        tail_R1 = count_R[:, None] - before_R1 * self._block
        scores_RHXN = self._scores(call, rows)
        inside_R11N = (self._block_N < before_R1)[:, None, None]
        self.checked_R += torch.where(inside_R11N, scores_RHXN, 0.0).sum((1, 2, 3))
        scores_RHXN = scores_RHXN.masked_fill(~inside_R11N, -torch.inf)
        if self._alike:
            blocks_RHB, n_RH = self._first_best(scores_RHXN)
        else:
            best_RHXB = scores_RHXN.topk(self._most, dim=-1, sorted=self._differ).indices
            blocks_RHB, n_RH = (best_RHXB[:, :, 0], self._chosen_R1) if self._X == 1 else self._union(best_RHXB)
        blocks_RHB = torch.nn.functional.pad(blocks_RHB, (0, len(self._entry_B) - blocks_RHB.shape[-1]))
        # Behind what was chosen comes the current block; what follows it is not read.
        blocks_RHB = torch.where(self._entry_B < n_RH[..., None], blocks_RHB, before_R1[..., None])
        n_read_RH = n_RH * self._block + tail_R1
        self._counts_RH.copy_(n_read_RH)
        n_heads = self._H if n_read_RH.shape[1] == 1 else 1
        self.read_R.copy_(n_read_RH.sum(1) * n_heads)
        table = (blocks_RHB[..., None] * len(self._within) + self._within).flatten(2)
        if self._by_page:
            # The current block may begin no more pages than its tokens need: the rest are not in the pool.
            table = torch.minimum(table, self._last_page_R11)
        self._table_RHW.copy_(table)

    def _scores(self, call: AttentionCall, rows: Sequence[int]) -> torch.Tensor:
        """Return the scores of all sequences, [R, H or 1, X, N] in fp32."""
        heads = self._table_RHW.shape[1]
        scores = call.query.new_zeros((len(self._sequences), heads, self._X, self._n_blocks), dtype=torch.float32)
        for r, (b, sequence) in enumerate(zip(rows, self._sequences, strict=True)):
            found_HXN = sequence.room_scores(self._layer, call.row(b))
            scores[r, :, :, : found_HXN.shape[-1]] = found_HXN
        return scores

    def _first_best(self, scores_RHXN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best blocks of each KV head in ascending order, of equal ones the first, and how many they are."""
        R, H, _, N = scores_RHXN.shape
        n_R111 = self._chosen_R1[..., None, None]
        best_RHXB = scores_RHXN.topk(self._most, dim=-1).values
        last_RHX1 = best_RHXB.gather(-1, (n_R111 - 1).expand(-1, *best_RHXB.shape[1:3], 1))
        above_RHXN, equal_RHXN = scores_RHXN > last_RHX1, scores_RHXN == last_RHX1
        n_equal_RHX1 = n_R111 - above_RHXN.sum(-1, keepdim=True)
        first_RHXN = equal_RHXN & (equal_RHXN.cumsum(-1) <= n_equal_RHX1)
        chosen_RHN = (above_RHXN | first_RHXN).any(2)
        width = len(self._entry_B) - 1
        # One entry more takes the blocks that are not chosen.
        at_RHN = torch.where(chosen_RHN, chosen_RHN.cumsum(-1) - 1, width)
        blocks_RHB = self._block_N.new_zeros((R, H, width + 1)).scatter_(2, at_RHN, self._block_N.expand(R, H, N))
        return blocks_RHB[..., :width], self._chosen_R1 if self._X == 1 else chosen_RHN.sum(-1)

    def _union(self, best_RHXB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the blocks that any query head of each KV head chose, those first, and how many they are."""
        R, H = best_RHXB.shape[:2]
        wanted = torch.arange(self._most, device=best_RHXB.device) < self._chosen_R1[:, None, None]
        # One column more takes what a sequence of fewer blocks does not want.
        columns = torch.where(wanted, best_RHXB, self._n_blocks).flatten(2)
        chosen_RHN = torch.zeros((R, H, self._n_blocks + 1), dtype=torch.uint8, device=best_RHXB.device)
        chosen_RHN = chosen_RHN.scatter_(2, columns, 1)[..., : self._n_blocks]
        blocks_RHB = chosen_RHN.topk(len(self._entry_B) - 1, dim=-1).indices
        return blocks_RHB, chosen_RHN.sum(-1, dtype=torch.long)
