"""The lightning indexer: DeepSeek-V3.2's score, and a small indexer of that kind for an ordinary model.

One key a token, many-headed queries, head weights, each a linear map of the hidden state entering the layer:

    I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s] / sqrt(E)) / sqrt(I)

DeepSeek's takes its queries from the latent of its attention and turns part of them by RoPE. An ordinary model has no
latent, and here nothing is turned: scores do not depend on positions.

Shapes: X queries, I index heads, T tokens, E index key size, M hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kvscope.methods.fp8_keys import SCALE_BYTES

_WEIGHT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class LightningConfig:
    """What a lightning indexer is, and which model it was trained for.

    Attributes:
        model: name of that model.
        model_revision: identity of its weights (``ModelShape.revision``).
        layers: layers that have one: every layer kvscope manages in the model.
        hidden_size: M.
        heads, key_dim: I, E.
        trained: how it was trained, for the record.
    """

    model: str
    model_revision: str
    layers: tuple[int, ...]
    hidden_size: int
    heads: int = 4
    key_dim: int = 32
    trained: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "heads", "key_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.layers:
            raise ValueError("at least one layer is needed")

    @property
    def token_key_bytes(self) -> int:
        """Bytes of one token's stored key in one layer: fp8 and one fp32 scale."""
        return self.key_dim + SCALE_BYTES

    @property
    def layer_weight_bytes(self) -> int:
        """Bytes of one layer's indexer, all of which a step reads."""
        M, E = self.hidden_size, self.key_dim
        return _WEIGHT_BYTES * (M + M * self.heads * E + M * E + 2 * E + (M + 1) * self.heads)

    def scan_reads(self, n_tokens: int) -> tuple[int, int]:
        """Return bytes and FLOPs of scoring ``n_tokens`` in one layer, making query and key included (a MAC is two)."""
        heads, E = self.heads, self.key_dim
        per_query = self.hidden_size * (heads * E + E + heads)
        n_flops = 2 * (per_query + n_tokens * heads * (E + 1))
        return n_tokens * self.token_key_bytes + self.layer_weight_bytes, n_flops


def default_sizes(n_q_heads: int, head_dim: int) -> tuple[int, int]:
    """Return index heads and key size for a model: its own heads, keys of half their size, at most 64 and 128.

    DeepSeek's 64 x 128 belong to a model whose KV is 1,152 bytes a token and layer. Here a key (fp8) has to be small
    beside K and V of a GQA model: 36 of 512 bytes for the reference model in bf16.
    """
    return min(64, n_q_heads), min(128, max(8, head_dim // 2))


class LightningLayer(nn.Module):
    """The indexer of one layer."""

    def __init__(self, config: LightningConfig) -> None:
        super().__init__()
        self.heads, self.key_dim = config.heads, config.key_dim
        # The residual stream comes as it is; the model's own attention normalises it, too.
        self.norm = nn.RMSNorm(config.hidden_size)
        self.q = nn.Linear(config.hidden_size, config.heads * config.key_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.key_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.key_dim)
        self.weights = nn.Linear(config.hidden_size, config.heads)

    def queries(self, hidden_XM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries [X, I, E] and head weights [X, I] in fp32."""
        x = self.norm(hidden_XM.float())
        return self.q(x).unflatten(-1, (self.heads, self.key_dim)), self.weights(x)

    def keys(self, hidden_TM: torch.Tensor) -> torch.Tensor:
        """Return one key a token, [T, E] in fp32."""
        keys_TE: torch.Tensor = self.k_norm(self.k(self.norm(hidden_TM.float())))
        return keys_TE


class Lightning(nn.Module):
    """The indexers of all managed layers of one model."""

    def __init__(self, config: LightningConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict({str(layer): LightningLayer(config) for layer in config.layers})

    def layer(self, layer: int) -> LightningLayer:
        """Return the indexer of one layer."""
        found = self.layers[str(layer)]
        assert isinstance(found, LightningLayer)
        return found


def lightning_scores(q_XIE: torch.Tensor, k_TE: torch.Tensor, weight_XI: torch.Tensor) -> torch.Tensor:
    """Return sum_h w_h relu(q_h . k_s / sqrt(E)) / sqrt(I) of each token, fp32 [X, T].

    Args:
        q_XIE: index queries; leading sizes may be any or none.
        k_TE: index keys, one a token, shared by the index heads.
        weight_XI: head weights of the queries.
    """
    n_heads, E = q_XIE.shape[-2:]
    logits_XIT = torch.relu(q_XIE.float() @ k_TE.float().T * E**-0.5)
    scores_XT: torch.Tensor = (weight_XI.float()[..., None, :] * n_heads**-0.5 @ logits_XIT)[..., 0, :]
    return scores_XT
