"""The query side of an indexer over compressed entries, for one layer. No model is needed to train it.

arXiv 2606.09079. For a hidden state h entering attention at position p:

    q = Hadamard(RoPE_p(W_IUQ RMSNorm(W_DQ h)))    RoPE on the last dims of each head, YaRN frequencies, interleaved
    w = W_w h * I^-0.5 * E^-0.5
    logit(entry) = bias + sum_h w_h relu(q_h . k_entry)

The paper has no bias and keeps what scores 0.5. A bias of every layer alike is another threshold, no other function:
with it an indexer is set to keep what it should at 0.5, as every other here.

Shapes: X queries, M hidden size, R rank, I heads, E key size, n entries, P pairs that rotate (half the rotated dims).
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from kvscope.methods.lsa.rectifier import rectified

NORM_EPS = 1e-6
_BLOCK_PRODUCTS = 2**25


@dataclass(frozen=True, kw_only=True)
class QueryWeights:
    """The query side of one indexed layer, fp32.

    Attributes:
        w_dq_RM: down projection.
        norm_R: weight of the RMS norm behind it.
        w_iuq_OR: up projection, O = I * E.
        w_w_IM: head weights.
        bias: added to every entry's logit; 0 in the paper.
    """

    w_dq_RM: torch.Tensor
    norm_R: torch.Tensor
    w_iuq_OR: torch.Tensor
    w_w_IM: torch.Tensor
    bias: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        R, M = (*self.w_dq_RM.shape, 0, 0)[:2]
        heads, rows = (each.shape[0] if each.dim() else 0 for each in (self.w_w_IM, self.w_iuq_OR))
        fits = self.norm_R.shape == (R,) and self.w_iuq_OR.shape == (rows, R) and self.w_w_IM.shape == (heads, M)
        if self.w_dq_RM.shape != (R, M) or not fits or 0 in (R, M, heads, rows):
            raise ValueError(
                f"W_DQ {tuple(self.w_dq_RM.shape)}, norm {tuple(self.norm_R.shape)}, W_IUQ "
                f"{tuple(self.w_iuq_OR.shape)} and W_w {tuple(self.w_w_IM.shape)} do not fit together"
            )
        if rows % heads:
            raise ValueError(f"W_IUQ has {rows} rows, which {heads} heads do not divide")
        if self.key_dim & (self.key_dim - 1):
            raise ValueError(f"keys of {self.key_dim} entries have no Hadamard matrix of this kind: a power of two is")

    @property
    def heads(self) -> int:
        """I."""
        return self.w_w_IM.shape[0]

    @property
    def key_dim(self) -> int:
        """E."""
        return self.w_iuq_OR.shape[0] // self.heads

    @property
    def matrices(self) -> tuple[torch.Tensor, ...]:
        """What is multiplied with: everything but the bias."""
        return self.w_dq_RM, self.norm_R, self.w_iuq_OR, self.w_w_IM

    def to(self, device: torch.device) -> "QueryWeights":
        """Return the weights on a device."""
        return QueryWeights(
            w_dq_RM=self.w_dq_RM.to(device), norm_R=self.norm_R.to(device), w_iuq_OR=self.w_iuq_OR.to(device),
            w_w_IM=self.w_w_IM.to(device), bias=self.bias.to(device),
        )  # fmt: skip

    @property
    def n_bytes(self) -> int:
        """Bytes of the four matrices."""
        return sum(matrix.nbytes for matrix in self.matrices)

    def queries(
        self, hidden_XM: torch.Tensor, cos_XP: torch.Tensor, sin_XP: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries [X, I, E], rotated and turned, and head weights [X, I] with both scales in them; fp32.

        Args:
            hidden_XM: entering attention (normed, streams collapsed).
            cos_XP, sin_XP: of each hidden state's position, one a rotating pair.
        """
        h = hidden_XM.float()
        low_XR = h @ self.w_dq_RM.T
        low_XR = low_XR * torch.rsqrt(low_XR.square().mean(-1, keepdim=True) + NORM_EPS) * self.norm_R
        up_XO = low_XR @ self.w_iuq_OR.T
        q_XIE = up_XO.view(*up_XO.shape[:-1], self.heads, self.key_dim)
        q_XIE = hadamard(rotate_last(q_XIE, cos_XP.float(), sin_XP.float()))
        return q_XIE, h @ self.w_w_IM.T * (self.heads * self.key_dim) ** -0.5

    def logits(
        self, hidden_XM: torch.Tensor, cos_XP: torch.Tensor, sin_XP: torch.Tensor, k_nE: torch.Tensor,
        revive: float = 0.0,
    ) -> torch.Tensor:  # fmt: skip
        """Return the score of every entry for every query before the sigmoid, [X, n] in fp32.

        Args:
            k_nE: turned keys as they come back from fp8.
            revive: gradient of products below zero, see ``rectified``.
        """
        q_XIE, w_XI = self.queries(hidden_XM, cos_XP, sin_XP)
        X, n_heads, E = q_XIE.shape
        block = max(1, _BLOCK_PRODUCTS // max(1, X * n_heads))
        parts = [
            torch.einsum("xi,xin->xn", w_XI, rectified(q_XIE.reshape(-1, E) @ k.T, revive).view(X, n_heads, -1))
            for k in torch.split(k_nE.float(), block)
        ]
        return self.bias + torch.cat(parts, 1)


class EntryLayer(nn.Module):
    """A layer's query side as it is trained. The memory side is the model's own key of an entry, and stays."""

    def __init__(self, *, hidden_size: int, rank: int, heads: int, key_dim: int) -> None:
        super().__init__()

        def drawn(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)

        self.w_dq = drawn(rank, hidden_size)
        self.norm = nn.Parameter(torch.ones(rank))
        self.w_iuq = drawn(heads * key_dim, rank)
        self.w_w = drawn(heads, hidden_size)
        self.bias = nn.Parameter(torch.zeros(()))
        self.revive = 0.0

    def weights(self) -> QueryWeights:
        """Return the parameters by the names of the paper; gradients pass."""
        return QueryWeights(
            w_dq_RM=self.w_dq, norm_R=self.norm, w_iuq_OR=self.w_iuq, w_w_IM=self.w_w, bias=self.bias
        )  # fmt: skip

    @torch.no_grad()
    def take(self, weights: QueryWeights) -> None:
        """Set the parameters to those of an indexer of the same sizes.

        Raises:
            ValueError: it has others.
        """
        for mine, theirs in zip((self.w_dq, self.norm, self.w_iuq, self.w_w), weights.matrices, strict=True):
            if mine.shape != theirs.shape:
                raise ValueError(f"weights of {tuple(theirs.shape)} do not fit {tuple(mine.shape)}")
            mine.copy_(theirs)
        self.bias.copy_(weights.bias)

    @torch.no_grad()
    def rescale(self, scale: float, *, bias: float) -> None:
        """Divide every score by ``scale``, and set what is added to it."""
        self.w_w.div_(scale)
        self.bias.fill_(bias)

    def memory(self, k_nE: torch.Tensor) -> torch.Tensor:
        """Return what is rounded to fp8 of the model's own keys [n, E]."""
        return hadamard(k_nE.float())

    def logits(
        self, hidden_XM: torch.Tensor, k_nE: torch.Tensor, angles_X2P: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the score of every entry for every query before the sigmoid, [X, n] in fp32.

        Args:
            angles_X2P: cosine and sine of each state's position.

        Raises:
            ValueError: no angles were given.
        """
        if angles_X2P is None:
            raise ValueError("queries over compressed entries rotate with their position")
        return self.weights().logits(hidden_XM, angles_X2P[:, 0], angles_X2P[:, 1], k_nE, self.revive)


def rotate_last(x_XIE: torch.Tensor, cos_XP: torch.Tensor, sin_XP: torch.Tensor) -> torch.Tensor:
    """Rotate the last 2P entries of each head, pair by neighbouring pair; the others stay. X may be any sizes."""
    cos, sin = cos_XP.unsqueeze(-2), sin_XP.unsqueeze(-2)
    n = 2 * cos.shape[-1]
    still, turning = x_XIE[..., : x_XIE.shape[-1] - n], x_XIE[..., x_XIE.shape[-1] - n :]
    even, odd = turning[..., ::2], turning[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((still, turned), -1)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Multiply the last dimension (a power of two) by the orthonormal Hadamard matrix of Sylvester's construction."""
    size = x.shape[-1]
    shape, width = x.shape, 1
    while width < size:
        x = x.reshape(*shape[:-1], -1, 2, width)
        x = torch.stack((x[..., 0, :] + x[..., 1, :], x[..., 0, :] - x[..., 1, :]), -2).reshape(shape)
        width *= 2
    scaled: torch.Tensor = x * size**-0.5
    return scaled
