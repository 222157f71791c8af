"""Attention of the sequences that share a step, in one layer, in plain torch: what is small is done for all at once.

Two products a sequence with its own pages are the work. The twenty small operations around them took as long, so only
the products are made sequence by sequence.

Shapes: n sequences, R reads of them, N pages of all reads, Q query heads, H KV heads, G = Q/H, P tokens a page, D head
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from kvscope.methods.call import AttentionCall


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Read:
    """Tokens that the query of one sequence attends to.

    Attributes:
        pages: [S, H, 2, P, D], index 2 being K and V, filled in order.
        n_tokens: how many are stored; at least one.
        turn_tokens: how many positions nearer the query meets them than it stands in the text.
    """

    pages: torch.Tensor
    n_tokens: int
    turn_tokens: int = 0


def joins(call: AttentionCall) -> bool:
    """Whether sequences attend together here: on a CPU in fp32, where no kernel or fused attention takes them."""
    return call.query.device.type == "cpu" and call.query.dtype == call.value.dtype == torch.float32


def joined_attention(call: AttentionCall, reads_of: Sequence[Sequence[Read]]) -> torch.Tensor:
    """Attend the query of each sequence to all its reads.

    Args:
        call: of all sequences; its keys and values are not looked at: they are in the pages.
        reads_of: of each sequence one or more, of pages of one size.

    Returns:
        [n, Q, 1, D], what ``attention.merge_partials`` makes of each sequence's partial results, but for rounding.
    """
    reads = [read for each in reads_of for read in each]
    H, _, P, D = reads[0].pages.shape[1:]
    n, G = len(reads_of), call.query.shape[1] // H
    row_of_R = np.repeat(np.arange(n), [len(each) for each in reads_of])
    stored_R = np.array([read.n_tokens for read in reads])
    pages_R = -(-stored_R // P)
    to_device = partial(torch.as_tensor, device=call.query.device)
    last_R = to_device(pages_R.cumsum() - 1)
    read_of_N = to_device(np.repeat(np.arange(len(reads)), pages_R))
    row_of_NHG = to_device(np.repeat(row_of_R, pages_R)).view(-1, 1, 1).expand(-1, H, G)
    parts = pages_R.tolist()

    q_NHGD = _queries(call, reads, to_device(row_of_R)).view(-1, H, G, D).index_select(0, read_of_N)
    logits_NHGP = q_NHGD.new_empty((len(read_of_N), H, G, P))
    _products(q_NHGD, [read.pages[:, :, 0].mT for read in reads], parts, out=logits_NHGP)
    if call.softcap is not None:
        logits_NHGP = call.softcap * torch.tanh(logits_NHGP / call.softcap)
    hidden_RP = to_device(np.arange(P)) >= to_device(stored_R - P * (pages_R - 1))[:, None]
    logits_NHGP[last_R] = logits_NHGP[last_R].masked_fill_(hidden_RP[:, None, None], -torch.inf)

    # Softmax page by page; each page then counts by its share of its sequence.
    top_NHG = logits_NHGP.amax(3)
    weight_NHGP = logits_NHGP.sub_(top_NHG[..., None]).exp_()
    top_nHG = top_NHG.new_full((n, H, G), -torch.inf).scatter_reduce_(0, row_of_NHG, top_NHG, "amax")
    share_NHG = torch.exp(top_NHG - top_nHG.gather(0, row_of_NHG))
    sum_nHG = top_nHG.new_zeros((n, H, G)).scatter_add_(0, row_of_NHG, weight_NHGP.sum(3).mul_(share_NHG))
    out_NHGD = q_NHGD  # the queries are of no more use
    _products(weight_NHGP, [read.pages[:, :, 1] for read in reads], parts, out=out_NHGD)
    out_NHGD.mul_(share_NHG[..., None])
    pages_n = np.bincount(row_of_R, weights=pages_R).astype(int).tolist()
    out_nHGD = torch.stack([part.sum(0) for part in torch.split_with_sizes(out_NHGD, pages_n)]) / sum_nHG[..., None]
    if call.sink_logits is not None:
        lse_nHG = top_nHG + torch.log(sum_nHG)
        out_nHGD *= torch.sigmoid(lse_nHG - call.sink_logits.view(H, G))[..., None]
    return out_nHGD.view(call.query.shape)


def _queries(call: AttentionCall, reads: Sequence[Read], row_of_R: torch.Tensor) -> torch.Tensor:
    """Return the scaled query of each read, turned back where it asks for that, [R, Q, 1, D]."""
    query = call.query.index_select(0, row_of_R)
    turned = [r for r, read in enumerate(reads) if read.turn_tokens]
    if turned and call.rotation is not None:
        angles = call.rotation.angles_at(torch.tensor([[reads[r].turn_tokens] for r in turned], device=query.device))
        query[turned] = call.rotation.back_by(query[turned], *angles)
    return query.mul_(call.scale)


def _products(
    left_NHxy: torch.Tensor, right: Sequence[torch.Tensor], page_counts: list[int], *, out: torch.Tensor
) -> None:
    """Write the product of each page and KV head of ``left_NHxy`` with that of its read, ``right`` [S, H, y, z]."""
    lefts, outs = (torch.split_with_sizes(x, page_counts) for x in (left_NHxy, out))
    for left, pages, into, n_pages in zip(lefts, right, outs, page_counts, strict=True):
        torch.bmm(left.flatten(0, 1), pages[:n_pages].flatten(0, 1), out=into.flatten(0, 1))
