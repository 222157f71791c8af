"""Tokens of a sample fed under a watched sequence, every step checked as a run checks it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvscope.harness.engine.finite import NotFinite, finite_tokens
from kvscope.harness.engine.session import Session
from kvscope.tasks.base import Sample


def feed(session: Session, tokens: Sequence[int]) -> None:
    """Feed tokens one by one.

    Raises:
        NotFinite: logits of a step, or scores that a method chose by.
    """
    for step, token in enumerate(tokens):
        finite_tokens(session, session.step([token]), step=step)


@contextmanager
def told_of(sample: Sample) -> Iterator[None]:
    """Say of which sample something is not finite."""
    try:
        yield
    except NotFinite as error:
        where = f"sample {sample.sample} of {sample.task} at {sample.length_tokens:,} tokens"
        raise NotFinite(f"Nothing can be said of {where}: {error}") from error
