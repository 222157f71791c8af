"""Questions of every type: the facts they need, what misleads, the wording and the answer.

An answer has parts, spoken in order and joined by commas; the last part is what is scored (of a list, every part). The
parts before it are the steps that the question asks for by name (dates compared or counted, persons on the way), so a
small model looks up one thing at a time. Steps in a wrong or missing form cost nothing.
"""

from collections.abc import Callable
from dataclasses import replace

from kvscope.tasks.long_qa.lexicon import chatter, date_text
from kvscope.tasks.long_qa.plan import Asked, Author, Plan
from kvscope.tasks.long_qa.render import clause
from kvscope.tasks.long_qa.temporal import temporal
from kvscope.tasks.long_qa.wording import ATTRIBUTES, CHANGING, NOT_MENTIONED, ORDINALS, RELATIONS, RELATIVE, TOPICS
from kvscope.tasks.long_qa.world import DAYS, Fact, WorldExhaustedError

LETTERS = "ABCD"
COUNTS = (2, 3, 4)
# OpenAI's MRCR asks among 2, 4 or 8 replies to the same request.
REPLY_COUNTS = (2, 4, 8)
REPLY_PAIRS = 20


def single_fact(author: Author, k: int) -> Plan:
    """One attribute of one person."""
    del k
    fact = author.attribute()
    extra = author.other_slot(fact)
    asked = [Asked("single_fact", author.ask(f.slot, f.person), (f.value,)) for f in [fact, *extra]]
    return Plan(asked, [fact, *extra], (0,))


def assistant_fact(author: Author, k: int) -> Plan:
    """What the assistant suggested to a person."""
    topic = tuple(TOPICS)[k % len(TOPICS)]
    draws, world = author.facts, author.world
    person = world.claim(draws, f"advice {topic}")
    fact = Fact("advice", person, topic, world.value(draws, TOPICS[topic]))
    question = author.pick(author.wording.suggested[topic], w=person)
    return Plan([Asked("assistant_fact", question, (fact.value,))], [fact], (0,))


def knowledge_update(author: Author, k: int) -> Plan:
    """A value that was replaced; the stale one stays in the text, before it."""
    del k
    stale = author.attribute(slots=CHANGING)
    value = author.world.value(author.facts, ATTRIBUTES[stale.slot], unlike=(stale.value,))
    fresh = Fact("changed", stale.person, stale.slot, value)
    question = author.pick(author.wording.now, q=author.ask(stale.slot, stale.person))
    return Plan([Asked("knowledge_update", question, (value,))], [stale, fresh], (1,), ordered=True)


def multi_session(author: Author, k: int) -> Plan:
    """Count visits, or list journeys, that are told one at a time."""
    draws, world, wording = author.facts, author.world, author.wording
    number = COUNTS[(k // 2) % len(COUNTS)]
    if k % 2 == 0:
        place = world.value(draws, "place")
        person = world.claim(draws, f"visit {place}")
        other = Fact("visit", world.claim(draws, f"visit {place}"), "", place)
        question = author.pick(wording.count, w=person, v=place)
        if not world.stepwise:
            facts = [Fact("visit", person, "", place)] * number
            return Plan([Asked("multi_session", question, (f"{number} times",))], [*facts, other], tuple(range(number)))
        days: dict[int, None] = {}
        while len(days) <= number:
            days[draws.below(DAYS)] = None
        dates = [date_text(day) for day in days]
        facts = [Fact("visit", person, "", place, date) for date in dates[:number]]
        at = draws.below(number + 1)
        facts.insert(at, replace(other, date=dates[number]))
        evidence = tuple(i for i in range(number + 1) if i != at)
        asked = Asked("multi_session", question, (*dates[:number], f"{number} times"))
        return Plan([asked], facts, evidence, ordered=True)
    towns: list[str] = []
    for _ in range(number):
        towns.append(world.value(draws, "town", unlike=towns))
    person = world.claim(draws, "trip")
    facts = [Fact("trip", person, "", town) for town in towns]
    question = author.pick(wording.listing, w=person)
    return Plan([Asked("multi_session", question, tuple(towns))], facts, tuple(range(number)), ordered=True)


def _hops(author: Author, hops: int) -> Plan:
    draws, world, wording = author.facts, author.world, author.wording
    final = author.attribute()
    chain = [final]
    people = [final.person]
    for _ in range(hops - 1):
        relation = draws.pick(RELATIONS)
        person = world.claim(draws, f"relation {relation}", unlike=people)
        chain.append(Fact("relation", person, relation, people[-1]))
        people.append(person)
    asked = []
    for n in range(hops, 1, -1):
        who = people[n - 1]
        for fact in reversed(chain[1:n]):
            who = RELATIVE.format(r=fact.slot, w=who)
        question = author.pick(wording.via_one if n == 2 else wording.via_two, q=author.ask(final.slot, who))
        asked.append(Asked(f"hops_{n}", question, (*reversed(people[: n - 1]), final.value)))
    asked.append(Asked("single_fact", author.ask(final.slot, final.person), (final.value,)))
    # The person asked about has the attribute, too: who skips the hops finds a wrong answer.
    decoys = []
    if world.claim_of(people[-1], final.slot):
        value = world.value(draws, ATTRIBUTES[final.slot], unlike=(final.value,))
        decoys.append(Fact("attribute", people[-1], final.slot, value))
    return Plan(asked, [*chain, *decoys], tuple(range(hops)))


def hops_2(author: Author, k: int) -> Plan:
    """An attribute of somebody's boss, teacher, ..."""
    del k
    return _hops(author, 2)


def hops_3(author: Author, k: int) -> Plan:
    """An attribute of the teacher of somebody's boss."""
    del k
    return _hops(author, 3)


def abstention(author: Author, k: int) -> Plan:
    """An attribute nobody mentioned, of a person who is mentioned; somebody else has it."""
    del k
    draws, world = author.facts, author.world
    missing = author.attribute()
    facts = [author.other_person(missing), *author.other_slot(missing)]
    asked = [Asked("abstention", author.ask(missing.slot, missing.person), (NOT_MENTIONED,))]
    asked += [Asked("single_fact", author.ask(f.slot, f.person), (f.value,)) for f in facts]
    if len(facts) == 1:
        topic = draws.pick(tuple(TOPICS))
        if not world.claim_of(missing.person, f"advice {topic}"):
            raise WorldExhaustedError
        facts.append(Fact("advice", missing.person, topic, world.value(draws, TOPICS[topic])))
    return Plan(asked, facts)


def multiple_choice(author: Author, k: int) -> Plan:
    """Four choices, each of them somebody's value in the text."""
    fact = author.attribute()
    facts = [fact]
    while len(facts) < len(LETTERS):
        other = author.other_person(fact)
        if other.value not in [f.value for f in facts]:
            facts.append(other)
    letter = k % len(LETTERS)
    choices = [f.value for f in facts[1:]]
    author.words.shuffle(choices)
    choices.insert(letter, fact.value)
    listed = dict(zip(("one", "two", "three", "four"), choices, strict=True))
    asked = []
    for f in facts:
        question = author.pick(author.wording.choice, q=author.ask(f.slot, f.person), **listed)
        asked.append(Asked("multiple_choice", question, (f.value, LETTERS[choices.index(f.value)])))
    return Plan(asked, facts, (0,))


def no_context(author: Author, k: int) -> Plan:
    """A question that states its own fact."""
    del k
    fact = author.attribute()
    note = clause(author.wording, author.words, fact)
    question = author.pick(author.wording.note, c=note, q=author.ask(fact.slot, fact.person))
    return Plan([Asked("no_context", question, (fact.value,))])


def mrcr(author: Author, k: int) -> Plan:
    """Repeat the i-th of 2, 4 or 8 replies to the same request; they differ in their words alone."""
    draws = author.facts
    adjectives, nouns = chatter(author.split)
    number = REPLY_COUNTS[k % len(REPLY_COUNTS)]
    at = draws.below(number)
    topic = draws.pick(nouns)
    facts = []
    for _ in range(number):
        pairs = [f"{draws.pick(adjectives)} {draws.pick(nouns)}" for _ in range(REPLY_PAIRS)]
        facts.append(Fact("reply", "", topic, ", ".join(pairs) + "."))
    asked = []
    for i in (at, *(j for j in range(number) if j != at)):
        question = author.pick(author.wording.repeat, i=ORDINALS[i], v=topic)
        asked.append(Asked("mrcr", question, (facts[i].value,)))
    return Plan(asked, facts, (at,), ordered=True)


PLANNERS: dict[str, Callable[[Author, int], Plan]] = {
    "single_fact": single_fact,
    "assistant_fact": assistant_fact,
    "knowledge_update": knowledge_update,
    "temporal": temporal,
    "multi_session": multi_session,
    "hops_2": hops_2,
    "hops_3": hops_3,
    "abstention": abstention,
    "multiple_choice": multiple_choice,
    "no_context": no_context,
    "mrcr": mrcr,
}
# The pooled task; what needs no context and the long repetition are reported apart.
POOLED = tuple(name for name in PLANNERS if name not in ("no_context", "mrcr"))
