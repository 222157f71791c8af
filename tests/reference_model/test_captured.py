"""Captured steps give the gradients of plain ones, whatever a batch's number of scored positions."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_v4 import loud_model, recall_batches

from kvscope.harness.reference_model.captured import CapturedSteps, room_for
from kvscope.harness.reference_model.data import Batch
from kvscope.harness.reference_model.trainer import Trainer
from kvscope.harness.reference_model.v4.architecture import DeepseekV4

RECALL = {"tokens": 64, "rows": 8, "words": 40, "seed": 1}
Run = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def run_again(run: Run, pool: object) -> tuple[Run, tuple[torch.Tensor, torch.Tensor]]:
    """Stand in for a graph: the same tensors are filled anew, with no look at anything but them."""
    del pool
    results = run()

    def again() -> tuple[torch.Tensor, torch.Tensor]:
        for held, new in zip(results, run(), strict=True):
            held.copy_(new)
        return results

    return again, results


def two_trainers(folder: Path, device: str, record: Any) -> tuple[Trainer, CapturedSteps]:
    trainers = [
        Trainer(loud_model(), device=torch.device(device), out=folder, compile_layers=device == "cuda",
                backbone=DeepseekV4())
        for _ in range(2)
    ]  # fmt: skip
    plain, other = trainers
    plain._capture = False
    return plain, CapturedSteps(other._answer_loss, list(other.model.parameters()), record=record)


def compare(plain: Trainer, steps: CapturedSteps, batches: list[Batch], *, tolerance: float) -> None:
    for batch in batches:
        loss, right_N = steps.gradients(batch)
        wanted_loss, wanted_N = plain.gradients(batch)
        torch.testing.assert_close(loss, wanted_loss, atol=0, rtol=tolerance)
        assert right_N.shape == wanted_N.shape
        assert (right_N == wanted_N).float().mean() > 1 - 10 * tolerance
    wanted = [parameter.grad for parameter in plain.model.parameters() if parameter.requires_grad]
    for found, other in zip(steps.parameters, wanted, strict=True):
        torch.testing.assert_close(found.grad, other, atol=tolerance * other.norm().item() + 1e-7, rtol=0)


def batches_of(questions: tuple[int, ...]) -> list[Batch]:
    return [next(recall_batches(**RECALL, questions=each)) for each in questions]


def test_gradients_add_up_as_those_of_plain_steps_do(tmp_path: Path) -> None:
    plain, steps = two_trainers(tmp_path, "cpu", run_again)
    few, many = batches_of((4, 9))
    short = replace(few, ids_BT=few.ids_BT[:2], at_N=few.at_N[:8], targets_N=few.targets_N[:8])
    compare(plain, steps, [many, few, short], tolerance=1e-5)
    assert len(steps.steps) == 2, "one for each batch shape"


def test_a_batch_with_more_scored_positions_is_captured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvscope.harness.reference_model.captured._ROUND", 8)
    plain, steps = two_trainers(tmp_path, "cpu", run_again)
    few, many = batches_of((4, 9))
    assert room_for(len(few.at_N)) < len(many.at_N)
    compare(plain, steps, [few, many, few], tolerance=1e-5)
    assert len(steps.steps) == 1


def test_gradients_are_as_before_where_a_step_cannot_be_captured(tmp_path: Path) -> None:
    def broken(run: Run, pool: object) -> Any:
        del pool
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    _, steps = two_trainers(tmp_path, "cpu", broken)
    with pytest.raises(RuntimeError, match="not permitted"):
        steps.gradients(batches_of((4,))[0])
    assert not any(parameter.grad.any() for parameter in steps.parameters if parameter.grad is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_gives_the_gradients_of_plain_steps(tmp_path: Path) -> None:
    """Compiled pieces inside a CUDA graph; sums of both sides are rounded to bf16, in another order."""
    from kvscope.harness.reference_model.captured import recorded

    plain, steps = two_trainers(tmp_path, "cuda", recorded)
    few, many = batches_of((4, 9))
    compare(plain, steps, [many, few, many], tolerance=0.02)
