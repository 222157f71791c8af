"""Questions about dates: the order of two appointments, the days between them, what holds on a day."""

from collections.abc import Sequence
from dataclasses import replace

from kvscope.tasks.long_qa.lexicon import MONTH_DAYS, date_text
from kvscope.tasks.long_qa.plan import Asked, Author, Plan
from kvscope.tasks.long_qa.wording import ATTRIBUTES, CHANGING
from kvscope.tasks.long_qa.world import DAYS, Fact


def temporal(author: Author, k: int) -> Plan:
    """Order of two appointments, days between them, or what holds on a day."""
    return (_order, _between, _as_of)[k % 3](author, k // 3)


def _appointments(author: Author, days: tuple[int, int]) -> tuple[list[Fact], dict[str, str]]:
    draws, world = author.facts, author.world
    one = world.value(draws, "event")
    two = world.value(draws, "event", unlike=(one,))
    person = world.claim(draws, f"appointment {one}", f"appointment {two}")
    dates = [date_text(day) for day in days]
    facts = [Fact("appointment", person, e, d, d) for e, d in zip((one, two), dates, strict=True)]
    return facts, {"w": person, "one": one, "two": two}


def _between_asked(author: Author, facts: Sequence[Fact], slots: dict[str, str], gap_days: int) -> Asked:
    question = author.pick(author.wording.between, **slots)
    return Asked("temporal", question, (facts[0].date, facts[1].date, f"{gap_days} days"))


def _order_asked(author: Author, facts: Sequence[Fact], slots: dict[str, str], first: int) -> Asked:
    question = author.pick(author.wording.order, **slots)
    earlier = (facts[first].date,) if author.world.stepwise else ()
    return Asked("temporal", question, (facts[0].date, facts[1].date, *earlier, facts[first].slot))


def _order(author: Author, k: int) -> Plan:
    draws = author.facts
    early = draws.below(DAYS - 1)
    late = draws.between(early + 1, DAYS - 1)
    days = (early, late) if k % 2 == 0 else (late, early)
    facts, slots = _appointments(author, days)
    return Plan([_order_asked(author, facts, slots, k % 2)], facts, (0, 1))


def _between(author: Author, k: int) -> Plan:
    draws = author.facts
    month = draws.below(len(MONTH_DAYS))
    start, length = sum(MONTH_DAYS[:month]), MONTH_DAYS[month]
    early = draws.below(length - 1)
    late = draws.between(early + 1, length - 1)
    days = (start + early, start + late) if k % 2 == 0 else (start + late, start + early)
    facts, slots = _appointments(author, days)
    asked = [_between_asked(author, facts, slots, late - early), _order_asked(author, facts, slots, k % 2)]
    return Plan(asked, facts, (0, 1))


def dates_given(author: Author, k: int) -> Plan:
    """Training's: order of two events or days between them, their dates in the question; nothing to look up."""
    plan = (_order, _between)[k % 2](author, k // 2)
    one, two = plan.facts
    slots = {"w": one.person, "one": f"{one.slot} on {one.date}", "two": f"{two.slot} on {two.date}"}
    template = author.wording.between if k % 2 else author.wording.order
    return Plan([replace(plan.asked[0], question=author.pick(template, **slots))])


def _as_of(author: Author, k: int) -> Plan:
    draws = author.facts
    before = author.attribute(slots=CHANGING)
    value = author.world.value(draws, ATTRIBUTES[before.slot], unlike=(before.value,))
    change = draws.between(30, DAYS - 31)
    after = Fact("dated", before.person, before.slot, value, date_text(change))
    asked = []
    for late in (k % 2 == 1, k % 2 == 0):
        day = draws.between(change + 1, DAYS - 1) if late else draws.between(0, change - 1)
        question = author.pick(author.wording.as_of, d=date_text(day), q=author.ask(before.slot, before.person))
        asked.append(Asked("temporal", question, (after.date, (after if late else before).value)))
    return Plan(asked, [before, after], (1, 0), ordered=True)
