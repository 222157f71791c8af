"""Training text as token ids, put together from pre-tokenized pieces (the tokenizer itself would be the bottleneck)."""

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from kvscope.harness.reference_model.templates import FILLERS, TYPES
from kvscope.harness.reference_model.tokenizer import SPECIAL_TOKENS
from kvscope.tasks.draws import Draws
from kvscope.tasks.words import words

Ids = list[int]


class Op(NamedTuple):
    """One part of a parsed template: fixed ids, or a slot with the space before it."""

    slot: str  # "" for fixed ids
    lead: str
    ids: tuple[int, ...]


class Pieces:
    """Pre-tokenized words, numbers, UUIDs and templates of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        # A row asks for the same marks again and again, and for every line of a document twice.
        self._encoded = lru_cache(maxsize=50_000)(self._encode)
        self.vocab_tokens = len(tokenizer)
        lists = words("train")
        self.adjectives, self.nouns = lists.adjectives, lists.nouns
        self.word_ids = {
            lead: {word: tuple(self.ids_of(lead + word)) for word in (*self.adjectives, *self.nouns)}
            for lead in ("", " ", "-")
        }
        self.groups = {
            f"{n:0{width}d}": self.ids_of(f"{n:0{width}d}")[0] for width in (1, 2, 3) for n in range(10**width)
        }
        self.hex_pairs = [self.encode(f"{n:02x}-0000")[0] for n in range(256)]
        self.dash = self.encode("-0000-0000")[0]
        self.space = self.encode(" ")[0]
        marks = set(self.groups.values()) | set(self.hex_pairs)
        # Tokens random keys are made of: pieces of words with their leading space or dash, or inside a word.
        pattern = re.compile(r"[ -]?[a-z]+")
        self.open_tokens = [
            i for i in range(len(tokenizer)) if i not in marks and pattern.fullmatch(tokenizer.decode([i]))
        ]

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokenize a string as it stands in the middle of a text; the most recent are kept."""
        return self._encoded(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def ids_of(self, text: str) -> Ids:
        """Tokenize a text that will not come again; a third of ``encode``'s time, and nothing is kept."""
        ids: Ids = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def any_token(self, draws: Draws) -> int:
        """Draw any token but the special ones."""
        low = len(SPECIAL_TOKENS)
        return low + draws.below(self.vocab_tokens - low)

    def word(self, word: str, lead: str) -> tuple[int, ...]:
        """Return a training-split word with what stands before it ('', ' ' or '-')."""
        return self.word_ids[lead][word]

    def number(self, digits: str, lead: str) -> Ids:
        """Return a number in groups of three digits from the left."""
        ids = [self.space] if lead else []
        ids += [self.groups[digits[i : i + 3]] for i in range(0, len(digits), 3)]
        return ids

    def uuid(self, draws: Draws, lead: str) -> Ids:
        """Return a random UUID: pairs of hex digits and dashes."""
        pairs = [draws.below(256) for _ in range(16)]
        pairs[6] = 0x40 | (pairs[6] & 0x0F)
        pairs[8] = 0x80 | (pairs[8] & 0x3F)
        h, d = [self.hex_pairs[p] for p in pairs], self.dash
        return [*([self.space] if lead else []), *h[:4], d, *h[4:6], d, *h[6:8], d, *h[8:10], d, *h[10:]]

    @cache  # noqa: B019  one object lives as long as its worker
    def parse(self, template: str, kind: str) -> tuple[Op, ...]:
        """Split a template into fixed ids and slots; ``{type}`` is filled here."""
        text = template.replace("{type}", kind)
        parts = re.split(r"( ?)\{(\w+)\}", text)
        ops: list[Op] = []
        for i in range(0, len(parts), 3):
            if parts[i]:
                ops.append(Op("", "", self.encode(parts[i])))
            if i + 2 < len(parts):
                ops.append(Op(parts[i + 2], parts[i + 1], ()))
        return tuple(ops)

    def render(self, template: str, draws: Draws, *, kind: str, fill: dict[str, "Slot"]) -> Ids:
        """Fill a template; ``{a}``, ``{b}`` and nouns are drawn, the other slots come from ``fill``."""
        ids: Ids = []
        for op in self.parse(template, kind):
            if not op.slot:
                ids.extend(op.ids)
            elif op.slot in fill:
                ids.extend(fill[op.slot].with_lead(op.lead))
            elif op.slot in ("a", "b"):
                ids.extend(self.word(draws.pick(self.adjectives), op.lead))
            else:
                ids.extend(self.word(draws.pick(self.nouns), op.lead))
        return ids

    def filler_line(self, draws: Draws) -> Ids:
        """Return a line of training prose."""
        ids: Ids = []
        for k in range(draws.between(1, 3)):
            pattern = draws.pick(FILLERS)
            ids += self.render(pattern if k == 0 else " " + pattern, draws, kind=TYPES[0], fill={})
        # ".\n" and "?\n" are one token each or two; encode the end as the tokenizer would.
        last = self._tokenizer.decode([ids.pop()])
        ids += self.encode(last + "\n")
        return ids


class Slot(NamedTuple):
    """A key or value in its three spellings: at a line's start, after a space, after a dash."""

    bare: Ids
    spaced: Ids

    def with_lead(self, lead: str) -> Ids:
        """Return the ids for the given lead."""
        return self.spaced if lead else self.bare


def listing(pieces: Pieces, keys: Sequence[Slot]) -> Slot:
    """Return ``k1, k2, and k3`` as one slot."""
    comma, comma_and = pieces.encode(","), pieces.encode(", and")
    spaced: Ids = []
    for i, key in enumerate(keys):
        if i:
            spaced += comma_and if i == len(keys) - 1 else comma
        spaced += key.spaced
    return Slot(keys[0].bare + spaced[len(keys[0].spaced) :], spaced)
