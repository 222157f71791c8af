"""Prompts of an exact length, built from lines that tokenize the same alone and in place.

Every piece ends with a newline and the next starts after it. Most tokenizers split there, so a prompt's ids are the
pieces' ids one after another and only the last filler line must be trimmed to reach an exact length. The finished
prompt is checked against one encoding of the whole text. Where a tokenizer joins tokens across lines, that encoding is
the prompt, and its length is reached by measuring it (``kvscope.tasks.measured``).
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

from kvscope.tasks.assembled import Assembled
from kvscope.tasks.base import Tokenizer
from kvscope.tasks.measured import Draft, check_words_kept, fit

# Pieces are encoded behind this line: some tokenizers treat the start of a text specially.
_ANCHOR = "Here.\n"
_INNER_ANCHOR = "Here"
_PAD = "a"
_PAD_WORDS = 16
_MAX_CACHED_PIECES = 20_000
_CACHES: WeakKeyDictionary[Tokenizer, dict[str, tuple[int, ...]]] = WeakKeyDictionary()


class PieceEncoder:
    """Encodes lines as they stand in the middle of a text, with a cache per tokenizer.

    Where a tokenizer joins a piece with what stands before it, the ids are an estimate: those that the piece changes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._cache = _CACHES.setdefault(tokenizer, {})
        self._library: Any = None
        self._anchor = self._encode(_ANCHOR)
        self._library = _library(tokenizer, self._anchor)

    def _encode(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        if self._library is not None and not special:
            return tuple(self._library.encode(text, add_special_tokens=False).ids)
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def line(self, text: str, *, keep: bool = False) -> tuple[int, ...]:
        """Return the ids of one piece; ``keep`` caches them (for pieces that recur)."""
        ids = self._cache.get(text)
        if ids is not None:
            return ids
        ids = _behind(self._anchor, self._encode(_ANCHOR + text))
        if keep and len(self._cache) < _MAX_CACHED_PIECES:
            self._cache[text] = ids
        return ids

    def inner(self, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Return the ids of pieces that begin with a space and stand inside a line, after a word or a full stop.

        In one batch, uncached: a numbered list has as many different pieces as entries.
        """
        if not texts:
            return {}
        base = self._encode(_INNER_ANCHOR)
        wholes = self.tokenizer([_INNER_ANCHOR + text for text in texts], add_special_tokens=False)["input_ids"]
        return {text: _behind(base, tuple(whole)) for text, whole in zip(texts, wholes, strict=True)}

    def head(self, text: str) -> tuple[int, ...]:
        """Return the ids of the first piece as it stands before a line, special tokens included.

        GPT-2's way of splitting makes one token of two line breaks that end a text, and two of those before a word.
        """
        whole = self._encode(text + _ANCHOR, special=True)
        before, anchor = whole[: -len(self._anchor)], whole[-len(self._anchor) :]
        return before if anchor == self._anchor else self._encode(text, special=True)


def _library(tokenizer: Tokenizer, anchor: tuple[int, ...]) -> Any:
    """Return what encodes below a tokenizer of transformers, if it answers the same; None where there is none.

    A prompt of 16K tokens has hundreds of lines, and a call of the tokenizer takes six times what the encoding does.
    """
    found = getattr(tokenizer, "backend_tokenizer", None)
    if found is None or found.truncation is not None or found.padding is not None:
        return None
    return found if tuple(found.encode(_ANCHOR, add_special_tokens=False).ids) == anchor else None


def _behind(before: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ids of ``whole`` behind what it has in common with ``before``."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
    return whole[same:]


def trimmed_line(encoder: PieceEncoder, words: Sequence[str], tokens: int) -> str | None:
    """Return a filler line of exactly ``tokens`` tokens made from the first words of ``words``, or None.

    Where words take several tokens, a cut may miss the length by a few: repeats of a short word make them up.
    """

    def size_of(line: str) -> int:
        return len(encoder.line(line, keep=True))

    pad_tokens = size_of(f"{_PAD} {_PAD}\n") - size_of(f"{_PAD}\n")
    cuts: list[tuple[str, int]] = []
    for count in range(1, len(words) + 1):
        text = " ".join(words[:count])
        missing = tokens - size_of(text + "\n")
        if missing == 0:
            return text + "\n"
        if missing < 0:
            break
        cuts.append((text, missing))
    for text, missing in reversed(cuts[-_PAD_WORDS:]):
        repeats, rest = divmod(missing, pad_tokens)
        line = text + f" {_PAD}" * repeats + "\n"
        if rest == 0 and repeats <= _PAD_WORDS and size_of(line) == tokens:
            return line
    return None


def assemble(
    tokenizer: Tokenizer,
    *,
    what: str,
    head: str,
    lines: Sequence[str],
    place: Callable[[int], Sequence[int]],
    fillers: Callable[[int], str],
    trim_words: Sequence[str],
    tail: str,
    prompt_tokens: int,
) -> Assembled:
    """Join ``head``, filler with ``lines`` among it, and ``tail`` into exactly ``prompt_tokens`` tokens.

    Args:
        what: names the task in errors.
        head: first piece, ends with a newline.
        lines: the pieces that must be in the prompt (needles), each ends with a newline.
        place: given the number of filler lines, returns for each needle the number of filler lines before it.
        fillers: the i-th filler line, ends with a newline.
        trim_words: words of a filler text from which the last, shorter line is cut.
        tail: last piece (the question), does not end with a newline.

    Raises:
        UsageError: too short for head, lines and tail, or a tokenizer that does not keep the prompt's words.
    """
    encoder = PieceEncoder(tokenizer)
    head_ids, tail_ids = encoder.head(head), encoder.line(tail)
    line_ids = [encoder.line(line) for line in lines]
    room = prompt_tokens - len(head_ids) - len(tail_ids) - sum(map(len, line_ids))
    drawn: list[str] = []
    filler_ids: list[tuple[int, ...]] = []
    while True:
        drawn.append(fillers(len(drawn)))
        ids = encoder.line(drawn[-1], keep=True)
        if len(ids) > room:
            break
        filler_ids.append(ids)
        room -= len(ids)
    most = len(filler_ids)
    last: str | None = "" if room >= 0 else None
    while room > 0:
        last = trimmed_line(encoder, trim_words, room)
        if last is not None or not filler_ids:
            break
        room += len(filler_ids.pop())

    def layout(count: int) -> list[int | None]:
        """Return what stands between head and tail: a needle by its index, None for the next filler line."""
        before = place(count)
        found: list[int | None] = []
        done = 0
        for index in sorted(range(len(lines)), key=lambda i: (before[i], i)):
            found += [None] * (before[index] - done)
            done = max(done, before[index])
            found.append(index)
        return found + [None] * (count - done)

    if last is not None:
        ids_out, texts = list(head_ids), [head]
        spans = [(0, 0)] * len(lines)
        done = 0
        for index in layout(len(filler_ids)):
            start = len(ids_out)
            if index is None:
                ids_out.extend(filler_ids[done])
                texts.append(drawn[done])
                done += 1
            else:
                ids_out.extend(line_ids[index])
                texts.append(lines[index])
                spans[index] = (start, len(ids_out))
        if last:
            ids_out.extend(encoder.line(last))
            texts.append(last)
        body_end = len(ids_out)
        ids_out.extend(tail_ids)
        text = "".join([*texts, tail])
        if list(tokenizer(text, add_special_tokens=True)["input_ids"]) == ids_out:
            check_words_kept(tokenizer, text, ids_out, what)
            return Assembled(tuple(ids_out), text, spans, len(head_ids), body_end)

    def draft(count: int, last: str) -> Draft:
        while len(drawn) < count:
            drawn.append(fillers(len(drawn)))
        parts, at, done = [head], len(head), 0
        spans = [(0, 0)] * len(lines)
        for index in layout(count):
            part = drawn[done] if index is None else lines[index]
            if index is None:
                done += 1
            else:
                spans[index] = (at, at + len(part))
            parts.append(part)
            at += len(part)
        return Draft("".join([*parts, last, tail]), spans, len(head), at + len(last))

    return fit(
        tokenizer, what=what, draft=draft, size=most, least=0, trim_words=trim_words, prompt_tokens=prompt_tokens
    )
