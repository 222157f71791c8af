"""Where training begins: at the match the model itself makes between queries and keys, as for lsa.

Queries and keys are linear maps of hidden states here, so both are fitted by ridge regression: queries as for lsa, the
keys of stored tokens from their states. The match of both is cut to the index key's size. A layer norm stands behind
the keys, which takes away what all entries have in common: the match lives in the other directions.

Shapes: M hidden size, F features a key, E index key size, Q query heads, I index heads.
"""

from collections.abc import Sequence

import torch

from kvscope.harness.indexers.collection.places import Place
from kvscope.harness.indexers.dsa.objective import TokenExample, divergence, example, layer_scores
from kvscope.harness.indexers.lsa.warm_start import MOST_DOCUMENTS, Moments, match, ridge, unit_rms
from kvscope.methods.dsa.lightning import Lightning, LightningLayer

# Sharpest and flattest softmax that is tried.
SCALES = tuple(2.0**power for power in range(-2, 9))
DOCUMENTS_FOR_SCALE = 16


def warm_start(indexer: Lightning, training: Sequence[Place]) -> list[dict[str, float]]:
    """Set an indexer's weights from shards; return per layer how well the start fits.

    ``query_fit``, ``key_fit``: share of the variance that states explain; ``scale``: of the head weights, chosen by the
    loss. Heads beyond the model's own keep their random weights.
    """
    info = training[0][0].info
    device = next(indexer.parameters()).device
    sampled = training[:: max(1, len(training) // MOST_DOCUMENTS)]
    few = [example(place, device) for place in training[:: max(1, len(training) // DOCUMENTS_FOR_SCALE)]]
    report = []
    for at, layer in enumerate(indexer.config.layers):
        found = start_layer(
            indexer.layer(layer), sampled, at, device, query_heads=info.query_heads, head_dim=info.head_dim
        )
        report.append({**found, "scale": set_scale(indexer.layer(layer), few, at)})
    return report


@torch.no_grad()
def start_layer(
    layer: LightningLayer,
    training: Sequence[Place],
    place: int,
    device: torch.device,
    *,
    query_heads: int,
    head_dim: int,
) -> dict[str, float]:
    """Set queries and keys of one layer."""
    sums = Moments.empty(training[0][0].info, device)
    tt, tk = torch.zeros_like(sums.xx), sums.xx.new_zeros((len(sums.xx), len(sums.k)))
    t = sums.xx.new_zeros(len(sums.xx))
    for collection, index in training:
        document = collection.load(index)
        assert document.token_states is not None
        assert document.token_keys is not None
        sums.add_queries(document, place)
        x, k = (
            unit_rms(document.token_states[place].to(device).double()),
            document.token_keys[place].to(device).double(),
        )
        sums.add_keys(k)
        tt += x.T @ x
        tk += x.T @ k
        t += x.sum(0)
    # What all keys have in common tells nothing: it is taken off before the fit.
    E = layer.key_dim
    found = match(sums, query_heads=query_heads, head_dim=head_dim, key_dim=max(1, E - 1))
    centred_MF = tk - torch.outer(t, found.mean_F)
    keys_FM = ridge(tt, centred_MF).T
    total = sums.kk.trace() - sums.n_keys * found.mean_F.square().sum()
    residual = total - 2 * (keys_FM @ centred_MF).trace() + (keys_FM @ tt @ keys_FM.T).trace()
    n_kept, n_heads = len(found.to_k_EF), min(layer.heads, query_heads)
    basis = free_of_mean(E, device)[:, :n_kept]
    q = layer.q.weight.view(layer.heads, E, -1)
    q[:n_heads] = (basis @ found.queries_QEM[:n_heads]).float()
    layer.k.weight.copy_((basis @ found.to_k_EF @ keys_FM).float())
    layer.norm.weight.fill_(1.0)
    layer.k_norm.weight.fill_(1.0)
    layer.k_norm.bias.zero_()
    layer.weights.weight.mul_(0.1)
    layer.weights.bias.fill_(1.0)
    return {"query_fit": round(found.query_fit, 4), "key_fit": round(1.0 - float(residual / total), 4)}


def free_of_mean(n: int, device: torch.device) -> torch.Tensor:
    """Return an orthonormal basis [n, n - 1] of the directions whose entries add up to nothing; [1, 1] for n = 1."""
    if n == 1:
        return torch.ones((1, 1), dtype=torch.float64, device=device)
    centring = torch.eye(n, dtype=torch.float64, device=device) - 1.0 / n
    basis: torch.Tensor = torch.linalg.svd(centring)[0][:, : n - 1]
    return basis


@torch.no_grad()
def set_scale(layer: LightningLayer, found: Sequence[TokenExample], place: int) -> float:
    """Scale the head weights to the sharpness at which the attention of some documents is met best."""
    losses = dict.fromkeys(SCALES, 0.0)
    for each in found:
        score = layer_scores(layer, each.query_RLM[:, place], each.key_LSM[place])
        for scale in SCALES:
            loss = divergence(scale * score, each.target_RLS[:, place], each.weight_S, each.visible_RS)
            losses[scale] += float(loss.mean())
    best = min(losses, key=lambda scale: losses[scale])
    layer.weights.weight.mul_(best)
    layer.weights.bias.mul_(best)
    return best
