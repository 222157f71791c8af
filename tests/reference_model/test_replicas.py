"""A step of several replicas: the same training in one process as in two."""

import os
import socket
from pathlib import Path

import fresh
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.reference_model.architecture import reference_config
from kvscope.harness.reference_model.curriculum import Phase, Shape
from kvscope.harness.reference_model.data import PhaseData
from kvscope.harness.reference_model.pieces import Pieces
from kvscope.harness.reference_model.replicas import Replicas
from kvscope.harness.reference_model.row_maker import RowMaker
from kvscope.harness.reference_model.train import train

RUN = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from test_replicas import train_tiny
train_tiny(Path(sys.argv[1]), replicas=int(sys.argv[2]))
"""


def train_tiny(out: Path, *, replicas: int) -> None:
    shapes = (Shape(tokens=64, rows=2, questions=2),)
    # Without a warm-up of many steps: the weights have to move by more than the comparison lets pass.
    phase = Phase(name="tiny", shapes=shapes, steps=3, lr=(1e-2, 1e-2), copy_share=1.0, warmup_steps=1)
    train(out=out, phases=(phase,), seed=3, replicas=replicas, config=reference_config(layers=2, hidden=128))


def trained(out: Path, *, world: int, replicas: int) -> dict[str, torch.Tensor]:
    """Train in this process, or in as many as there are in the world."""
    out.mkdir()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(REFERENCE_MODEL_FOLDER)
    tokenizer.save_pretrained(out)
    if world == 1:
        train_tiny(out, replicas=replicas)
    else:
        train_in_processes(out, world=world, replicas=replicas)
    weights: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    return weights


def train_in_processes(out: Path, *, world: int, replicas: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        fresh.start(["-c", RUN, str(out), str(replicas), str(Path(__file__).parent)], env={**shared, "RANK": str(rank)})
        for rank in range(world)
    ]
    ended = [process.wait() for process in running]
    assert [process.returncode for process in ended] == [0] * world, ended[0].stderr


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    # Checkpoints are bf16: one unit in the last place where the order of a sum decides.
    return torch.allclose(one, two, atol=1e-4, rtol=1e-2)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", world=1, replicas=2)
    two = trained(tmp_path / "two", world=2, replicas=2)
    assert [name for name in one if not close(one[name], two[name])] == []
    logs = [(tmp_path / name / "train_log.jsonl").read_text(encoding="utf-8").splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1])
    half = trained(tmp_path / "half", world=1, replicas=1)  # what a process would learn that heard of no other
    assert [name for name in one if close(one[name], half[name])] == []


def test_replicas_have_rows_of_their_own_wherever_they_run() -> None:
    maker = RowMaker(Pieces(PreTrainedTokenizerFast.from_pretrained(REFERENCE_MODEL_FOLDER)))
    shapes = (Shape(tokens=64, rows=2, questions=2), Shape(tokens=96, rows=1, questions=2))
    phase = Phase(name="p", shapes=shapes, steps=4, lr=(1e-3, 1e-3))
    both = PhaseData(maker, phase, seed=0, replicas=(0, 1))
    first, second = (PhaseData(maker, phase, seed=0, replicas=(replica,)) for replica in (0, 1))
    assert len(both) == 8
    assert len(first) == 4
    for step in range(4):
        assert torch.equal(both[2 * step].ids_BT, first[step].ids_BT)
        assert torch.equal(both[2 * step + 1].ids_BT, second[step].ids_BT)
        assert first[step].ids_BT.shape == second[step].ids_BT.shape
        assert not torch.equal(first[step].ids_BT, second[step].ids_BT)


def test_sums_become_means() -> None:
    gradients = [torch.full((2, 3), 6.0), torch.full((4,), 3.0)]
    assert Replicas(3).average(gradients, False) is None
    assert torch.equal(gradients[0], torch.full((2, 3), 2.0))
    assert torch.equal(gradients[1], torch.ones(4))


def test_replicas_that_cannot_be_dealt_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="3 replicas cannot be spread evenly over 2 processes"):
        Replicas(3)
