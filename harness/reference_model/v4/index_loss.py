"""What the native indexer is trained on: the attention that a layer's heads give to its entries, the model frozen.

The loss of a query is KL(attention over entries, summed over heads || softmax of the indexer's scores), weighted by the
attention that entries get there: a query that looks at its window alone teaches nothing about entries. DeepSeek-V3.2's
warm-up (arXiv 2512.02556, section 2.1) weighs all queries alike.

Shapes: B rows, T tokens, M hidden size, Q query heads, D head size, n entries, C queries taken of a row, W window, N
scored positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kvscope.harness.reference_model.backbone import Backbone, Losses
from kvscope.harness.reference_model.data import Batch
from kvscope.harness.reference_model.v4.layer import Rope, entries_of, index_scores, queries_and_window, seen_entries

# Queries of every row beside those whose next token is scored; some of them retrieve, too.
OTHER_QUERIES = 64


@dataclass(frozen=True)
class Taken:
    """Queries that the loss is taken over.

    Attributes:
        at_BC: their positions; a row's scored ones first, then others.
        of_N: where each scored position of the batch is among them, flat.
    """

    at_BC: torch.Tensor
    of_N: torch.Tensor


def taken_queries(batch: Batch) -> Taken:
    """Take every scored position, and others at even distances so that all rows have as many."""
    B, T = batch.ids_BT.shape
    row_N, at_N = batch.at_N // T, batch.at_N % T
    scored_B = torch.bincount(row_N, minlength=B)
    C = int(scored_B.max()) + OTHER_QUERIES
    at_BC = torch.linspace(0, T - 1, C).long().expand(B, -1).clone()
    order_N = torch.arange(len(row_N)) - (scored_B.cumsum(0) - scored_B)[row_N]
    at_BC[row_N, order_N] = at_N
    return Taken(at_BC, row_N * C + order_N)


@torch.no_grad()
def entry_mass(module: Any, hidden_BTM: torch.Tensor, at_BC: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Return the attention that each entry gets from the queries taken, mean over heads [B, C, n]; sinks and window
    have the rest.
    """
    angles = rope[module.rope_layer_type]
    row = torch.arange(len(at_BC), device=at_BC.device)[:, None]
    q_BTQD, kv_BTD, _ = queries_and_window(module, hidden_BTM, angles)
    q_BCQD = q_BTQD[row, at_BC]
    back_W = torch.arange(module.sliding_window, device=at_BC.device)
    window_BCW = at_BC[..., None] - back_W
    near_BCWD = kv_BTD[row[..., None], window_BCW.clamp_min(0)].to(q_BCQD.dtype)
    near_BCQW = torch.einsum("bcqd,bcwd->bcqw", q_BCQD, near_BCWD).float() * module.scaling
    near_BCQW = near_BCQW.masked_fill(window_BCW[:, :, None] < 0, float("-inf"))
    e_BnD = entries_of(module.compressor, hidden_BTM, angles).to(q_BCQD.dtype)
    far_BCQn = torch.einsum("bcqd,bnd->bcqn", q_BCQD, e_BnD).float() * module.scaling
    far_BCQn = far_BCQn.masked_fill(_unseen(module, at_BC, e_BnD.shape[1])[:, :, None], float("-inf"))
    sinks = module.sinks.float().view(1, 1, -1, 1).expand(*near_BCQW.shape[:3], 1)
    mass_BCQ = torch.cat((near_BCQW, far_BCQn, sinks), -1).softmax(-1)
    return mass_BCQ[..., module.sliding_window : -1].mean(2)


def _unseen(module: Any, at_BC: torch.Tensor, n: int) -> torch.Tensor:
    seen_BC1 = seen_entries(at_BC, module.compressor.compress_rate)[..., None]
    return torch.arange(n, device=at_BC.device) >= seen_BC1


def layer_loss(
    module: Any, hidden_BTM: torch.Tensor, at_BC: torch.Tensor, rope: Rope, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one layer's loss, and the share of its entries' attention that its top-k holds [B, C]."""
    mass_BCn = entry_mass(module, hidden_BTM, at_BC, rope)
    indexer, (cos, sin) = module.compressor.indexer, rope[module.rope_layer_type]
    row = torch.arange(len(at_BC), device=at_BC.device)[:, None]
    keys_BnD = entries_of(indexer, hidden_BTM, (cos, sin))
    taken_BCM = hidden_BTM[row, at_BC]
    low_BCR = module.q_a_norm(module.q_a_proj(taken_BCM)).detach()
    scores_BCn = index_scores(indexer, taken_BCM, low_BCR, keys_BnD, (cos[0][at_BC], sin[0][at_BC]))
    unseen_BCn = _unseen(module, at_BC, scores_BCn.shape[2])
    scores_BCn = scores_BCn.masked_fill(unseen_BCn, torch.finfo(scores_BCn.dtype).min)
    total_BC1 = mass_BCn.sum(2, keepdim=True)
    log_share = (mass_BCn / total_BC1.clamp_min(1e-20)).clamp_min(1e-20).log()
    loss = (mass_BCn * (log_share - scores_BCn.log_softmax(2))).sum(2).mean()
    best = scores_BCn.topk(min(topk, scores_BCn.shape[2])).indices
    held_BC = mass_BCn.gather(2, best).sum(2) / total_BC1[..., 0].clamp_min(1e-20)
    return loss, held_BC.detach()


def index_losses(backbone: Backbone, model: PreTrainedModel, *, topk: int) -> Losses:
    """Return the indexer's loss, mean over its layers, and the share of entries' attention that its top-k holds."""

    def losses(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        base, device = model.model, model.device
        taken = taken_queries(batch)
        at_BC = taken.at_BC.to(device, non_blocking=True)
        found, held = [], []
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                streams, given = backbone.entering(base, batch.ids_BT.to(device, non_blocking=True))
            for layer in base.layers:
                module = layer.self_attn
                with torch.no_grad():
                    hidden_BTM = layer.entering_attention(streams)[0].unflatten(0, batch.ids_BT.shape)
                    streams = layer(streams, **given)
                if hasattr(module.compressor, "indexer"):
                    loss, held_BC = layer_loss(module, hidden_BTM, at_BC, given["rope"], topk)
                    found.append(loss)
                    held.append(held_BC)
        held_N = torch.stack(held).mean(0).flatten()[taken.of_N.to(device)]
        return torch.stack(found).mean(), held_N

    return losses
