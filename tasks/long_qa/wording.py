"""What a set of templates consists of; evaluation and training each have one, over the same cue words.

A story's fact is said in evidence wording (``Mara has made a home in Oslo``) and asked for in other words (``In which
town does Mara live?``), so matching words alone cannot find it.
"""

from dataclasses import dataclass

# The frame of every question, in training and evaluation alike: the answer follows with a space.
FRAME = "Question: {q} Answer:"
NOT_MENTIONED = "not mentioned"
RELATIVE = "the {r} of {w}"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")

# What a person has exactly one of, and the category of its values.
ATTRIBUTES = {
    "home": "town",
    "job": "job",
    "food": "food",
    "pet": "animal",
    "instrument": "instrument",
    "hobby": "hobby",
    "clothes": "colour",
    "vehicle": "vehicle",
    "purchase": "object",
    "drink": "drink",
}
# Attributes of which a change of mind is told; the others stay as they are.
CHANGING = ("home", "job", "instrument", "hobby", "clothes", "vehicle")
RELATIONS = ("boss", "teacher", "neighbour", "landlord", "doctor", "coach")
# What the assistant is asked to suggest.
TOPICS = {"tree": "tree", "flower": "flower", "herb": "herb"}


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Templates of one split; alternatives are drawn at random.

    Slots: ``{p}`` person, ``{v}`` value, ``{d}`` date, ``{c}`` a clause, ``{q}`` a question, ``{w}`` who a question is
    about (a name, or ``the boss of`` a name), ``{e}`` event, ``{a} {n} {m}`` an adjective and nouns of small talk,
    ``{one}`` to ``{four}`` choices.

    Attributes:
        heads: instruction before the first session; ends with a newline.
        sessions: header line of a session.
        clauses: attribute -> how a value is stated; no full stop, so that the next three can hold it.
        plain, changed, dated: sentences around a clause: as it is, replacing an earlier value, valid from a date on.
        relations: relation -> clause with ``{p}`` and the other person ``{v}``.
        appointments: an event of a person and its date.
        visits: one visit of ``{p}`` to the place ``{v}`` on a date.
        trips: one journey of ``{p}`` to the town ``{v}``.
        advice: topic -> a person's request and the assistant's reply, in two lines.
        small_talk: sentences about nobody.
        ask: attribute -> question about ``{w}``.
        now, as_of: a question about a value that changed, about today and about a day.
        via_one, via_two: a question through one or two other persons.
        order, between: a question about two appointments ``{one}`` and ``{two}``.
        count, listing: a question about all visits to ``{v}`` and about all journeys.
        suggested: topic -> question about the assistant's reply.
        choice: a question with four lettered choices.
        note: a question that states its own fact ``{c}``.
        request: a user's request for a text about ``{v}``; the reply follows on the next line.
        repeat: question for the ``{i}``-th reply about ``{v}``.
    """

    heads: tuple[str, ...]
    sessions: tuple[str, ...]
    clauses: dict[str, tuple[str, ...]]
    plain: tuple[str, ...]
    changed: tuple[str, ...]
    dated: tuple[str, ...]
    relations: dict[str, tuple[str, ...]]
    appointments: tuple[str, ...]
    visits: tuple[str, ...]
    trips: tuple[str, ...]
    advice: dict[str, tuple[str, ...]]
    small_talk: tuple[str, ...]
    ask: dict[str, tuple[str, ...]]
    now: tuple[str, ...]
    as_of: tuple[str, ...]
    via_one: tuple[str, ...]
    via_two: tuple[str, ...]
    order: tuple[str, ...]
    between: tuple[str, ...]
    count: tuple[str, ...]
    listing: tuple[str, ...]
    suggested: dict[str, tuple[str, ...]]
    choice: tuple[str, ...]
    note: tuple[str, ...]
    request: tuple[str, ...]
    repeat: tuple[str, ...]

    def strings(self) -> list[str]:
        """Return every template."""
        found: list[str] = []
        for value in vars(self).values():
            groups = value.values() if isinstance(value, dict) else [value]
            found += [text for group in groups for text in group]
        return found
