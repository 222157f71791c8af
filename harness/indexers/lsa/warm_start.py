"""Where training begins: at the match the model itself makes between queries and keys, learned from shards alone.

A dual encoder of random weights has to discover which of thousands of keys belongs to a query, and does not within any
affordable number of documents. The model already has that match, in the queries and keys of its retrieving layers. The
paper starts from there, too: its keys are the native indexer's, frozen. Here

- the map from hidden states to queries is fitted by ridge regression on the (state, query) pairs of the shards;
- it is cut to the indexer's rank where that costs least on the states seen (their principal directions);
- keys and queries are projected to the indexer's key size by the best bilinear approximation of their product (a
  truncated SVD of C_q^1/2 C_k^1/2, C the second moments), keys centred: what all keys have in common tells nothing;
- every head is scaled to unit variance over the keys, and the bias set so that few chunks pass, lending included.

Shapes: M hidden size, Q query heads, D head size, H KV heads, F = H * D, I indexer heads, E key size, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvscope.harness.indexers.collection.document import CollectionInfo, Document
from kvscope.harness.indexers.collection.places import Place
from kvscope.harness.indexers.lsa.objective import example, own_logits
from kvscope.harness.indexers.lsa.train_config import TrainConfig
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

    @classmethod
    def empty(cls, info: CollectionInfo, device: torch.device) -> "Moments":
        """Return sums of nothing, sized for a collection."""
        width, heads, features = info.hidden_size, info.query_heads * info.head_dim, info.key_features

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            xx=zeros(width, width),
            xq=zeros(width, heads),
            qq=zeros(heads, heads),
            kk=zeros(features, features),
            k=zeros(features),
        )

    def add_queries(self, document: Document, place: int) -> None:
        """Add a document's steps: states and queries of the layer at ``place``."""
        device = self.xx.device
        x = unit_rms(document.hidden[-document.info.n_steps :, place].to(device).double())
        q = document.queries[:, place].to(device).double()
        self.xx += x.T @ x
        self.xq += x.T @ q
        self.qq += q.T @ q
        self.n_states += len(x)

    def add_keys(self, k_XF: torch.Tensor) -> None:
        """Add keys."""
        k = k_XF.to(self.kk.device).double()
        self.kk += k.T @ k
        self.k += k.sum(0)
        self.n_keys += len(k)


@dataclass(frozen=True)
class Match:
    """The model's own match of queries and keys, cut to a smaller key.

    Attributes:
        queries_QEM: of each query head, from unit-RMS states; logits over keys have unit variance.
        to_k_EF, mean_F: small keys are ``to_k (k - mean)``.
        xx_MM: second moment of the states.
        query_fit, kept_energy: share of the queries that states explain, and of the match that the cut keeps.
    """

    queries_QEM: torch.Tensor
    to_k_EF: torch.Tensor
    mean_F: torch.Tensor
    xx_MM: torch.Tensor
    query_fit: float
    kept_energy: float


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
        sums = gather(sampled, layer, device)
        report.append(
            start_layer(indexer.token_layer(layer), sums, query_heads=info.query_heads, head_dim=info.head_dim)
        )
    set_bias(indexer, training[:: max(1, len(training) // 16)], config)
    return report


@torch.no_grad()
def gather(training: Sequence[Place], layer: int, device: torch.device) -> Moments:
    """Sum the moments of an indexed layer over documents."""
    sums = Moments.empty(training[0][0].info, device)
    for collection, index in training:
        document = collection.load(index)
        place = collection.info.layers.index(layer)
        sums.add_queries(document, place)
        keys = document.features[place]
        k = keys[:, 0] if collection.info.features == "stats" else keys.flatten(0, 1)
        sums.add_keys(k[:: max(1, len(k) // KEYS_A_DOCUMENT)])
    return sums


def match(sums: Moments, *, query_heads: int, head_dim: int, key_dim: int) -> Match:
    """Return the model's match in keys of at most ``key_dim`` entries."""
    n_features = len(sums.k)
    group = query_heads // (n_features // head_dim)
    w_QDM = ridge(sums.xx, sums.xq).T  # queries from states
    residual = sums.qq.trace() - 2 * (w_QDM @ sums.xq).trace() + (w_QDM @ sums.xx @ w_QDM.T).trace()

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
    n_kept = min(key_dim, n_features)
    to_q = s[:n_kept, None].sqrt() * u.T[:n_kept] @ unroot_q  # [E, F]
    to_k = s[:n_kept, None].sqrt() * vh[:n_kept] @ unroot_k

    queries = []
    for own, slot in slots:
        # Logits of unit variance over keys and states: idle heads must not drown a retrieving one.
        c_head = to_q[:, slot] @ (sums.qq[own, own] / sums.n_states) @ to_q[:, slot].T
        variance = (c_head * (to_k @ c_k @ to_k.T)).sum().clamp_min(1e-12)
        queries.append(to_q[:, slot] @ w_QDM[own] / variance.sqrt())
    return Match(
        queries_QEM=torch.stack(queries),
        to_k_EF=to_k,
        mean_F=mean_F,
        xx_MM=sums.xx / sums.n_states,
        query_fit=1.0 - float(residual / sums.qq.trace()),
        kept_energy=float(s[:n_kept].sum() / s.sum()),
    )


def ridge(xx_MM: torch.Tensor, xy_MY: torch.Tensor) -> torch.Tensor:
    """Return the map [M, Y] that predicts y from x best, from their second moments."""
    weight = RIDGE * xx_MM.diagonal().mean() * torch.eye(len(xx_MM), dtype=xx_MM.dtype, device=xx_MM.device)
    solved: torch.Tensor = torch.linalg.solve(xx_MM + weight, xy_MY)
    return solved


@torch.no_grad()
def start_layer(layer: LayerIndexer, sums: Moments, *, query_heads: int, head_dim: int) -> dict[str, float]:
    """Set both sides of one layer's indexer."""
    query, memory = layer.query, layer.memory
    found = match(sums, query_heads=query_heads, head_dim=head_dim, key_dim=query.key_dim)
    n_kept, n_heads = len(found.to_k_EF), min(query.heads, query_heads)
    full = found.xx_MM.new_zeros((query.heads, query.key_dim, len(found.xx_MM)))
    full[:n_heads, :n_kept] = found.queries_QEM[:n_heads]
    rank = query.down.weight.shape[0]
    flat = full.flatten(0, 1)
    # The directions in which queries of the states seen really vary: the largest of the covariance of what `up` gives.
    _, directions = torch.linalg.eigh(flat @ found.xx_MM @ flat.T)
    basis = directions[:, -min(rank, directions.shape[1]) :]
    down = basis.T @ flat
    spread = ((down @ found.xx_MM) * down).sum().div(rank).sqrt()
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
    memory.out.weight[:n_kept] = found.to_k_EF.float()
    memory.out.bias.zero_()
    memory.out.bias[:n_kept] = -(found.to_k_EF @ found.mean_F).float()
    return {"query_fit": round(found.query_fit, 4), "kept_energy": round(found.kept_energy, 4)}


@torch.no_grad()
def set_bias(indexer: Indexer, places: Sequence[Place], config: TrainConfig) -> None:
    """Scale the logits of segments to unit spread and shift them so that one candidate chunk in twenty passes."""
    found = []
    for place in places:
        loaded = example(place, config)
        if loaded is not None:
            chunks = torch.arange(loaded.first, loaded.last)
            rows = loaded.document.refresh_rows(config.tau)
            found.append(own_logits(indexer, loaded, rows, config.lookback, chunks=chunks).float())
    if not found:
        return
    scale = float(torch.cat([logits.flatten() for logits in found]).std().clamp_min(1e-6))
    # What lending costs is in scaled units from the start, so it is told after scaling how many pass.
    scores = torch.cat([indexer.chunk_scores(logits / scale).flatten() for logits in found]).cpu()
    cut = float(torch.quantile(scores[:1_000_000], 1 - PASS_SHARE))
    for name in indexer.config.layers:
        indexer.layer(name).rescale(scale, bias=-cut)


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
