"""The Neural Memory Indexer: a dual encoder that scores every chunk of the past from one hidden state.

Query side (arXiv 2606.09079): low rank -> RMSNorm -> heads, and learned head weights. Memory side: an ordinary
model has no compressed indexer keys of its own, so a small encoder makes one key a chunk from the model's own keys,
stored as fp8 (e4m3) with one fp32 scale. The score of a chunk is sigmoid(bias + sum_h w_h relu(q_h . k)); the sigmoid
is monotonic, so selection works on logits. Over several indexed layers the score is the maximum.

One key does not tell what 64 tokens of prose hold. ``segment_tokens`` cuts a chunk into segments with a key each; a
chunk's score is that of its best segment. And what an answer copies often runs on from the segment that its question
matches into the next ones: ``neighbours`` lets a segment lend its score to those around it, at a learned price for each
distance. Lending comes last: after the maximum over states and layers, and before that over a chunk's segments.

Shapes: X queries, L indexed layers, M hidden size, R rank, I indexer heads, E key size, n segments, C tokens a segment,
F features a token (KV heads x head size: one layer's keys).
"""

import math
from dataclasses import replace

import torch
from torch import nn

from kvscope.methods.lsa.compressed_query import EntryLayer
from kvscope.methods.lsa.indexer_config import COMPRESSED_KEY, EncoderKind, Features, IndexerConfig
from kvscope.methods.lsa.rectifier import rectified

_POOLS = 4
_LENT = -1.0  # added to a score that is lent, before training: a logit of warm-started weights has unit spread
_BLOCK_PRODUCTS = 2**25


def chunk_features(k_nCF: torch.Tensor, kind: Features) -> torch.Tensor:
    """Return what the memory side reads of each segment: [n, 3, F] (mean, maximum, minimum) or the keys [n, C, F]."""
    if kind == "tokens":
        return k_nCF
    k = k_nCF.float()
    return torch.stack([k.mean(1), k.amax(1), k.amin(1)], 1).to(k_nCF.dtype)


class MemoryEncoder(nn.Module):
    """One key a segment from the features of its keys. Every kind has a part that is linear in the keys (``out``)."""

    def __init__(self, kind: EncoderKind, *, features: int, width: int, key_dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.out = nn.Linear(features, key_dim)
        if kind == "stats":
            self.norm = nn.RMSNorm(features, elementwise_affine=False)
            self.mlp = nn.Sequential(nn.Linear(3 * features, width), nn.SiLU(), nn.Linear(width, key_dim, bias=False))
        elif kind == "pooled":
            # Groups of the key's entries are averaged with weights of their own.
            self.pools = _POOLS if key_dim % _POOLS == 0 else 1
            self.weights = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, self.pools))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, 3, F] or [n, C, F] -> [n, E] in fp32."""
        k = features.float()
        if self.kind == "pooled":
            share_nCP = torch.softmax(self.weights(k), 1)
            value_nCPE = self.out(k).unflatten(-1, (self.pools, -1))
            return torch.einsum("ncp,ncpe->npe", share_nCP, value_nCPE).flatten(1)
        key: torch.Tensor = self.out(k[:, 0])
        return key + self.mlp(self.norm(k).flatten(1)) if self.kind == "stats" else key


class QueryEncoder(nn.Module):
    """Low-rank, many-headed queries from a hidden state, and a weight a head."""

    def __init__(self, *, hidden_size: int, rank: int, heads: int, key_dim: int) -> None:
        super().__init__()
        self.heads, self.key_dim = heads, key_dim
        # Residual streams grow by orders of magnitude over the layers; every layer of the model normalises them, too.
        self.norm_in = nn.RMSNorm(hidden_size)
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.norm = nn.RMSNorm(rank)
        self.up = nn.Linear(rank, heads * key_dim, bias=False)
        self.weights = nn.Linear(hidden_size, heads)

    def forward(self, hidden_XM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries [X, I, E] and head weights [X, I] in fp32; scales are in the weights, as in the paper."""
        x = self.norm_in(hidden_XM.float())
        q = self.up(self.norm(self.down(x))).unflatten(-1, (self.heads, self.key_dim))
        return q, self.weights(x) * (self.heads * self.key_dim) ** -0.5


class LayerIndexer(nn.Module):
    """Both sides for one indexed layer."""

    def __init__(self, config: IndexerConfig) -> None:
        super().__init__()
        self.query = QueryEncoder(
            hidden_size=config.hidden_size, rank=config.rank, heads=config.heads, key_dim=config.key_dim
        )
        self.memory = MemoryEncoder(
            config.encoder, features=config.key_features, width=config.encoder_width, key_dim=config.key_dim
        )
        self.bias = nn.Parameter(torch.zeros(()))
        self.revive = 0.0

    def logits(
        self, hidden_XM: torch.Tensor, k_nE: torch.Tensor, angles_X2P: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the score of every segment for every query before the sigmoid, [X, n] in fp32; positions are none of
        its matter."""
        del angles_X2P
        q_XIE, w_XI = self.query(hidden_XM)
        X, n_heads, E = q_XIE.shape
        block = max(1, _BLOCK_PRODUCTS // (X * n_heads))
        parts = [
            torch.einsum("xi,xin->xn", w_XI, rectified(q_XIE.view(-1, E) @ k.T, self.revive).view(X, n_heads, -1))
            for k in torch.split(k_nE.float(), block)
        ]
        return self.bias + torch.cat(parts, 1)

    @torch.no_grad()
    def rescale(self, scale: float, *, bias: float) -> None:
        """Divide every score by ``scale``, and set what is added to it."""
        self.query.weights.weight.div_(scale)
        self.query.weights.bias.div_(scale)
        self.bias.fill_(bias)


def _layer_of(config: IndexerConfig) -> LayerIndexer | EntryLayer:
    if config.encoder != COMPRESSED_KEY:
        return LayerIndexer(config)
    sizes = {name: getattr(config, name) for name in ("hidden_size", "rank", "heads", "key_dim")}
    return EntryLayer(**sizes)


class Indexer(nn.Module):
    """The indexers of all indexed layers of one model."""

    def __init__(self, config: IndexerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict({str(layer): _layer_of(config) for layer in config.layers})
        if config.neighbours:
            self.lent = nn.Parameter(torch.full((2 * config.neighbours,), _LENT))

    @classmethod
    def untrained(cls, config: IndexerConfig, *, seed: int) -> "Indexer":
        """Return an indexer of random weights, the same on every machine; the global random state is untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config).eval()

    def layer(self, layer: int) -> LayerIndexer | EntryLayer:
        """Return the indexer of one layer."""
        found = self.layers[str(layer)]
        assert isinstance(found, LayerIndexer | EntryLayer)
        return found

    def keep_layers(self, layers: tuple[int, ...]) -> None:
        """Drop the layers that are not among these; others that are missing stay so."""
        kept = tuple(layer for layer in self.config.layers if layer in layers)
        if kept:
            self.config = replace(self.config, layers=kept)
            self.layers = nn.ModuleDict({str(layer): self.layers[str(layer)] for layer in kept})

    def revive(self, slope: float) -> None:
        """Give products below zero a gradient while training, see ``rectified``; nothing of it is stored."""
        for layer in self.config.layers:
            self.layer(layer).revive = slope

    def token_layer(self, layer: int) -> LayerIndexer:
        """Return the indexer of one layer of a model that keeps tokens."""
        found = self.layer(layer)
        assert isinstance(found, LayerIndexer)
        return found

    def logits(
        self, hidden_XLM: torch.Tensor, keys_Ln: "list[torch.Tensor]", angles_X2P: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the scores of every segment for every query, maximum over layers, [X, n].

        Args:
            hidden_XLM: hidden states entering the indexed layers, in the order of ``config.layers``.
            keys_Ln: per layer the keys of all segments [n, E], fp32.
            angles_X2P: cosine and sine of each state's position; for ``compressed_key`` alone.
        """
        per_layer = [
            self.layer(layer).logits(hidden_XLM[:, i], keys_Ln[i], angles_X2P)
            for i, layer in enumerate(self.config.layers)
        ]
        return torch.stack(per_layer).amax(0)

    def chunk_scores(self, logits_Xn: torch.Tensor) -> torch.Tensor:
        """Return the scores of chunks from those of their segments, [X, chunks].

        score(chunk) = max over its segments s of max(logit(s), max over 0 < |d| <= neighbours of logit(s + d) + lent_d)

        Args:
            logits_Xn: of whole chunks that follow each other. Nothing is lent across the ends; a segment that is not to
                lend has minus infinity.
        """
        reach, per_chunk = self.config.neighbours, self.config.segments_per_chunk
        best, n = logits_Xn, logits_Xn.shape[1]
        if reach:
            padded = nn.functional.pad(logits_Xn, (reach, reach), value=-torch.inf)
            offsets = [offset for offset in range(-reach, reach + 1) if offset]
            for lent, offset in zip(self.lent, offsets, strict=True):
                best = torch.maximum(best, padded[:, reach + offset : reach + offset + n] + lent)
        return best if per_chunk == 1 else best.reshape(len(best), n // per_chunk, per_chunk).amax(2)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(p.numel() * p.element_size() for p in self.parameters())


def weight_bytes(config: IndexerConfig) -> int:
    """Return the bytes of an indexer's weights without making it."""
    with torch.device("meta"):
        return Indexer(config).weight_bytes


def logit(probability: float) -> float:
    """Return the logit of a probability in (0, 1)."""
    return math.log(probability / (1 - probability))
