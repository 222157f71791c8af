"""Where training begins: at the match the model itself makes between queries and keys, learned from shards alone.

A dual encoder of random weights has to discover which of thousands of keys belongs to a query, and does not within any
affordable number of documents. The model already has that match, in the queries and keys of its retrieving layers. The
paper starts from there, too: its keys are the native indexer's, frozen. Here

- the map from hidden states to queries is fitted by ridge regression on the (state, query) pairs of the shards;
- it is cut to the indexer's rank where that costs least on the states seen (their principal directions);
- keys and queries are projected to the indexer's key size by the best bilinear approximation of their product (a
  truncated SVD of C_q^1/2 C_k^1/2, C the second moments), keys centred: what all keys have in common tells nothing;
- every head is scaled to unit variance over the keys, and the bias set so that few chunks pass.

Shapes: M hidden size, Q query heads, D head size, H KV heads, F = H * D, I indexer heads, E key size, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvscope.harness.lsa.objective import Place, TrainConfig, example, row_logits
from kvscope.methods.lsa.indexer import Indexer, LayerIndexer

MOST_DOCUMENTS = 512
KEYS_A_DOCUMENT = 512
RIDGE = 1e-4
PASS_SHARE = 0.05


@dataclass
class Moments:
    """Second moments of one layer, summed over samples in fp64.

    Attributes:
        xx, xq: of normalised states with themselves [M, M] and with queries [M, Q * D].
        qq: of queries with themselves, summed over samples, [Q * D, Q * D].
        kk: of keys [F, F].
        k: sum of keys [F].
        n_states, n_keys: samples.
    """

    xx: torch.Tensor
    xq: torch.Tensor
    qq: torch.Tensor
    kk: torch.Tensor
    k: torch.Tensor
    n_states: int = 0
    n_keys: int = 0


def warm_start(indexer: Indexer, training: Sequence[Place], config: TrainConfig) -> list[dict[str, float]]:
    """Set an indexer's weights from shards; return per layer how well queries were fitted (R squared).

    Heads beyond the model's own keep their random weights, and so does what an encoder adds to its linear part.
    """
    info = training[0][0].info
    device = next(indexer.parameters()).device
    sampled = training[:: max(1, len(training) // MOST_DOCUMENTS)]
    report = []
    for layer in indexer.config.layers:
        # One layer at a time: the moments of a wide model are hundreds of megabytes.
        sums = gather(sampled, info.layers.index(layer), device)
        report.append(start_layer(indexer.layer(layer), sums, query_heads=info.query_heads, head_dim=info.head_dim))
    set_bias(indexer, training[:: max(1, len(training) // 16)], config)
    return report


@torch.no_grad()
def gather(training: Sequence[Place], place: int, device: torch.device) -> Moments:
    """Sum the moments of the indexed layer at ``place`` over documents."""
    info = training[0][0].info
    width, heads, features = info.hidden_size, info.query_heads * info.head_dim, info.key_features

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    sums = Moments(
        xx=zeros(width, width),
        xq=zeros(width, heads),
        qq=zeros(heads, heads),
        kk=zeros(features, features),
        k=zeros(features),
    )
    for collection, index in training:
        document = collection.load(index)
        x = unit_rms(document.hidden[-document.info.n_steps :, place].to(device).double())
        q = document.queries[:, place].to(device).double()
        keys = document.features[place]
        k = keys[:, 0] if collection.info.features == "stats" else keys.flatten(0, 1)
        k = k[:: max(1, len(k) // KEYS_A_DOCUMENT)].to(device).double()
        sums.xx += x.T @ x
        sums.xq += x.T @ q
        sums.qq += q.T @ q
        sums.kk += k.T @ k
        sums.k += k.sum(0)
        sums.n_states += len(x)
        sums.n_keys += len(k)
    return sums


@torch.no_grad()
def start_layer(layer: LayerIndexer, sums: Moments, *, query_heads: int, head_dim: int) -> dict[str, float]:
    """Set both sides of one layer's indexer."""
    query, memory = layer.query, layer.memory
    n_features = len(sums.k)
    group = query_heads // (n_features // head_dim)
    ridge = RIDGE * sums.xx.diagonal().mean() * torch.eye(len(sums.xx), dtype=torch.float64, device=sums.xx.device)
    w_QDM = torch.linalg.solve(sums.xx + ridge, sums.xq).T  # queries from states
    residual = sums.qq.trace() - 2 * (w_QDM @ sums.xq).trace() + (w_QDM @ sums.xx @ w_QDM.T).trace()
    fit = 1.0 - float(residual / sums.qq.trace())

    mean_F = sums.k / sums.n_keys
    c_k = sums.kk / sums.n_keys - torch.outer(mean_F, mean_F)
    c_q = torch.zeros_like(c_k)
    slots = []
    for head in range(query_heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        slot = slice(head // group * head_dim, (head // group + 1) * head_dim)
        slots.append((own, slot))
        c_q[slot, slot] += sums.qq[own, own] / sums.n_states / query_heads
    root_q, unroot_q = roots(c_q)
    root_k, unroot_k = roots(c_k)
    u, s, vh = torch.linalg.svd(root_q @ root_k)
    n_kept = min(query.key_dim, n_features)
    to_q = s[:n_kept, None].sqrt() * u.T[:n_kept] @ unroot_q  # [E, F]
    to_k = s[:n_kept, None].sqrt() * vh[:n_kept] @ unroot_k

    n_heads = min(query.heads, query_heads)
    full = w_QDM.new_zeros((query.heads, query.key_dim, len(sums.xx)))
    for head, (own, slot) in enumerate(slots[:n_heads]):
        mapped = to_q[:, slot] @ w_QDM[own]
        # Logits of unit variance over keys and states: idle heads must not drown a retrieving one.
        c_head = to_q[:, slot] @ (sums.qq[own, own] / sums.n_states) @ to_q[:, slot].T
        variance = (c_head * (to_k @ c_k @ to_k.T)).sum().clamp_min(1e-12)
        full[head, :n_kept] = mapped / variance.sqrt()
    rank = query.down.weight.shape[0]
    flat = full.flatten(0, 1)
    # The directions in which queries of the states seen really vary: the largest of the covariance of what `up` gives.
    _, directions = torch.linalg.eigh(flat @ (sums.xx / sums.n_states) @ flat.T)
    basis = directions[:, -min(rank, directions.shape[1]) :]
    down = basis.T @ flat
    spread = ((down @ (sums.xx / sums.n_states)) * down).sum().div(rank).sqrt()
    query.norm_in.weight.fill_(1.0)
    query.down.weight.zero_()
    query.down.weight[: len(down)] = (down / spread).float()
    query.norm.weight.fill_(float(spread))
    untouched = query.up.weight.view(query.heads, query.key_dim, rank)[n_heads:].clone()
    query.up.weight.zero_()
    query.up.weight[:, : basis.shape[1]] = basis.float()
    query.up.weight.view(query.heads, query.key_dim, rank)[n_heads:] = untouched
    query.weights.weight.mul_(0.1)
    query.weights.bias.fill_((query.heads * query.key_dim) ** 0.5 / query.heads)
    memory.out.weight.zero_()
    memory.out.weight[:n_kept] = to_k.float()
    memory.out.bias.zero_()
    memory.out.bias[:n_kept] = -(to_k @ mean_F).float()
    return {"query_fit": round(fit, 4), "kept_energy": round(float(s[:n_kept].sum() / s.sum()), 4)}


@torch.no_grad()
def set_bias(indexer: Indexer, places: Sequence[Place], config: TrainConfig) -> None:
    """Scale the logits to unit spread and shift them so that one candidate in twenty passes."""
    found = []
    for place in places:
        loaded = example(place, config)
        if loaded is not None:
            chunks = torch.arange(loaded.first, loaded.last)
            rows = loaded.document.refresh_rows(config.tau)
            found.append(row_logits(indexer, loaded, rows, config.lookback, chunks=chunks).flatten().float().cpu())
    if not found:
        return
    logits = torch.cat(found)
    scale = float(logits.std().clamp_min(1e-6))
    cut = float(torch.quantile(logits[:1_000_000], 1 - PASS_SHARE)) / scale
    for name in indexer.config.layers:
        layer = indexer.layer(name)
        layer.query.weights.weight.div_(scale)
        layer.query.weights.bias.div_(scale)
        layer.bias.fill_(-cut)


def unit_rms(x: torch.Tensor) -> torch.Tensor:
    """Return vectors of unit root mean square, as the indexer's input norm makes them."""
    return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def roots(c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the square root of a covariance and the root of its inverse, flat directions left at zero."""
    values, vectors = torch.linalg.eigh((c + c.T) / 2)
    values = values.clamp_min(0)
    root = values.sqrt()
    unroot = torch.where(values > 1e-8 * values.amax(), 1 / root.clamp_min(1e-30), 0.0)
    return vectors * root @ vectors.T, vectors * unroot @ vectors.T
