"""The block-sparse methods by their formulas, with loops: which tokens one query reads, and attention over them.

Nothing here uses the methods' own functions. Shapes: G query heads of one KV head, T tokens, D head size.
"""

import math

import torch


def blocks_of(n_tokens, block_tokens):
    return [list(range(start, min(start + block_tokens, n_tokens))) for start in range(0, n_tokens, block_tokens)]


def best(scores, n_chosen):
    return sorted(range(len(scores)), key=lambda index: -scores[index])[:n_chosen]


def quest_blocks(q_GD, k_TD, blocks, n_chosen):
    scores = []
    for tokens in blocks[:-1]:
        low_D, high_D = k_TD[tokens].amin(0), k_TD[tokens].amax(0)
        scores.append(max(float(torch.maximum(q_D * low_D, q_D * high_D).sum()) for q_D in q_GD))
    return set(best(scores, n_chosen))


def moba_blocks(q_GD, k_TD, blocks, n_chosen):
    chosen = set()
    for q_D in q_GD:
        chosen |= set(best([float(q_D @ k_TD[tokens].mean(0)) for tokens in blocks[:-1]], n_chosen))
    return chosen


def msa_blocks(q_GD, k_TD, blocks, n_chosen):
    q_D = q_GD.mean(0)
    return set(best([max(float(q_D @ k_TD[token]) for token in tokens) for tokens in blocks[:-1]], n_chosen))


def dsa_tokens(q_HGD, k_HTD, scale, n_chosen):
    mass_T = sum(
        torch.softmax(scale * (k_TD @ q_D), 0) for q_GD, k_TD in zip(q_HGD, k_HTD, strict=True) for q_D in q_GD
    )
    return set(best(mass_T[:-1].tolist(), n_chosen))


def tokens_read(name, q_HGD, k_HTD, *, block_tokens, n_blocks, scale):
    """Return the tokens each KV head reads, the current block included."""
    H, T = k_HTD.shape[:2]
    blocks = blocks_of(T, block_tokens)
    if len(blocks) <= n_blocks:
        return [set(range(T)) for _ in range(H)]
    if name == "dsa":
        return [dsa_tokens(q_HGD, k_HTD, scale, n_blocks - 1) | {T - 1}] * H
    rule = {"quest": quest_blocks, "moba": moba_blocks, "msa": msa_blocks}[name]
    found = []
    for head in range(H):
        chosen = rule(q_HGD[head], k_HTD[head], blocks, n_blocks - 1) | {len(blocks) - 1}
        found.append({token for index in chosen for token in blocks[index]})
    return found


def attention(q_HGD, k_HTD, v_HTD, read, scale):
    """Return exact attention of each KV head's queries over its own tokens, [H, G, D]."""
    out = torch.zeros_like(q_HGD)
    for head, tokens in enumerate(read):
        tokens = sorted(tokens)
        for group, q_D in enumerate(q_HGD[head]):
            weights = [math.exp(scale * float(q_D @ k_HTD[head, token])) for token in tokens]
            total = sum(weights)
            for weight, token in zip(weights, tokens, strict=True):
                out[head, group] += weight / total * v_HTD[head, token]
    return out
