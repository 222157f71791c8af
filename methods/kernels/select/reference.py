"""Selection and its difference to a slot table in plain torch: the oracle of the kernels, and what runs on a CPU.

Shapes: R rows of logits, n chunks, S slots, K entries a list has room for.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvscope.methods.kernels.select.kernel import Delta, Selection, SlotTable


def select_reference(logits_Rn: torch.Tensor, threshold: float, *, n_sink: int = 0, n_recent: int = 0) -> torch.Tensor:
    """Return the chosen chunks, ascending: best logit at or over the threshold, or first, or last."""
    n = logits_Rn.shape[1]
    chunk_n = torch.arange(n, device=logits_Rn.device)
    best_n = logits_Rn.amax(0) if len(logits_Rn) else torch.full((n,), -torch.inf, device=logits_Rn.device)
    return chunk_n[(best_n >= threshold) | (chunk_n < n_sink) | (chunk_n >= n - n_recent)]


def diff_reference(chosen: torch.Tensor, chunk_of_slot_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the chosen chunks in no slot, and the slots of no chosen chunk, both ascending."""
    missing = chosen[~torch.isin(chosen, chunk_of_slot_S)]
    free = (~torch.isin(chunk_of_slot_S, chosen)).nonzero()[:, 0]
    return missing, free


def fill_selection(out: "Selection", chosen: torch.Tensor) -> None:
    """Write a choice made elsewhere, ascending int64 on the device. Nothing waits for the device."""
    kept = chosen[: out.chunks_K.shape[0]]
    out.chunks_K[: len(kept)] = kept.int()
    out.n.fill_(len(chosen))
    out.wanted_n.zero_()
    out.wanted_n.index_fill_(0, kept, 1)


def fill_delta(selection: "Selection", slots: "SlotTable", out: "Delta") -> None:
    """What ``diff`` writes: the chosen chunks in no slot, and the slots whose chunk is not marked as wanted."""
    chosen = selection.chunks_K[: int(selection.n)].long()
    missing = chosen[slots.slot_of_chunk_n[chosen] < 0]
    held = slots.chunk_of_slot_S.long()
    wanted = (held >= 0) & (selection.wanted_n[held.clamp_min(0)] != 0)
    free = (~wanted).nonzero()[:, 0]
    for listed, n, found in ((out.missing_K, out.n_missing, missing), (out.free_S, out.n_free, free)):
        listed[: len(found)] = found.int()
        n.fill_(len(found))


def apply_reference(selection: "Selection", slots: "SlotTable", delta: "Delta") -> None:
    """What ``apply`` does: evicted chunks lose their slots, missing ones get theirs."""
    held = slots.chunk_of_slot_S.long()
    gone = (held >= 0) & (selection.wanted_n[held.clamp_min(0)] == 0)
    slots.slot_of_chunk_n[held[gone]] = -1
    slots.chunk_of_slot_S[gone] = -1
    n = int(delta.n_missing)
    slots.slot_of_chunk_n[delta.missing_K[:n].long()] = delta.free_S[:n]
    slots.chunk_of_slot_S[delta.free_S[:n].long()] = delta.missing_K[:n]


def write_table_reference(
    selection: "Selection",
    slots: "SlotTable",
    table: torch.Tensor,
    n_tokens: torch.Tensor,
    *,
    chunk_tokens: int,
    slots_per_chunk: int = 1,
) -> None:
    """What ``write_table`` writes. Arguments as there."""
    n = min(int(selection.n), selection.chunks_K.shape[0])
    slot = slots.slot_of_chunk_n[selection.chunks_K[:n].long()]
    pages = slot[:, None] * slots_per_chunk + torch.arange(slots_per_chunk, device=slot.device)
    table.view(-1)[: pages.numel()] = pages.flatten().int()
    n_tokens.fill_(n * chunk_tokens)
