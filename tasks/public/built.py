"""Prompts of public benchmarks: text around a context whose place is told in tokens, cut in its middle if need be."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvscope.errors import UsageError
from kvscope.tasks.assembled import Assembled
from kvscope.tasks.base import Tokenizer
from kvscope.tasks.measured import Places

_MOST_CUTS = 32


class Parts(NamedTuple):
    """A prompt as text.

    Attributes:
        head, context, tail: what stands before the context, the context, and the question behind it.
        evidence: ``(start, end)`` character spans in the context that the answer needs.
    """

    head: str
    context: str
    tail: str
    evidence: Sequence[tuple[int, int]] = ()

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.head + self.context + self.tail


class Built(NamedTuple):
    """A prompt as tokens.

    Attributes:
        assembled: ids, text and the context's place.
        evidence: token spans of the evidence.
        truncated_tokens: tokens of the whole prompt that were left out of its middle.
    """

    assembled: Assembled
    evidence: list[tuple[int, int]]
    truncated_tokens: int


def encoded(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the ids of a prompt, special tokens included."""
    return tuple(tokenizer(text, add_special_tokens=True)["input_ids"])


def built(tokenizer: Tokenizer, parts: Parts, *, room_tokens: int, cuts: bool, what: str) -> Built:
    """Return a prompt of at most ``room_tokens``.

    Args:
        cuts: whether a longer one loses the middle of its context, so that as many tokens of its beginning stay as of
            its end (LongBench's rule); else it is refused.
        what: names the prompt in errors.

    Raises:
        UsageError: it is longer and is not to be cut, or has no context left.
    """
    ids = encoded(tokenizer, parts.text)
    whole_tokens = len(ids)
    if whole_tokens > room_tokens:
        if not cuts:
            raise UsageError(
                f"{what} has {whole_tokens:,} tokens, and {room_tokens:,} fit beside its answer: use a larger --length."
            )
        parts, ids = _cut(tokenizer, parts, room_tokens=room_tokens, what=what)
    places = Places(tokenizer, parts.text, ids)
    body_start = len(parts.head)
    evidence = [(places.first(body_start + a), places.behind(body_start + b)) for a, b in parts.evidence]
    question = min(places.behind(body_start + len(parts.context)), len(ids) - 1)
    made = Assembled(ids, parts.text, [], places.first(body_start), question)
    return Built(made, evidence, max(0, whole_tokens - len(ids)))


def _cut(tokenizer: Tokenizer, parts: Parts, *, room_tokens: int, what: str) -> tuple[Parts, tuple[int, ...]]:
    """Take tokens out of the middle of the context until the prompt fits; joined ends may make another token."""
    context_ids: Any = tokenizer(parts.context, add_special_tokens=False)["input_ids"]
    surplus = len(encoded(tokenizer, parts.text)) - room_tokens
    before_tokens = len(encoded(tokenizer, parts.head))
    for _ in range(_MOST_CUTS):
        keep_before = max(0, room_tokens // 2 - before_tokens)
        keep_behind = len(context_ids) - surplus - keep_before
        if keep_behind < 0:
            keep_before, keep_behind = max(0, keep_before + keep_behind), 0
        if keep_before + keep_behind <= 0:
            break
        behind = context_ids[len(context_ids) - keep_behind :]
        context = tokenizer.decode(context_ids[:keep_before]) + tokenizer.decode(behind)
        shorter = parts._replace(context=context, evidence=())
        ids = encoded(tokenizer, shorter.text)
        if len(ids) <= room_tokens:
            return shorter, ids
        surplus += len(ids) - room_tokens
    raise UsageError(f"{what}: {room_tokens:,} tokens leave no room for its context: use a larger --length.")
