"""Batches of training rows: a batch depends on the seed, the phase, the step and the replica alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kvscope.harness.reference_model.curriculum import Phase
from kvscope.harness.reference_model.row_maker import RowMaker
from kvscope.tasks.draws import Draws

# A batch that takes longer will never come: the run ends with an error, and what it learnt is kept.
_LONGEST_WAIT_S = 120


@dataclass(frozen=True)
class Batch:
    """Rows of one step.

    Attributes:
        ids_BT: token ids.
        at_N: flat positions (row * T + column) whose next token is scored.
        targets_N: those next tokens.
        families: what each row is (``needles``, ``long_qa_2``, ...), for the log.
    """

    ids_BT: torch.Tensor
    at_N: torch.Tensor
    targets_N: torch.Tensor
    families: tuple[str, ...]


class PhaseData(Dataset[Batch]):
    """The batches of one phase from ``first_step`` on: one a step for each of this process's ``replicas``.

    A step's batches have one shape and different rows; how the replicas are spread over processes changes neither.
    """

    def __init__(
        self, maker: RowMaker, phase: Phase, *, seed: int, replicas: Sequence[int] = (0,), first_step: int = 0
    ) -> None:
        self.maker, self.phase, self.seed, self.replicas = maker, phase, seed, tuple(replicas)
        self.first_step = first_step

    def __len__(self) -> int:
        return (self.phase.steps - self.first_step) * len(self.replicas)

    def __getitem__(self, index: int) -> Batch:
        step, replica = self.first_step + index // len(self.replicas), self.replicas[index % len(self.replicas)]
        phase = self.phase
        shape = phase.shape_of(Draws("shape", self.seed, phase.name, step))
        ids = np.empty((shape.rows, shape.tokens), dtype=np.int64)
        at: list[int] = []
        families: list[str] = []
        for i in range(shape.rows):
            row = self.maker.make(phase, shape, Draws("train", self.seed, phase.name, step, replica * shape.rows + i))
            ids[i] = row.ids
            families.append(row.family)
            at.extend(i * shape.tokens + position for position in row.answer_at)
        at_N = np.asarray(at, dtype=np.int64)
        targets = ids.reshape(-1)[at_N + 1]
        return Batch(torch.from_numpy(ids), torch.from_numpy(at_N), torch.from_numpy(targets), tuple(families))


def batches(data: PhaseData, *, workers: int) -> "DataLoader[Batch]":
    """Return the batches in order, made by ``workers`` processes (0: in this one)."""
    return DataLoader(
        data,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=6 if workers else None,
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
        timeout=_LONGEST_WAIT_S if workers else 0,
    )
