"""What training has in common for every kind of indexer: its options, the loop over documents, and the log.

Epochs over documents, AdamW, a short warm-up and then a cosine, clipping, the best epoch on held-out documents kept.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvscope.errors import UsageError
from kvscope.files import TextFile, make_folder
from kvscope.harness.indexers.collection.places import Place
from kvscope.harness.indexers.collection.reading import Collection

LOG_FILE = "train_log.jsonl"
WARMUP_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train, whatever the indexer.

    Attributes:
        epochs: passes over the documents at most.
        lr, weight_decay, clip: AdamW, gradient norm.
        batch_documents, batch_rows: documents a step, and rows of each.
        heads, key_dim: sizes; None: by the model's.
        warm_start: begin at the model's own match of queries and keys, not at random weights.
        held_out: share of the documents kept for measuring; at least one.
        patience: epochs without gain on these before it stops.
        seed: of weights, order and draws.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    epochs: int
    lr: float
    weight_decay: float = 0.01
    clip: float = 1.0
    batch_documents: int = 4
    batch_rows: int = 32
    heads: int | None = None
    key_dim: int | None = None
    warm_start: bool = True
    held_out: float = 0.1
    patience: int
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        self.check_least(1, "epochs", "batch_documents", "batch_rows", "patience", "heads", "key_dim")
        if not 0 < self.held_out < 1:
            raise UsageError(f"held_out must lie between 0 and 1, both excluded, got {self.held_out}.")
        self.check_positive("lr", "clip")
        self.check_not_negative("weight_decay")

    def check_positive(self, *names: str) -> None:
        """Raise UsageError where an option is no number above 0, or none that is finite."""
        for name in names:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UsageError(f"{name} must be positive and finite, got {value}.")

    def check_not_negative(self, *names: str) -> None:
        """Raise UsageError where an option is below 0, or no finite number."""
        for name in names:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} must be 0 or more and finite, got {value}.")

    def check_least(self, least: int, *names: str) -> None:
        """Raise UsageError where an option that was given is below ``least``."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be {least} or more, got {value}.")


def train_epochs(
    indexer: nn.Module,
    training: Sequence[Place],
    options: TrainingOptions,
    *,
    loss_of: Callable[[Place], torch.Tensor | None],
    measure: Callable[[], dict[str, Any]],
    save: Callable[[Path], None],
    text: Callable[[dict[str, Any]], str],
    worth: Callable[[dict[str, Any]], float] = lambda measures: -float(measures["held_out_loss"]),
    folder: Path,
    say: Callable[..., None],
    note: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
    deadline_s: float = math.inf,
) -> dict[str, Any]:
    """Train, and leave the weights of the best epoch in ``indexer``; return its measures.

    Args:
        loss_of: of one document; None when it teaches nothing.
        measure: held-out measures.
        worth: of an epoch with these measures; the one worth most is kept.
        save: writes a checkpoint to a folder.
        text: held-out measures in one phrase.
        folder: checkpoints go to ``checkpoints/epoch-NN`` below it.
        say: takes fields for the log.
        note: takes lines for the user.
        clock: seconds from any beginning.
        deadline_s: by this clock: no epoch is begun that would likely end later, and one that does is cut short.
    """
    optimizer = torch.optim.AdamW(indexer.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    total = options.epochs * math.ceil(len(training) / options.batch_documents)
    draws = random.Random(options.seed)
    started_s = clock()

    def rate_at(step: int) -> float:
        if deadline_s == math.inf:
            return rate(step, total)
        # The rate reaches zero with the time, if that is over before the epochs are.
        past = (clock() - started_s) / max(1e-9, deadline_s - started_s)
        return rate(max(step, min(total, int(past * total))), total)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    best: dict[str, Any] | None = None
    since_best = 0
    for epoch in range(1, options.epochs + 1):
        loss = _run_epoch(
            indexer, training, options, optimizer=optimizer, schedule=schedule, draws=draws, loss_of=loss_of,
            goes_on=lambda: clock() < deadline_s,
        )  # fmt: skip
        indexer.eval()
        measures = measure()
        fields = {"epoch": epoch, "loss": round(loss, 5), **measures}
        elapsed_s = clock() - started_s
        say(**fields, elapsed_s=round(elapsed_s, 2))
        left_s = elapsed_s / epoch * (options.epochs - epoch)
        note(
            f"[{epoch}/{options.epochs}] loss {fields['loss']:.4f}, held-out {text(measures)} ({elapsed_s:.0f} s, "
            f"about {left_s:.0f} s left)"
        )
        save(folder / "checkpoints" / f"epoch-{epoch:02d}")
        if best is None or worth(measures) > worth(best):
            best, since_best = fields, 0
            weights = {name: value.clone() for name, value in indexer.state_dict().items()}
        else:
            since_best += 1
        if since_best >= options.patience:
            note(f"stopped: nothing gained on held-out documents for {since_best} epochs")
            break
        if epoch < options.epochs and started_s + elapsed_s * (epoch + 1) / epoch > deadline_s:
            note(f"stopped after epoch {epoch} of {options.epochs}: another would end behind the time for training")
            break
    assert best is not None
    indexer.load_state_dict(weights)
    return best


def rate(step: int, total: int) -> float:
    """Return the share of the learning rate at a step: a short warm-up, then a cosine to zero."""
    warmup = max(1, round(WARMUP_SHARE * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _run_epoch(
    indexer: nn.Module,
    training: Sequence[Place],
    options: TrainingOptions,
    *,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    draws: random.Random,
    loss_of: Callable[[Place], torch.Tensor | None],
    goes_on: Callable[[], bool],
) -> float:
    """Train one epoch, or a part of it where ``goes_on`` says no between two batches; return the mean loss."""
    indexer.train()
    order = list(training)
    draws.shuffle(order)
    losses = []
    for at in range(0, len(order), options.batch_documents):
        batch = order[at : at + options.batch_documents]
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for place in batch:
            loss = loss_of(place)
            if loss is None:
                continue
            (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(indexer.parameters(), options.clip)
        optimizer.step()
        schedule.step()
        losses.append(total / len(batch))
        if not goes_on():
            break
    return sum(losses) / max(1, len(losses))


@contextmanager
def training_log(folder: Path) -> Iterator[Callable[..., None]]:
    """Open the log of a training in a folder, which is made; what is yielded writes one line of fields at once.

    Raises:
        UsageError: the folder cannot be made, or the log not be opened.
        EnvironmentProblem: a line did not fit on the disk.
    """
    make_folder(folder)
    with TextFile(folder / LOG_FILE) as log:

        def say(**fields: Any) -> None:
            log.write(json.dumps(fields) + "\n")

        yield say


def opening_record(
    collections: Sequence[Collection],
    indexer: nn.Module,
    options: TrainingOptions,
    *,
    training: Sequence[Place],
    held_out: Sequence[Place],
) -> dict[str, Any]:
    """Return what the log says of a training before its first epoch."""
    return {
        "collections": [collection.id for collection in collections],
        "documents": len(training),
        "held_out": len(held_out),
        "weights": sum(p.numel() for p in indexer.parameters()),
        "config": asdict(options),
    }
