"""Nothing that is not finite becomes a token, a score or a row: the cell fails where NaN or infinity is read.

What is checked is added up on the device and read with what a step reads anyway, so that nothing waits for it.

Shapes: n sequences, V vocabulary, M hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    checks = [logits_nV.isfinite().all(), *(total.isfinite() for total in sums)]
    read = torch.cat([tokens_n, torch.stack(checks).to(tokens_n.dtype)]).tolist()
    tokens, finite = read[: len(tokens_n)], read[len(tokens_n) :]
    if not all(finite):
        what, where = "scores that the method chooses by", ""
        if not finite[0]:
            what, where = "the model's logits", session.first_not_finite(tokens)
        advice = _advice(logits_nV.dtype)
        raise NotFinite(f"at decode step {step} {what} are not finite (NaN or infinity){where}{advice}.")
    return tokens_n, tokens


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
    found = torch.stack([torch.stack(list(each)) for each in totals.values()]).isfinite().tolist()
    for layer, finite in zip(totals, found, strict=True):
        for name, is_finite in zip(names, finite, strict=True):
            if not is_finite:
                raise NotFinite(f"{name} of layer {layer} is not finite (NaN or infinity){_advice(dtype)}.")


def _advice(dtype: torch.dtype) -> str:
    return "; float16 ends at 65,504: try --dtype bfloat16" if dtype == torch.float16 else ""
