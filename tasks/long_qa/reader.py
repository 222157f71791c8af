"""A reader of evaluation's sentences: facts back out of the text, and answers from facts alone.

It shares the templates with the writer and nothing else: no world, no plan. What it answers from a haystack, the
haystack says; what it cannot answer from a part of one, that part does not say. No model is needed for either.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from kvscope.tasks.long_qa.lexicon import day_of_date
from kvscope.tasks.long_qa.questions import LETTERS
from kvscope.tasks.long_qa.templates import EVAL_WORDING as WORDING
from kvscope.tasks.long_qa.wording import FRAME, NOT_MENTIONED, ORDINALS, RELATIONS, TOPICS
from kvscope.tasks.long_qa.world import Fact, Kind

_NAME, _WORD = "[A-Z][a-z]+", "[A-Za-z]+"
_SLOTS = {
    **dict.fromkeys(("a", "n", "m", "e", "v", "i", "one", "two", "three", "four"), _WORD),
    "p": _NAME,
    "d": rf"\d+ {_NAME}",
    "w": rf"(?:the (?:{'|'.join(RELATIONS)}) of )*{_NAME}",
    "q": r"[A-Z][^?]*\?",
    "c": ".+?",
    "reply": ".+",
}
_ASSISTANT = "Assistant: "
Answer = tuple[str, ...]


class Line(NamedTuple):
    """A line (or a request and its reply) and what it says: a fact, nothing, or words the reader does not know."""

    text: str
    fact: Fact | None
    known: bool


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{p}>{_SLOTS[p]})" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


@cache
def _line_templates() -> list[tuple[Kind | None, str, str]]:
    """Return (kind, slot, template) of everything a line can say; None for headers and small talk."""
    found: list[tuple[Kind | None, str, str]] = []
    around: list[tuple[Kind, tuple[str, ...], dict[str, tuple[str, ...]]]] = [
        ("attribute", WORDING.plain, WORDING.clauses),
        ("changed", WORDING.changed, WORDING.clauses),
        ("dated", WORDING.dated, WORDING.clauses),
        ("relation", WORDING.plain, WORDING.relations),
    ]
    for kind, wrappers, table in around:
        for slot, clauses in table.items():
            found += [(kind, slot, wrapper.replace("{c}", c)) for c in clauses for wrapper in wrappers]
    found += [("appointment", "", text) for text in WORDING.appointments]
    found += [("visit", "", text) for text in WORDING.visits]
    found += [("trip", "", text) for text in WORDING.trips]
    found += [("advice", topic, text) for topic in TOPICS for text in WORDING.advice[topic]]
    found += [("reply", "", text + "{reply}\n") for text in WORDING.request]
    found += [(None, "", text) for text in (*WORDING.sessions, *WORDING.small_talk)]
    return found


@cache
def _line_patterns(first: str) -> list[tuple[Kind | None, str, Callable[[str], re.Match[str] | None]]]:
    """Return (kind, slot, match) of everything that a line of this first character can say."""
    return [
        (kind, slot, _pattern(template).fullmatch)
        for kind, slot, template in _line_templates()
        if template[0] in ("{", first)
    ]


def read_line(text: str) -> Line:
    """Read one line, newline included."""
    for kind, slot, fullmatch in _line_patterns(text[:1]):
        match = fullmatch(text)
        if match is None:
            continue
        if kind is None:
            return Line(text, None, known=True)
        said = match.groupdict()
        date = said.get("d", "")
        if kind == "reply":
            return Line(text, Fact(kind, "", said["v"], said["reply"]), known=True)
        if kind == "appointment":
            return Line(text, Fact(kind, said["p"], said["e"], date, date), known=True)
        return Line(text, Fact(kind, said["p"], slot, said["v"], date), known=True)
    return Line(text, None, known=False)


def read(text: str) -> Iterator[Line]:
    """Read the lines of a haystack; a reply belongs to the line before it."""
    lines = text.splitlines(keepends=True)
    i = 0
    while i < len(lines):
        taken = 2 if i + 1 < len(lines) and lines[i + 1].startswith(_ASSISTANT) else 1
        yield read_line("".join(lines[i : i + taken]))
        i += taken


def _match(templates: Sequence[str], text: str) -> dict[str, str] | None:
    for template in templates:
        match = _pattern(template).fullmatch(text)
        if match is not None:
            return match.groupdict()
    return None


class Reader:
    """Answers questions from facts, in the order they were said."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.facts = facts

    def _said(self, kind: str, person: str, slot: str) -> list[Fact]:
        return [f for f in self.facts if (f.kind, f.person, f.slot) == (kind, person, slot)]

    def _person(self, who: str) -> tuple[str | None, list[str]]:
        """Return the person of ``the boss of Mara`` and the persons on the way, that person included."""
        *relations, person = who.split(" of ")
        way: list[str] = []
        for relation in reversed(relations):
            said = self._said("relation", person, relation.removeprefix("the "))
            if not said:
                return None, way
            person = said[-1].value
            way.append(person)
        return person, way

    def _attribute(self, question: str, day: int | None = None) -> tuple[Answer, tuple[str, str] | None]:
        """Return (persons on the way and value, (person, slot)) of a plain question."""
        for slot, templates in WORDING.ask.items():
            found = _match(templates, question)
            if found is None:
                continue
            person, way = self._person(found["w"])
            if person is None:
                return (NOT_MENTIONED,), None
            now = [f for f in self.facts if f.kind in ("attribute", "changed") and (f.person, f.slot) == (person, slot)]
            dated = [f for f in self._said("dated", person, slot) if day is not None and day_of_date(f.date) <= day]
            said = dated or now
            return (*way, said[-1].value if said else NOT_MENTIONED), (person, slot)
        raise ValueError(f"The reader does not know the question {question!r}.")

    def answer(self, prompt: str) -> Answer:
        """Answer a prompt's last line.

        Raises:
            ValueError: the question is in none of evaluation's templates.
        """
        before, after = FRAME.split("{q}")
        question = prompt.removeprefix(before).removesuffix(after)
        for solve in (self._reply, self._choice, self._dates, self._visits, self._suggested, self._changes):
            found = solve(question)
            if found is not None:
                return found
        return self._attribute(question)[0]

    def _reply(self, question: str) -> Answer | None:
        found = _match(WORDING.repeat, question)
        if found is None:
            return None
        replies = [f.value for f in self.facts if f.kind == "reply" and f.slot == found["v"]]
        at = ORDINALS.index(found["i"])
        return (replies[at],) if at < len(replies) else (NOT_MENTIONED,)

    def _choice(self, question: str) -> Answer | None:
        found = _match(WORDING.choice, question)
        if found is None:
            return None
        value = self._attribute(found["q"])[0][-1]
        listed = [found["one"], found["two"], found["three"], found["four"]]
        return (value, LETTERS[listed.index(value)]) if value in listed else (NOT_MENTIONED,)

    def _dates(self, question: str) -> Answer | None:
        for templates, between in ((WORDING.order, False), (WORDING.between, True)):
            found = _match(templates, question)
            if found is None:
                continue
            said = [self._said("appointment", found["w"], found[name]) for name in ("one", "two")]
            if not all(said):
                return (NOT_MENTIONED,)
            dates = [facts[-1].date for facts in said]
            one, two = map(day_of_date, dates)
            if between:
                return (*dates, f"{abs(one - two)} days")
            return (*dates, dates[0 if one < two else 1], found["one" if one < two else "two"])
        return None

    def _visits(self, question: str) -> Answer | None:
        found = _match(WORDING.count, question)
        if found is not None:
            dates = [f.date for f in self._said("visit", found["w"], "") if f.value == found["v"]]
            return (*dates, f"{len(dates)} times")
        found = _match(WORDING.listing, question)
        if found is None:
            return None
        return tuple(dict.fromkeys(f.value for f in self._said("trip", found["w"], ""))) or (NOT_MENTIONED,)

    def _suggested(self, question: str) -> Answer | None:
        for topic, templates in WORDING.suggested.items():
            found = _match(templates, question)
            if found is not None:
                said = self._said("advice", found["w"], topic)
                return (said[-1].value if said else NOT_MENTIONED,)
        return None

    def _changes(self, question: str) -> Answer | None:
        found = _match((*WORDING.now, *WORDING.via_one, *WORDING.via_two), question)
        if found is not None:
            return self._attribute(found["q"])[0]
        found = _match(WORDING.as_of, question)
        if found is not None:
            final, key = self._attribute(found["q"], day_of_date(found["d"]))
            dated = self._said("dated", *key) if key else []
            return (dated[-1].date, *final) if dated else final
        found = _match(WORDING.note, question)
        if found is not None:
            note = read_line(WORDING.plain[0].format(c=found["c"]))
            return Reader([note.fact] if note.fact else []).answer(found["q"])
        return None
