"""An offline haystack: plain sentences about things and places, free of digits and of every evaluation key word."""

from kvscope.tasks.draws import Draws
from kvscope.tasks.words import words

_VERBS = (
    "carried", "watched", "followed", "repaired", "described", "painted", "remembered", "covered", "measured",
    "crossed", "borrowed", "polished", "collected", "ignored", "studied", "moved", "noticed", "hid", "kept", "sold",
)  # fmt: skip
_PEOPLE = (
    "a neighbour", "the baker", "an old friend", "the teacher", "a traveller", "the gardener", "the captain",
    "a young clerk", "the miller", "the doctor", "a stranger", "the librarian",
)  # fmt: skip
_TIMES = (
    "in the morning", "late at night", "after the rain", "before lunch", "during the winter", "on the way home",
    "while the others slept", "at the end of summer", "when nobody looked", "just after noon",
)  # fmt: skip
_PATTERNS = (
    "{Person} {verb} the {adj} {noun} {time}.",
    "Nobody knew why {person} {verb} a {noun} and a {adj} {noun2}.",
    "{Time}, the {noun} near the {noun2} looked {adj}.",
    "It was a {adj} {noun}, and {person} {verb} it {time}.",
    "There is more to say about the {noun} than about the {adj} {noun2}.",
    "{Person} said that the {noun} was {adj}, but {person2} {verb} it anyway.",
    "The {adj} {noun} stood beside the {noun2} {time}.",
    "Between the {noun} and the {noun2}, {person} {verb} something {adj}.",
)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def sentence(draws: Draws) -> str:
    """Return one sentence."""
    lists = words("train")
    fields = {
        "person": draws.pick(_PEOPLE),
        "person2": draws.pick(_PEOPLE),
        "verb": draws.pick(_VERBS),
        "adj": draws.pick(lists.adjectives),
        "noun": draws.pick(lists.nouns),
        "noun2": draws.pick(lists.nouns),
        "time": draws.pick(_TIMES),
    }
    pattern = draws.pick(_PATTERNS)
    return pattern.format(**fields, Person=_capital(fields["person"]), Time=_capital(fields["time"]))


def line(draws: Draws) -> str:
    """Return a line of one to three sentences, ending with a newline."""
    return " ".join(sentence(draws) for _ in range(draws.between(1, 3))) + "\n"
