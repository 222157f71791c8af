"""The released score function, token by token and head by head in fp64, with the Hadamard matrix written out."""

import math

import torch


def plain_logits(weights, hidden, position, keys, inv_freq):
    """Scores of one layer before the sigmoid.

    Args:
        keys: as they are stored, turned [n, E].
        inv_freq: of the pairs that rotate, the last ones of each head.
    """
    heads = weights.w_w_IM.shape[0]
    dim = weights.w_iuq_OR.shape[0] // heads
    pairs = len(inv_freq)
    low = weights.w_dq_RM.double() @ hidden.double()
    low = low / torch.sqrt((low * low).mean() + 1e-6) * weights.norm_R.double()
    q = (weights.w_iuq_OR.double() @ low).view(heads, dim)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    matrix = matrix / math.sqrt(dim)
    out = torch.zeros(len(keys), dtype=torch.float64)
    for head in range(heads):
        turned = q[head].clone()
        for pair in range(pairs):
            a, b = dim - 2 * pairs + 2 * pair, dim - 2 * pairs + 2 * pair + 1
            angle = position * float(inv_freq[pair])
            turned[a] = q[head, a] * math.cos(angle) - q[head, b] * math.sin(angle)
            turned[b] = q[head, b] * math.cos(angle) + q[head, a] * math.sin(angle)
        weight = float(weights.w_w_IM[head].double() @ hidden.double()) * heads**-0.5 * dim**-0.5
        for n in range(len(keys)):
            out[n] += weight * max(0.0, float((matrix @ turned) @ keys[n].double()))
    return out
