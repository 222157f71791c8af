"""What an architecture is to the trainer: its shape, its training forward, and what each phase trains.

Shapes: B rows, T tokens, M hidden size, N scored positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvscope.errors import UsageError
from kvscope.harness.reference_model.curriculum import Phase
from kvscope.harness.reference_model.data import Batch

Losses = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
"""A batch -> its loss, and how right each of its scored tokens is [N], between 0 and 1."""


class Backbone(ABC):
    """An architecture that can be trained here.

    Attributes:
        name: as ``kvscope backbone train --architecture`` names it.
        phases: in their order.
        stock_attention: attention implementation of the stock classes in a saved checkpoint.
        check_tolerance: relative norm by which training's forward may miss the stock model's, under autocast.
        optimizer: ``muon`` or ``adamw``, for the matrices of the layers; everything else has AdamW.
        captured: whether steps for answers are launched as CUDA graphs; nothing in them may wait for the device then.
    """

    name: str
    phases: tuple[Phase, ...]
    stock_attention: str
    check_tolerance = 0.1
    optimizer = "muon"
    captured = False

    @abstractmethod
    def config(self) -> PreTrainedConfig:
        """Return the configuration of the model that is trained by default."""

    @abstractmethod
    def build(self, config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
        """Return a freshly initialised fp32 model with training's attention."""

    @abstractmethod
    def compile(self, model: PreTrainedModel) -> None:
        """Compile what a step consists of, in place."""

    @abstractmethod
    def entering(self, base: Any, ids_BT: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return what the first layer is given, and the keywords that every layer is given."""

    def leaving(self, base: Any, x: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return [B, T, M] before the final norm, from what the last layer gives."""
        del base, ids_BT
        return x

    def leaving_at(self, base: Any, x: torch.Tensor, at_N: torch.Tensor) -> torch.Tensor:
        """Return [N, M] before the final norm at some flat positions (row * T + column) alone."""
        del base
        return x.flatten(0, 1)[at_N]

    def by_muon(self, name: str, parameter: torch.nn.Parameter) -> bool:
        """Say whether Muon may update a parameter: the matrices of the layers."""
        return parameter.dim() >= 2 and "layers." in name

    def saved_in_fp32(self, name: str) -> bool:
        """Say whether a parameter stays in fp32 in a saved checkpoint, which is bf16 otherwise."""
        del name
        return False

    def trains(self, name: str, objective: str) -> bool:
        """Say whether a parameter is trained under an objective."""
        del name, objective
        return True

    def begin(self, model: PreTrainedModel, phase: Phase) -> None:
        """Bring a model into a phase's mode.

        Raises:
            UsageError: the phase's objective is none of this architecture's.
        """
        del model
        if phase.objective != "answers":
            raise UsageError(f"Phase {phase.name!r} trains for {phase.objective!r}, which {self.name} has no part for.")

    def measure(self, objective: str) -> str:
        """Name what an objective's losses say of each scored token, as the log has it."""
        del objective
        return "token_accuracy"

    def losses(self, model: PreTrainedModel, phase: Phase, answers: Losses) -> Losses:
        """Return a phase's losses; ``answers`` is cross entropy over the scored tokens."""
        del model, phase
        return answers
