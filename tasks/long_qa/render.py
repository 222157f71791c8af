"""Facts, sessions and small talk as text lines."""

from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.lexicon import chatter
from kvscope.tasks.long_qa.wording import Wording
from kvscope.tasks.long_qa.world import Fact
from kvscope.tasks.words import Split


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def clause(wording: Wording, draws: Draws, fact: Fact) -> str:
    """Return an attribute or relation as a clause without a full stop."""
    table = wording.relations if fact.kind == "relation" else wording.clauses
    return draws.pick(table[fact.slot]).format(p=fact.person, v=fact.value)


def line(wording: Wording, draws: Draws, fact: Fact) -> str:
    """Return the line (advice and replies: two lines) that states a fact, ending with a newline."""
    if fact.kind in ("attribute", "relation"):
        text = draws.pick(wording.plain).format(c=clause(wording, draws, fact))
    elif fact.kind == "changed":
        text = draws.pick(wording.changed).format(c=clause(wording, draws, fact))
    elif fact.kind == "dated":
        text = draws.pick(wording.dated).format(c=clause(wording, draws, fact), d=fact.date)
    elif fact.kind == "appointment":
        text = draws.pick(wording.appointments).format(p=fact.person, e=fact.slot, d=fact.date)
    elif fact.kind == "advice":
        text = draws.pick(wording.advice[fact.slot]).format(p=fact.person, v=fact.value)
    elif fact.kind == "reply":
        text = draws.pick(wording.request).format(v=fact.slot) + fact.value + "\n"
    else:
        text = draws.pick(wording.visits if fact.kind == "visit" else wording.trips)
        text = text.format(p=fact.person, v=fact.value, d=fact.date)
    return capital(text)


def small_talk(wording: Wording, draws: Draws, split: Split) -> str:
    """Return a line about nobody, free of every possible key and answer."""
    adjectives, nouns = chatter(split)
    return draws.pick(wording.small_talk).format(a=draws.pick(adjectives), n=draws.pick(nouns), m=draws.pick(nouns))
