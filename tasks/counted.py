"""Prompts of an exact length whose body is words to be counted, so nothing may be cut out of it or padded into it.

The body is made as large as fits; what is left is one line of filler behind it. Words are encoded once each and put
together, and the whole is checked against one encoding of the finished text; where a tokenizer joins words or lines,
that encoding is the prompt (``kvscope.tasks.measured``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvscope.tasks.assembled import Assembled
from kvscope.tasks.assembly import PieceEncoder, trimmed_line
from kvscope.tasks.base import Tokenizer
from kvscope.tasks.measured import Draft, check_words_kept, fit

_MOST_TRIES = 64
# A body this near to the room is large enough: every further try would put it together anew.
_CLOSE_TOKENS = 32


@dataclass(frozen=True)
class Body:
    """Lines of words.

    Attributes:
        lines: words of each line, joined by single spaces; every line ends with a newline.
        evidence: the words whose every occurrence is evidence.
    """

    lines: list[list[str]]
    evidence: frozenset[str]


@dataclass
class _Sizer:
    """Encodes words by where they stand, each once."""

    encoder: PieceEncoder
    inner: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def learn(self, words: set[str]) -> None:
        missing = sorted(word for word in words if word not in self.inner)
        found = self.encoder.inner([" " + word for word in missing])
        self.inner.update((word, found[" " + word]) for word in missing)

    def encode(self, body: Body) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the body's ids and the span of every evidence word."""
        self.learn({word for words in body.lines for word in words[1:-1]})
        ends = {words[-1] for words in body.lines if len(words) > 1}
        last = self.encoder.inner([f" {word}\n" for word in sorted(ends)])
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for words in body.lines:
            alone = len(words) == 1
            for index, word in enumerate(words):
                start = len(ids)
                if index == 0:
                    ids += self.encoder.line(word + "\n" if alone else word, keep=True)
                elif index == len(words) - 1:
                    ids += last[f" {word}\n"]
                else:
                    ids += self.inner[word]
                if word in body.evidence:
                    spans.append((start, len(ids)))
        return ids, spans


def assemble_counted(
    tokenizer: Tokenizer,
    *,
    what: str,
    head: str,
    body: Callable[[int], Body],
    least: int,
    trim_words: Sequence[str],
    tail: str,
    prompt_tokens: int,
) -> Assembled:
    """Join ``head``, a body as large as fits, a line of filler and ``tail`` into exactly ``prompt_tokens`` tokens.

    Args:
        what: names the task in errors.
        head: first piece, ends with a newline.
        body: makes a body of a size; its tokens grow with the size.
        least: smallest size that is a proper sample.
        trim_words: words of the filler line.
        tail: last piece (the question), does not end with a newline.

    Returns:
        The prompt; ``line_spans`` are the spans of the evidence words.

    Raises:
        UsageError: the smallest body does not fit, or a tokenizer that does not keep the prompt's words.
    """
    encoder = PieceEncoder(tokenizer)
    sizer = _Sizer(encoder)
    head_ids, tail_ids = encoder.head(head), encoder.line(tail)
    room = prompt_tokens - len(head_ids) - len(tail_ids)

    size, made = least, body(least)
    ids, spans = sizer.encode(made)
    beyond: int | None = None  # smallest size known not to fit
    rate = len(ids) / max(least, 1)  # tokens a unit of size
    while room - len(ids) > _CLOSE_TOKENS and (beyond is None or beyond - size > 1):
        step = max(1, int((room - len(ids)) / rate))
        at = size + step if beyond is None else min(size + step, beyond - 1)
        tried = body(at)
        tried_ids, tried_spans = sizer.encode(tried)
        rate = max((len(tried_ids) - len(ids)) / (at - size), 0.1)
        if len(tried_ids) > room:
            beyond = at
        else:
            size, made, ids, spans = at, tried, tried_ids, tried_spans

    last = ""
    for _ in range(_MOST_TRIES):
        if len(ids) >= room:
            break
        found = trimmed_line(encoder, trim_words, room - len(ids))
        if found is not None:
            last = found
            break
        size -= 1
        if size < least:
            break
        made = body(size)
        ids, spans = sizer.encode(made)
    last_ids = encoder.line(last) if last else ()
    if len(ids) + len(last_ids) == room:
        text = head + "".join(" ".join(words) + "\n" for words in made.lines) + last + tail
        start = len(head_ids)
        ids_out = (*head_ids, *ids, *last_ids, *tail_ids)
        if list(tokenizer(text, add_special_tokens=True)["input_ids"]) == list(ids_out):
            check_words_kept(tokenizer, text, ids_out, what)
            shifted = [(start + a, start + b) for a, b in spans]
            return Assembled(ids_out, text, shifted, start, len(ids_out) - len(tail_ids))
    return fit(
        tokenizer,
        what=what,
        draft=lambda size, last: _draft(body(size), head=head, last=last, tail=tail),
        size=max(size, least),
        least=least,
        trim_words=trim_words,
        prompt_tokens=prompt_tokens,
    )


def _draft(body: Body, *, head: str, last: str, tail: str) -> Draft:
    parts, at = [head], len(head)
    spans: list[tuple[int, int]] = []
    for words in body.lines:
        for index, word in enumerate(words):
            # The space before a word is the word's, and the newline the last word's, as where pieces are encoded.
            part = ("" if index == 0 else " ") + word + ("\n" if index == len(words) - 1 else "")
            if word in body.evidence:
                spans.append((at, at + len(part)))
            parts.append(part)
            at += len(part)
    return Draft("".join([*parts, last, tail]), spans, len(head), at + len(last))
