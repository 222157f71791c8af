"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for hidden matrices, AdamW for the rest.

Own code rather than ``torch.optim.Muon``: equal shapes are orthogonalised as one batch. A small model's step is bound
by kernel launches, and one matrix at a time would cost as much as the rest of the step.
"""

from collections.abc import Iterable

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95


def orthogonalised(batch_NRC: torch.Tensor, *, steps: int = 5) -> torch.Tensor:
    """Return matrices with nearly the singular vectors of the input and singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    tall = batch_NRC.shape[-2] > batch_NRC.shape[-1]
    dtype = torch.bfloat16 if batch_NRC.is_cuda else torch.float32
    x: torch.Tensor = (batch_NRC.mT if tall else batch_NRC).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(batch_NRC.dtype)


class Muon:
    """Momentum, orthogonalised and scaled.

    Nesterov's momentum; the scale gives an update the root mean square of AdamW's (arXiv 2502.16982, equation 4).
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, weight_decay: float) -> None:
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self.groups = list(by_shape.values())
        self.momenta = [torch.stack([torch.zeros_like(p) for p in group]) for group in self.groups]
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradients = torch.stack([p.grad for p in group if p.grad is not None])
            momentum.lerp_(gradients, 1 - MOMENTUM)
            update = orthogonalised(gradients.lerp_(momentum, MOMENTUM))
            scale = 0.2 * max(update.shape[-2:]) ** 0.5
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-lr * scale)
