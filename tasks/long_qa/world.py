"""The story's world: who there is, what holds for them, and what may still be said without giving an answer away.

Questions claim what they ask about; from then on filler is silent on it. Everything else filler says is remembered, so
that it repeats itself but never contradicts itself, whatever the length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.lexicon import date_text
from kvscope.tasks.long_qa.wording import ATTRIBUTES, CHANGING, RELATIONS, TOPICS

Kind = Literal["attribute", "changed", "dated", "relation", "appointment", "visit", "trip", "advice", "reply"]
Key = tuple[str, str]

DAYS = 365
_TRIES = 200
# (share, what filler speaks about); the rest is small talk.
_FILLER: tuple[tuple[float, str], ...] = (
    (0.46, "attribute"),
    (0.10, "relation"),
    (0.12, "appointment"),
    (0.08, "visit"),
    (0.06, "trip"),
    (0.06, "advice"),
)
_CHANGE_SHARE = 0.15


class WorldExhaustedError(Exception):
    """No person or value is left that nothing has been said about; a larger cast is needed."""


@dataclass(frozen=True)
class Fact:
    """One thing said in a session.

    Attributes:
        kind: which templates say it.
        person: whom it is about.
        slot: attribute, relation or topic; ``event`` of an appointment; ``visit`` and ``trip`` need none.
        value: what is said: a value, another person, the place, the town, or a reply's text.
        date: the day from which a dated change holds, or of the appointment or visit.
    """

    kind: Kind
    person: str
    slot: str
    value: str
    date: str = ""

    @property
    def key(self) -> Key:
        """What the fact speaks about."""
        return self.person, slot_key(self.kind, self.slot, self.value)


def slot_key(kind: str, slot: str, value: str) -> str:
    """Name what a fact of this kind speaks about; facts with the same person and key could contradict each other."""
    if kind == "visit":
        return f"visit {value}"
    if kind == "trip":
        return "trip"
    return slot if kind in ("attribute", "changed", "dated") else f"{kind} {slot}"


class World:
    """People, and what has been said or claimed about them.

    Args:
        people: the cast.
        lists: category -> values to draw from.
        unique: a value once drawn for a question is never used again (evaluation). Training reuses values.
        stepwise: visits have dates, and questions whose answer must be worked out ask for the steps. Without, as in
            the first training phases: a count is asked for outright (which no model of this size learned).
    """

    def __init__(
        self, people: Sequence[str], lists: Mapping[str, Sequence[str]], *, unique: bool, stepwise: bool = True
    ) -> None:
        self.people = people
        self.lists = lists
        self.unique = unique
        self.stepwise = stepwise
        self.claimed: set[Key] = set()
        self.barred: set[str] = set()
        self._known: dict[Key, str] = {}
        self._changed: set[Key] = set()

    # -- what questions are made of

    def claim(self, draws: Draws, *slots: str, unlike: Sequence[str] = ()) -> str:
        """Return a person about whom none of the slots has been spoken of, and claim them.

        Raises:
            WorldExhaustedError: nobody is free.
        """
        for _ in range(_TRIES):
            person = draws.pick(self.people)
            keys = [(person, slot) for slot in slots]
            if person not in unlike and not any(key in self.claimed or key in self._known for key in keys):
                self.claimed.update(keys)
                return person
        raise WorldExhaustedError

    def claim_of(self, person: str, slot: str) -> bool:
        """Claim a slot of a given person; False where it has been spoken of."""
        key = (person, slot)
        if key in self.claimed or key in self._known:
            return False
        self.claimed.add(key)
        return True

    def value(self, draws: Draws, category: str, *, unlike: Sequence[str] = ()) -> str:
        """Return a value for a question; filler will not use it where values are unique.

        Raises:
            WorldExhaustedError: every value is taken.
        """
        for _ in range(_TRIES):
            value = draws.pick(self.lists[category])
            if value not in unlike and value not in self.barred:
                if self.unique:
                    self.barred.add(value)
                return value
        raise WorldExhaustedError

    # -- what stands between

    def filler(self, draws: Draws) -> Fact | None:
        """Return a fact nobody asks about, or None for small talk."""
        at = draws.unit()
        kind = ""
        for share, name in _FILLER:
            at -= share
            if at < 0:
                kind = name
                break
        person = draws.pick(self.people)
        if kind == "attribute":
            return self._attribute(draws, person)
        if kind == "relation":
            other = draws.pick(self.people)
            return self._once(Fact("relation", person, draws.pick(RELATIONS), other)) if other != person else None
        if kind == "appointment":
            event = self._free(draws, "event")
            date = date_text(draws.below(DAYS))
            return self._once(Fact("appointment", person, event, date, date)) if event else None
        if kind == "advice":
            topic = draws.pick(tuple(TOPICS))
            value = self._free(draws, TOPICS[topic])
            return self._once(Fact("advice", person, topic, value)) if value else None
        if kind in ("visit", "trip"):
            value = self._free(draws, "place" if kind == "visit" else "town")
            date = date_text(draws.below(DAYS)) if kind == "visit" and self.stepwise else ""
            fact = Fact("visit" if kind == "visit" else "trip", person, "", value, date)
            # These may happen any number of times, to anyone whose journeys and visits nobody counts.
            return fact if value and fact.key not in self.claimed else None
        return None

    def _free(self, draws: Draws, category: str) -> str:
        value = draws.pick(self.lists[category])
        return "" if value in self.barred else value

    def _once(self, fact: Fact) -> Fact | None:
        """Return the fact, or what was said of it before; None where a question claimed it."""
        if fact.key in self.claimed:
            return None
        value = self._known.setdefault(fact.key, fact.value)
        return Fact(fact.kind, fact.person, fact.slot, value, value if fact.date else "")

    def _attribute(self, draws: Draws, person: str) -> Fact | None:
        slot = draws.pick(tuple(ATTRIBUTES))
        key = (person, slot)
        value = self._free(draws, ATTRIBUTES[slot])
        if not value or key in self.claimed:
            return None
        known = self._known.get(key)
        if known is None:
            self._known[key] = value
            return Fact("attribute", person, slot, value)
        if slot in CHANGING and key not in self._changed and value != known and draws.unit() < _CHANGE_SHARE:
            self._changed.add(key)
            self._known[key] = value
            if draws.unit() < 0.5:
                return Fact("changed", person, slot, value)
            self.claimed.add(key)  # both values hold, each for its time: nothing more to say
            return Fact("dated", person, slot, value, date_text(draws.below(DAYS)))
        return Fact("attribute", person, slot, known)
