"""Replicas of a training step, spread over the processes of ``torchrun`` (one a GPU) or all in one process.

What is trained depends on the number of replicas alone: a run made on two GPUs repeats on one, in twice the time.
"""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

# A process that dies must not leave the others waiting for the session's end; compilation takes under a minute.
TIMEOUT = timedelta(seconds=180)


class Replicas:
    """This process's share of the replicas of a step.

    Attributes:
        total: replicas of a step.
        mine: those this process computes.
        rank, world: this process among all.
    """

    def __init__(self, total: int) -> None:
        """Join the other processes, where there are any.

        Raises:
            ValueError: the replicas cannot be dealt out evenly.
        """
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if total % self.world:
            raise ValueError(f"{total} replicas cannot be spread evenly over {self.world} processes")
        self.total = total
        share = total // self.world
        self.mine = tuple(range(self.rank * share, (self.rank + 1) * share))
        if self.world > 1:
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)

    @property
    def leads(self) -> bool:
        """Whether this process writes the log and the checkpoints."""
        return self.rank == 0

    @torch.no_grad()
    def average(self, gradients: Sequence[torch.Tensor], flag: bool) -> torch.Tensor | None:
        """Turn sums over this process's replicas into means over all, in place.

        Returns:
            How many processes raised their flag, as a tensor on the device; None where there is one process.
        """
        if self.world == 1:
            if self.total > 1:
                torch._foreach_div_(list(gradients), self.total)
            return None
        raised = torch.full((1,), float(flag), device=gradients[0].device)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), raised])
        dist.all_reduce(flat)
        parts = torch.split(flat, [*(gradient.numel() for gradient in gradients), 1])
        torch._foreach_copy_(list(gradients), [part.view_as(g) for part, g in zip(parts[:-1], gradients, strict=True)])
        torch._foreach_div_(list(gradients), self.total)
        flags: torch.Tensor = parts[-1]
        return flags

    def agreed(self, value: int) -> int:
        """Return the first process's value in all of them."""
        if self.world == 1:
            return value
        box: list[int] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Wait for every process."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """Part from the other processes."""
        if self.world > 1:
            dist.destroy_process_group()
