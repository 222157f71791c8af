"""Prompts of an exact length for any tokenizer: the whole text is encoded, and filler is chosen by what that measures.

Tokenizers join what stands next to each other: a blank line with the line break before it, a digit with a newline, or
anything with anything where they split nowhere. Then no sum of pieces is a prompt's length. Here the one encoding of
the finished text is the prompt, and a last line of filler is sought that brings it to the length asked for.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from kvscope.errors import UsageError
from kvscope.tasks.assembled import Assembled
from kvscope.tasks.base import Tokenizer

_MOST_TRIES = 64
_MOST_CORRECTIONS = 4
# What stands this near to the last line decides how it is tokenized, but for tokenizers that split nowhere.
_CONTEXT_CHARACTERS = 200
# Each behind a cut line, up to _MOST_PADS times: where one of them takes two tokens, another takes one.
_PADS = (" a", ".", " 1", "-", " z")
_MOST_PADS, _MOST_STARTS = 16, 4


class Draft(NamedTuple):
    """A prompt as text.

    Attributes:
        text: the whole prompt.
        spans: ``(start, end)`` character span of every stretch whose tokens are asked for.
        body_start, body_end: character span of the haystack, the last line of filler included.
    """

    text: str
    spans: list[tuple[int, int]]
    body_start: int
    body_end: int


def fit(
    tokenizer: Tokenizer,
    *,
    what: str,
    draft: Callable[[int, str], Draft],
    size: int,
    least: int,
    trim_words: Sequence[str],
    prompt_tokens: int,
) -> Assembled:
    """Return a prompt of exactly ``prompt_tokens`` tokens, by encoding whole texts.

    Args:
        what: names the task in errors.
        draft: makes the text of a size and a last filler line (empty: none); its tokens grow with the size.
        size: a size that may be near to the one sought.
        least: smallest size that is a proper sample.
        trim_words: words from which the last line is made.

    Raises:
        UsageError: the smallest size is too long, no last line gives the length, or the tokenizer does not keep the
            prompt's words.
    """

    def tokens_of(size: int, last: str = "") -> int:
        return len(_encoded(tokenizer, draft(size, last).text))

    largest = _largest_size(tokens_of, size=size, least=least, prompt_tokens=prompt_tokens)
    if largest is None:
        raise UsageError(
            f"{what}: a prompt of {prompt_tokens} tokens is too small, its instruction, its question and what must "
            f"stand between them take {tokens_of(least)}: use a larger --length."
        )
    for at in range(largest, max(least, largest - _MOST_TRIES) - 1, -1):
        gap = prompt_tokens - tokens_of(at)
        if gap == 0:
            return _finish(tokenizer, draft(at, ""), what)
        if gap < 0:
            continue
        lines = _LastLines(tokenizer, draft(at, ""), trim_words)
        wanted = gap
        for _ in range(_MOST_CORRECTIONS):
            last = lines.of(wanted)
            if last is None:
                break
            missing = prompt_tokens - tokens_of(at, last)
            if missing == 0:
                return _finish(tokenizer, draft(at, last), what)
            wanted += missing
    raise UsageError(
        f"{what}: the tokenizer of {tokenizer.name_or_path} has no filler that makes a prompt of exactly "
        f"{prompt_tokens} tokens: use another --length."
    )


def check_words_kept(tokenizer: Tokenizer, text: str, ids: Sequence[int], what: str) -> None:
    """Refuse a tokenizer that does not give back what the prompt says; its spaces and capitals may change.

    Raises:
        UsageError: it does not.
    """
    back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if back != text and _bare(back) != _bare(text):
        raise UsageError(
            f"{what}: the tokenizer of {tokenizer.name_or_path} does not give back the words of the prompt (unknown "
            "tokens in their place?), so nothing can be asked about them: use another model."
        )


def _bare(text: str) -> str:
    return "".join(text.casefold().split())


def _encoded(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    ids: Sequence[int] = tokenizer(text, add_special_tokens=True)["input_ids"]
    return ids


def _largest_size(tokens_of: Callable[[int], int], *, size: int, least: int, prompt_tokens: int) -> int | None:
    """Return the largest size found whose text fits; None where the least does not."""
    fits: int | None = None
    beyond: int | None = None  # smallest size known not to fit
    at, rate = size, prompt_tokens / max(size, 1)
    previous: tuple[int, int] | None = None
    for _ in range(_MOST_TRIES):
        tokens = tokens_of(at)
        if previous is not None and previous[0] != at:
            rate = (tokens - previous[1]) / (at - previous[0])
        rate, previous = max(rate, 0.1), (at, tokens)
        missing = prompt_tokens - tokens
        if missing < 0:
            if at <= least:
                return None
            beyond = at
            at = max(least if fits is None else fits + 1, at - max(1, int(-missing / rate)))
        else:
            fits = at
            if missing == 0:
                break
            at += max(1, int(missing / rate))
            at = at if beyond is None else min(at, beyond - 1)
        if fits is not None and beyond is not None and beyond - fits <= 1:
            break
    return fits


class _LastLines:
    """Last lines of filler by the tokens each adds where it stands."""

    def __init__(self, tokenizer: Tokenizer, draft: Draft, words: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        end = draft.body_end
        self._before = draft.text[max(0, end - _CONTEXT_CHARACTERS) : end]
        self._after = draft.text[end : end + _CONTEXT_CHARACTERS]
        self._cuts = [" ".join(words[:count]) for count in range(1, len(words) + 1)]
        self._padded = False
        self._alone = self._sizes([""])[0]
        self._found: dict[int, str] = {}
        self._cut_sizes = self._learn(self._cuts)

    def of(self, tokens: int) -> str | None:
        """Return a line that adds ``tokens`` tokens, with its newline; None where none is known."""
        if tokens not in self._found and not self._padded:
            self._padded = True
            near = [cut for cut, size in zip(self._cuts, self._cut_sizes, strict=True) if size < tokens]
            for pad in _PADS:
                starts = ["", *near[-_MOST_STARTS:]]
                self._learn([start + pad * count for start in starts for count in range(1, _MOST_PADS + 1)])
                if tokens in self._found:
                    break
        return self._found.get(tokens)

    def _learn(self, lines: Sequence[str]) -> list[int]:
        sizes = [size - self._alone for size in self._sizes([line + "\n" for line in lines])]
        for line, size in zip(lines, sizes, strict=True):
            self._found.setdefault(size, line.lstrip() + "\n")
        return sizes

    def _sizes(self, lines: Sequence[str]) -> list[int]:
        texts = [self._before + line + self._after for line in lines]
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _finish(tokenizer: Tokenizer, draft: Draft, what: str) -> Assembled:
    """Return the prompt with the token spans of its parts."""
    ids = tuple(_encoded(tokenizer, draft.text))
    places = Places(tokenizer, draft.text, ids)
    # Without special tokens, and what a chat template says around the text.
    check_words_kept(tokenizer, draft.text, ids[places.first(0) : places.behind(len(draft.text))], what)
    spans = [(places.first(start), places.behind(end)) for start, end in draft.spans]
    # A token that joins the haystack's end with the question is the haystack's: evidence may end there.
    question = min(places.behind(draft.body_end), len(ids) - 1)
    return Assembled(ids, draft.text, spans, places.first(draft.body_start), question)


class Places:
    """Which tokens stand where in a text.

    By the offsets that a tokenizer gives. One in Python or of SentencePiece itself gives none: there, characters other
    than white space are counted in what each token decodes to, which is exact where a character has one token or less.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, ids: tuple[int, ...]) -> None:
        self._text = text
        self._exact = bool(getattr(tokenizer, "is_fast", False))
        if self._exact:
            made: Any = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)["offset_mapping"]
            self._starts, self._ends = list(_rising(start for start, _ in made)), list(_rising(end for _, end in made))
        else:
            spoken = (tokenizer.decode([id], skip_special_tokens=True) for id in ids)
            self._ends = list(accumulate(len(_bare(part)) for part in spoken))
            self._starts = [0, *self._ends[:-1]]

    def first(self, at: int) -> int:
        """Return the first token that holds the character ``at``, or stands behind it."""
        return bisect_right(self._ends, self._place(at))

    def behind(self, at: int) -> int:
        """Return the first token that begins at the character ``at`` or behind it."""
        return bisect_left(self._starts, self._place(at))

    def characters(self, first: int, behind: int) -> tuple[int, int]:
        """Return where the tokens from ``first`` to before ``behind`` stand: (first character, the one behind)."""
        start, end = self._starts[first], self._ends[behind - 1]
        if self._exact:
            return start, end
        at = [place for place, character in enumerate(self._text) if _bare(character)]
        return at[start], at[end - 1] + 1

    def _place(self, at: int) -> int:
        return at if self._exact else len(_bare(self._text[:at]))


def _rising(places: Iterator[int]) -> Iterator[int]:
    """Yield places that never fall: special tokens stand at 0 wherever they are."""
    most = 0
    for place in places:
        most = max(most, place)
        yield most
