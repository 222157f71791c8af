"""Selection and slot tables wherever their tensors are: the kernels on a GPU, the reference on a CPU."""

import torch

from kvscope.methods.kernels.select import reference
from kvscope.methods.kernels.select.kernel import Delta, Selection, SlotTable
from kvscope.methods.kernels.select.kernel import apply as _apply
from kvscope.methods.kernels.select.kernel import diff as _diff
from kvscope.methods.kernels.select.kernel import select as _select
from kvscope.methods.kernels.select.kernel import write_table as _write_table


def select(logits_Rn: torch.Tensor, threshold: torch.Tensor, out: Selection) -> None:
    """Choose the chunks whose best logit over rows reaches the threshold (fp32 [1], on the device)."""
    if logits_Rn.is_cuda:
        _select(logits_Rn, threshold, out)
    else:
        reference.fill_selection(out, reference.select_reference(logits_Rn, float(threshold)))


def diff(selection: Selection, slots: SlotTable, out: Delta) -> None:
    """Find the chosen chunks to load and the slots to load them into."""
    (_diff if selection.n.is_cuda else reference.fill_delta)(selection, slots, out)


def apply(selection: Selection, slots: SlotTable, delta: Delta) -> None:
    """Enter a difference into the slot table, once the missing chunks are in their slots."""
    (_apply if selection.n.is_cuda else reference.apply_reference)(selection, slots, delta)


def write_table(
    selection: Selection,
    slots: SlotTable,
    table: torch.Tensor,
    n_tokens: torch.Tensor,
    *,
    chunk_tokens: int,
    slots_per_chunk: int,
) -> None:
    """Write the page table of the chosen chunks and their count of tokens, which attention reads."""
    write = _write_table if selection.n.is_cuda else reference.write_table_reference
    write(selection, slots, table, n_tokens, chunk_tokens=chunk_tokens, slots_per_chunk=slots_per_chunk)
