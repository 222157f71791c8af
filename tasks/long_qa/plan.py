"""What a question needs in the text, and where its people, values and words come from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.render import capital
from kvscope.tasks.long_qa.wording import ATTRIBUTES, Wording
from kvscope.tasks.long_qa.world import Fact, World
from kvscope.tasks.words import Split


@dataclass(frozen=True)
class Asked:
    """A question and its answer in parts."""

    question_type: str
    question: str
    answer: tuple[str, ...]


@dataclass
class Plan:
    """What one question needs in the text.

    Attributes:
        asked: the question; those after the first ask about the same facts (training uses them).
        facts: what must be said.
        evidence: indices of the facts the first question needs, the deciding one first.
        ordered: the facts must stand in their order.
    """

    asked: list[Asked]
    facts: list[Fact] = field(default_factory=list)
    evidence: tuple[int, ...] = ()
    ordered: bool = False


@dataclass(frozen=True)
class Author:
    """Everything a question is made from; facts and questions have random streams of their own."""

    world: World
    wording: Wording
    facts: Draws
    words: Draws
    split: Split

    def pick(self, templates: Sequence[str], **slots: str) -> str:
        """Draw a question template and fill it."""
        return self.words.pick(templates).format(**slots)

    def ask(self, slot: str, who: str) -> str:
        """Ask for an attribute of somebody."""
        return capital(self.pick(self.wording.ask[slot], w=who))

    def attribute(self, *, slots: Sequence[str] = tuple(ATTRIBUTES), unlike: Sequence[str] = ()) -> Fact:
        """Return a new fact about somebody's attribute."""
        slot = self.facts.pick(slots)
        person = self.world.claim(self.facts, slot, unlike=unlike)
        return Fact("attribute", person, slot, self.world.value(self.facts, ATTRIBUTES[slot]))

    def other_slot(self, fact: Fact) -> list[Fact]:
        """Return a fact about another attribute of the same person, so that the name alone does not lead there."""
        slot = self.facts.pick([slot for slot in ATTRIBUTES if slot != fact.slot])
        if not self.world.claim_of(fact.person, slot):
            return []
        return [Fact("attribute", fact.person, slot, self.world.value(self.facts, ATTRIBUTES[slot]))]

    def other_person(self, fact: Fact) -> Fact:
        """Return the same attribute of somebody else."""
        person = self.world.claim(self.facts, fact.slot)
        value = self.world.value(self.facts, ATTRIBUTES[fact.slot], unlike=(fact.value,))
        return Fact("attribute", person, fact.slot, value)
