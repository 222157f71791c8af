"""Copying chunks from a mirror into slots in plain torch: the oracle of the backends, and what runs on a CPU.

Shapes: N host pages of P tokens, S slots of U tokens (U divides P), H KV heads, D head size.
"""

import torch


def host_gather_reference(
    mirror: torch.Tensor, slots: torch.Tensor, chunks: torch.Tensor, chunk_slots: torch.Tensor, *, units_per_chunk: int
) -> None:
    """Copy chunk ``chunks[i]`` into slot ``chunk_slots[i]``. Arguments as ``HostGather``."""
    N, H, _, P, D = mirror.shape
    U = slots.shape[3]
    part = torch.arange(units_per_chunk)
    source = (chunks.cpu().long()[:, None] * units_per_chunk + part).flatten()
    target = (chunk_slots.cpu().long()[:, None] * units_per_chunk + part).flatten()
    units = mirror.view(N, H, 2, P // U, U, D)
    slots[target.to(slots.device)] = units[source // (P // U), :, :, source % (P // U)].to(slots.device)
