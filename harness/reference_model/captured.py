"""Training steps as CUDA graphs: forward and backward of a batch shape are launched at once.

A small model's step is some thousand kernels of a few microseconds, and launching each takes longer than running it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvscope.harness.reference_model.data import Batch

NOT_SCORED = -100
"""Target of a place that no position of a batch fills; cross entropy leaves it out."""
_WARM_UPS = 3
_ROUND = 512

Run = Callable[[], tuple[torch.Tensor, torch.Tensor]]
AnswerLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Ids [B, T], scored positions [N] and targets [N] on the device -> the loss, and which targets are predicted [N]."""


def recorded(run: Run, pool: Any) -> tuple[Callable[[], object], tuple[torch.Tensor, torch.Tensor]]:
    """Return what launches ``run`` again, and the tensors that its results are in each time."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):  # compilation, and the workspaces of libraries
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads (the one that pins batches) go on with their work meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        results = run()
    return graph.replay, results


@dataclass
class _Step:
    launch: Callable[[], object]
    ids_BT: torch.Tensor
    at_N: torch.Tensor
    targets_N: torch.Tensor
    loss: torch.Tensor
    right_N: torch.Tensor


def room_for(scored: int) -> int:
    """Return the scored positions that a graph is captured for, where its first batch has so many."""
    return -(-scored * 5 // (4 * _ROUND)) * _ROUND


class CapturedSteps:
    """The captured steps of one model, one for each batch shape; they share their memory.

    Gradients are added to ``.grad``, as a backward pass does. It must stay the same tensor as long as this lives: zero
    it in place.
    """

    def __init__(
        self, answer_loss: AnswerLoss, parameters: Sequence[torch.nn.Parameter], *, record: Any = recorded
    ) -> None:
        self.answer_loss, self.record = answer_loss, record
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.steps: dict[torch.Size, _Step] = {}
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def gradients(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradients of one batch; returns its loss, and which of its scored tokens are right [N].

        Raises:
            RuntimeError: the step has an operation that cannot be captured; gradients are as before.
        """
        n = len(batch.at_N)
        step = self.steps.get(batch.ids_BT.shape)
        if step is None or len(step.at_N) < n:
            step = self._capture(batch)
        self._fill(step, batch)
        step.launch()
        return step.loss.clone(), step.right_N[:n].clone()

    @staticmethod
    def _fill(step: _Step, batch: Batch) -> None:
        n = len(batch.at_N)
        step.ids_BT.copy_(batch.ids_BT, non_blocking=True)
        step.at_N[:n].copy_(batch.at_N, non_blocking=True)
        step.targets_N[:n].copy_(batch.targets_N, non_blocking=True)
        step.targets_N[n:].fill_(NOT_SCORED)

    def _capture(self, batch: Batch) -> _Step:
        device = self.parameters[0].device
        at_N = torch.zeros(room_for(len(batch.at_N)), dtype=torch.long, device=device)
        nothing = torch.zeros((), device=device)
        step = _Step(lambda: None, torch.zeros_like(batch.ids_BT, device=device), at_N, at_N.clone(), nothing, nothing)
        self._fill(step, batch)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            loss, right_N = self.answer_loss(step.ids_BT, step.at_N, step.targets_N)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach(), right_N

        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        before = [gradient.clone() for gradient in gradients]
        try:
            step.launch, (step.loss, step.right_N) = self.record(run, self.pool)
        finally:
            torch._foreach_copy_(gradients, before)
        self.steps[batch.ids_BT.shape] = step
        return step
