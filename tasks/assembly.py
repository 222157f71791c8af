"""Prompts of an exact length, built from lines that tokenize the same alone and in place.

Every piece ends with a newline and the next starts after it. Tokenizers split there, so a prompt's ids are the
pieces' ids one after another and only the last filler line must be trimmed to reach an exact length. The finished
prompt is checked against one encoding of the whole text, so a tokenizer for which this does not hold is refused.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from kvscope.errors import UsageError
from kvscope.tasks.base import Sample, Task, Tokenizer, text_sha256

# Pieces are encoded behind this line: some tokenizers treat the start of a text specially.
_ANCHOR = "Here.\n"
_INNER_ANCHOR = "Here"
_PAD = "a"
_PAD_WORDS = 16
_MAX_CACHED_PIECES = 20_000
_CACHES: WeakKeyDictionary[Tokenizer, dict[str, tuple[int, ...]]] = WeakKeyDictionary()


class Assembled(NamedTuple):
    """A finished prompt.

    Attributes:
        ids: token ids, special tokens included.
        text: the same as text.
        line_spans: ``(start, end)`` token span of every body line that was placed.
        body_start, body_end: token span of the haystack; the question starts where it ends.
    """

    ids: tuple[int, ...]
    text: str
    line_spans: list[tuple[int, int]]
    body_start: int
    body_end: int

    def depth(self, evidence: Sequence[tuple[int, int]]) -> float | None:
        """Return the mean start of the evidence as a fraction of the haystack; None without evidence."""
        if not evidence:
            return None
        tokens = self.body_end - self.body_start
        return sum(start - self.body_start for start, _ in evidence) / len(evidence) / tokens

    def sample(
        self,
        task: Task,
        *,
        question_type: str,
        length_tokens: int,
        sample: int,
        seed: int,
        evidence: Sequence[tuple[int, int]],
        targets: Sequence[str],
        stop: tuple[str, ...] = ("\n",),
    ) -> Sample:
        """Return the sample that asks this prompt; every task's samples are made here.

        Args:
            task: whose name and answer room the sample takes.
            question_type, length_tokens, sample, seed, targets, stop: as in ``Sample``.
            evidence: token spans that the answer needs, ascending.
        """
        return Sample(
            task=task.name,
            question_type=question_type,
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            ids=self.ids,
            text=self.text,
            question_start=self.body_end,
            evidence_spans=tuple(evidence),
            depth=self.depth(evidence),
            prompt_sha256=text_sha256(self.text),
            targets=tuple(targets),
            max_new_tokens=task.max_new_tokens,
            stop=stop,
        )


class PieceEncoder:
    """Encodes lines as they stand in the middle of a text, with a cache per tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._cache = _CACHES.setdefault(tokenizer, {})
        self._anchor = self._encode(_ANCHOR)

    def _encode(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def line(self, text: str, *, keep: bool = False) -> tuple[int, ...]:
        """Return the ids of one piece; ``keep`` caches them (for pieces that recur)."""
        ids = self._cache.get(text)
        if ids is not None:
            return ids
        whole = self._encode(_ANCHOR + text)
        if whole[: len(self._anchor)] != self._anchor:
            raise UsageError(
                f"The tokenizer of {self.tokenizer.name_or_path} joins tokens across a line break, so prompts of an "
                "exact length cannot be built for it: use another model."
            )
        ids = whole[len(self._anchor) :]
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
        found = {}
        for text, whole in zip(texts, wholes, strict=True):
            if tuple(whole[: len(base)]) != base:
                raise UsageError(
                    f"The tokenizer of {self.tokenizer.name_or_path} joins tokens across spaces, so word lists of an "
                    "exact length cannot be built for it: use another model."
                )
            found[text] = tuple(whole[len(base) :])
        return found

    def head(self, text: str) -> tuple[int, ...]:
        """Return the ids of the first piece, special tokens included."""
        return self._encode(text, special=True)


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
        UsageError: too short for head, lines and tail, or a tokenizer whose text does not round-trip.
    """
    encoder = PieceEncoder(tokenizer)
    head_ids, tail_ids = encoder.head(head), encoder.line(tail)
    line_ids = [encoder.line(line) for line in lines]
    room = prompt_tokens - len(head_ids) - len(tail_ids) - sum(map(len, line_ids))
    if room < 0:
        raise UsageError(
            f"{what}: a prompt of {prompt_tokens} tokens is too small, its instruction, needles and question alone "
            f"take {prompt_tokens - room}: use a larger --length."
        )
    filler_text: list[str] = []
    filler_ids: list[tuple[int, ...]] = []
    while True:
        text = fillers(len(filler_text))
        ids = encoder.line(text, keep=True)
        if len(ids) > room:
            break
        filler_text.append(text)
        filler_ids.append(ids)
        room -= len(ids)
    last = ""
    while room:
        found = trimmed_line(encoder, trim_words, room)
        if found is not None:
            last = found
            break
        if not filler_ids:
            raise UsageError(
                f"{what}: no filler of exactly {room} tokens exists for this tokenizer at a prompt of "
                f"{prompt_tokens} tokens: use a larger --length."
            )
        room += len(filler_ids.pop())
        filler_text.pop()

    before = place(len(filler_text))
    order = sorted(range(len(lines)), key=lambda i: (before[i], i))
    ids_out: list[int] = list(head_ids)
    texts = [head]
    spans: list[tuple[int, int]] = [(0, 0)] * len(lines)
    done = 0
    for index in order:
        for k in range(done, before[index]):
            ids_out.extend(filler_ids[k])
            texts.append(filler_text[k])
        done = before[index]
        spans[index] = (len(ids_out), len(ids_out) + len(line_ids[index]))
        ids_out.extend(line_ids[index])
        texts.append(lines[index])
    for k in range(done, len(filler_text)):
        ids_out.extend(filler_ids[k])
        texts.append(filler_text[k])
    if last:
        ids_out.extend(encoder.line(last))
        texts.append(last)
    body_end = len(ids_out)
    ids_out.extend(tail_ids)
    texts.append(tail)
    text = "".join(texts)
    check_round_trip(tokenizer, text, ids_out, what)
    return Assembled(tuple(ids_out), text, spans, len(head_ids), body_end)


def check_round_trip(tokenizer: Tokenizer, text: str, ids: Sequence[int], what: str) -> None:
    """Refuse a tokenizer for which text and ids are not the same prompt."""
    whole = tokenizer(text, add_special_tokens=True)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if list(whole) != list(ids) or back != text:
        raise UsageError(
            f"{what}: the tokenizer of {tokenizer.name_or_path} does not give the same tokens for a text and for its "
            "lines, so a prompt of an exact length cannot be built for it: use another model."
        )
