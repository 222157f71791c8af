"""The training loop of every kind of indexer: epochs over documents, AdamW, cosine, clipping, the best epoch kept."""

import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from kvscope.harness.indexers.lsa.objective import Place

WARMUP_SHARE = 0.05


class FitOptions(Protocol):
    """What the loop reads of a training configuration."""

    @property
    def epochs(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def batch_documents(self) -> int: ...
    @property
    def patience(self) -> int: ...
    @property
    def seed(self) -> int: ...


def fit(
    indexer: nn.Module,
    training: Sequence[Place],
    options: FitOptions,
    *,
    loss_of: Callable[[Place], torch.Tensor | None],
    measure: Callable[[], dict[str, Any]],
    save: Callable[[Path], None],
    text: Callable[[int, dict[str, Any], float], str],
    worth: Callable[[dict[str, Any]], float] = lambda measures: -float(measures["held_out_loss"]),
    folder: Path,
    say: Callable[..., None],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Train, and leave the weights of the best epoch in ``indexer``; return its measures.

    Args:
        loss_of: of one document; None when it teaches nothing.
        measure: held-out measures.
        worth: of an epoch with these measures; the one worth most is kept.
        save: writes a checkpoint to a folder.
        text: epoch, its fields and the seconds since the start, as one line.
        folder: checkpoints go to ``checkpoints/epoch-NN`` below it.
        say: takes fields for the log.
        note: takes lines for the user.
    """
    optimizer = torch.optim.AdamW(indexer.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    total = options.epochs * math.ceil(len(training) / options.batch_documents)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total))
    draws = random.Random(options.seed)
    started_s = time.perf_counter()
    best: dict[str, Any] | None = None
    since_best = 0
    for epoch in range(1, options.epochs + 1):
        loss = _run_epoch(
            indexer, training, options, optimizer=optimizer, schedule=schedule, draws=draws, loss_of=loss_of
        )
        indexer.eval()
        measures = measure()
        fields = {"epoch": epoch, "loss": round(loss, 5), **measures}
        elapsed_s = time.perf_counter() - started_s
        say(**fields, elapsed_s=round(elapsed_s, 2))
        note(text(epoch, fields, elapsed_s))
        save(folder / "checkpoints" / f"epoch-{epoch:02d}")
        if best is None or worth(measures) > worth(best):
            best, since_best = fields, 0
            weights = {name: value.clone() for name, value in indexer.state_dict().items()}
        else:
            since_best += 1
        if since_best >= options.patience:
            note(f"stopped: nothing gained on held-out documents for {since_best} epochs")
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
    options: FitOptions,
    *,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    draws: random.Random,
    loss_of: Callable[[Place], torch.Tensor | None],
) -> float:
    """Train one epoch; return the mean loss."""
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
    return sum(losses) / max(1, len(losses))
