"""Nothing that is not finite becomes a token, a score or a row: the cell fails where NaN or infinity is read.

What is checked is added up on the device and read with what a step reads anyway, so that nothing waits for it.

Shapes: n sequences, V vocabulary, M hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvscope.errors import KvscopeError

if TYPE_CHECKING:
    from kvscope.harness.engine.session import Session


class NotFinite(KvscopeError):  # noqa: N818 - it says what happened
    """NaN or infinity where a number is needed."""


def finite_tokens(session: Session, logits_nV: torch.Tensor, *, step: int) -> tuple[torch.Tensor, list[int]]:
    """Return the best token of every sequence, [n] on the device and as a list. Reading them waits for the device.

    Args:
        logits_nV: of the step just made.
        step: its number, for the message.

    Raises:
        NotFinite: logits, or scores that a method chose by, are not finite.
    """
    tokens_n = logits_nV.argmax(-1)
    sums = [total for member in session.members if (total := member.cache.scored()) is not None]
    checks = [logits_nV.isfinite().all(), *(total.isfinite().to(logits_nV.device) for total in sums)]
    read = torch.cat([tokens_n, torch.stack(checks).to(tokens_n.dtype)]).tolist()
    tokens, finite = read[: len(tokens_n)], read[len(tokens_n) :]
    if not all(finite):
        where = "" if finite[0] else session.first_not_finite(tokens)
        found = Best(tokens[0], 0.0, logits_are_finite=bool(finite[0]), scores_are_finite=all(finite[1:]))
        raise found.not_finite(step=step, where=where, dtype=logits_nV.dtype)
    return tokens_n, tokens


@dataclass(frozen=True)
class Best:
    """What a step gave one sequence.

    Attributes:
        token: the best one.
        gap: how far its logit is above the second best.
        logits_are_finite, scores_are_finite: of the model, and those that the method chose by.
    """

    token: int
    gap: float
    logits_are_finite: bool
    scores_are_finite: bool

    @property
    def is_finite(self) -> bool:
        """Whether the token may be taken."""
        return self.logits_are_finite and self.scores_are_finite

    def not_finite(self, *, step: int, where: str, dtype: torch.dtype) -> NotFinite:
        """Return the error of a sequence that may not go on.

        Args:
            step: its step, for the message.
            where: which layer, as a clause; empty where that is not known.
            dtype: of the logits.
        """
        what = "scores that the method chooses by" if self.logits_are_finite else "the model's logits"
        return NotFinite(f"at decode step {step} {what} are not finite (NaN or infinity){where}{_advice(dtype)}.")


def best_tokens(session: Session, logits_nV: torch.Tensor) -> list[Best]:
    """Return what a step gave each sequence, in the order of ``members``. Reading it waits for the device, once."""
    best_n1 = logits_nV.argmax(-1, keepdim=True)
    second_n = logits_nV.scatter(1, best_n1, -math.inf).amax(-1)
    sums_n = logits_nV.sum(-1, dtype=torch.float32)  # finite where all are, in one pass
    scores = [member.cache.scored() for member in session.members]
    columns = [
        best_n1[:, 0].double(),
        logits_nV.gather(1, best_n1)[:, 0].double() - second_n.double(),
        sums_n.isfinite().double(),
    ]
    asked = [total for total in scores if total is not None]
    finite = columns[0][:0]
    if asked:
        finite = torch.stack([total.isfinite().to(logits_nV.device) for total in asked]).double()
    read = torch.cat([*columns, finite]).tolist()
    n = len(scores)
    tokens, gaps, finite_logits, finite_scores = read[:n], read[n : 2 * n], read[2 * n : 3 * n], iter(read[3 * n :])
    return [
        Best(int(token), gap, bool(is_finite), total is None or bool(next(finite_scores)))
        for token, gap, is_finite, total in zip(tokens, gaps, finite_logits, scores, strict=True)
    ]


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Return a scalar that is finite where all of ``tensor`` is; nothing of the size of ``tensor`` is made."""
    return tensor.sum(dtype=torch.float32)


def require_finite_layers(
    totals: Mapping[int, Sequence[torch.Tensor]], names: Sequence[str], dtype: torch.dtype
) -> None:
    """Refuse a prefill that is not finite.

    Args:
        totals: layer -> the ``total`` of each named tensor, layers in order.
        names: of these tensors, for the message.
        dtype: of the model.

    Raises:
        NotFinite: naming the first layer and tensor.
    """
    if not totals:
        return
    device = next(iter(totals.values()))[0].device
    found = torch.stack([torch.stack(list(each)).to(device) for each in totals.values()]).isfinite().tolist()
    for layer, finite in zip(totals, found, strict=True):
        for name, is_finite in zip(names, finite, strict=True):
            if not is_finite:
                raise NotFinite(f"{name} of layer {layer} is not finite (NaN or infinity){_advice(dtype)}.")


def _advice(dtype: torch.dtype) -> str:
    return "; float16 ends at 65,504: try --dtype bfloat16" if dtype == torch.float16 else ""
