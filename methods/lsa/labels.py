"""From attention to labels: which chunks of the prompt one decode step really reads.

Shapes: Q query heads, H KV heads, G = Q/H, T tokens, M chunks of the prompt, S slots, P tokens a page, D head size, X
any leading sizes.
"""

from typing import Literal

import torch

from kvscope.methods.call import AttentionCall

Voters = Literal["layer", "head", "index"]
# Keys are scored in fp32, this many pages at a time, so that a long prompt costs no fp32 copy of its whole cache.
_BLOCK_PAGES = 1024


def token_logits(call: AttentionCall, pages: torch.Tensor, *, n_tokens: int) -> torch.Tensor:
    """Return the attention logits of one query over the first ``n_tokens`` of ``pages``, [Q, T] in fp32.

    Args:
        call: of one sequence and one token; its key and value are not looked at.
        pages: [S, H, 2, P, D]; those on another device are copied over, block by block.
    """
    _, H, _, P, D = pages.shape
    q_BQ1D, softcap = call.query, call.softcap
    q_HGD = q_BQ1D.reshape(H, -1, D).float() * call.scale
    blocks = []
    for start in range(0, -(-n_tokens // P), _BLOCK_PAGES):
        k_SHPD = pages[start : start + _BLOCK_PAGES, :, 0].to(q_BQ1D.device).float()
        blocks.append(torch.einsum("hgd,shpd->hgsp", q_HGD, k_SHPD).flatten(2))
    if not blocks:
        return q_HGD.new_zeros((q_BQ1D.shape[1], 0))
    logits = torch.cat(blocks, 2).flatten(0, 1)[:, :n_tokens]
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def chunk_mass(
    prompt_logits_QT: torch.Tensor,
    other_logits_QT: torch.Tensor,
    *,
    chunk_tokens: int,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention mass of each chunk and head, [Q, M + 1]; the last column is all the rest.

    Args:
        prompt_logits_QT: logits over the prompt's tokens, in order.
        other_logits_QT: logits over decoded tokens, the current one included.
        chunk_tokens: tokens of a chunk; the prompt's last chunk may be shorter.
        sink_logits: [Q], a learned logit that takes mass and has no token (gpt-oss).
    """
    rest = [other_logits_QT]
    if sink_logits is not None:
        rest.append(sink_logits.float()[:, None])
    rest_Q1 = torch.logsumexp(torch.cat(rest, 1), 1, keepdim=True)
    mass_QT = torch.softmax(torch.cat([prompt_logits_QT, rest_Q1], 1), 1)
    Q, n_tokens = prompt_logits_QT.shape
    n_chunks = -(-n_tokens // chunk_tokens)
    padded = mass_QT.new_zeros((Q, n_chunks * chunk_tokens))
    padded[:, :n_tokens] = mass_QT[:, :-1]
    return torch.cat([padded.view(Q, n_chunks, chunk_tokens).sum(2), mass_QT[:, -1:]], 1)


def top_p_mask(mass_XM: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the fewest entries of the last dimension that hold at least ``top_p`` (above 0) of its sum, as a mask.

    Equal entries are taken in order, those of no mass never.
    """
    order = torch.argsort(mass_XM, dim=-1, descending=True, stable=True)
    sorted_mass = mass_XM.gather(-1, order)
    total = sorted_mass.cumsum(-1)
    # One sum serves both sides, and nothing is not weighed: at 1.0 the rounding of another sum would decide on it.
    taken = (total - sorted_mass < top_p * total[..., -1:]) & (sorted_mass > 0)
    return torch.zeros_like(taken).scatter(-1, order, taken)


def chunk_votes(mass_LQM: torch.Tensor, *, top_p: float, voters: Voters, least_mass: float = 0.0) -> torch.Tensor:
    """Return how many voters hold each chunk in their top-p set, [M] as uint8 (at most 255).

    Args:
        mass_LQM: from ``chunk_mass``, one entry a managed layer, [L, Q, M + 1]. The rest takes part in the ranking and
            gets no vote.
        voters: ``layer``: a layer votes with its head-summed mass (the paper's rule). ``head``: every head of every
            layer votes, so that one retrieving head is not outvoted by idle ones.
        least_mass: no vote goes to a chunk with less of the voter's attention: spread thin, a top-p set holds nothing
            that was retrieved.
    """
    mass_VM = mass_LQM.mean(1) if voters == "layer" else mass_LQM.flatten(0, 1)
    votes_VM = top_p_mask(mass_VM, top_p) & (mass_VM >= least_mass)
    return votes_VM[:, :-1].sum(0).clamp_(max=255).to(torch.uint8)
