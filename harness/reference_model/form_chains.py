"""Chains of variables in many forms: syntaxes, names, values, one chain or many, whole chains or single steps asked."""

import string
from collections.abc import Callable
from dataclasses import dataclass, field

from kvscope.harness.reference_model.form_noise import Kinds, drawn_kind, fresh_word
from kvscope.harness.reference_model.form_problem import Asked, Problem, Tools
from kvscope.harness.reference_model.templates_ruler import MORE_TAGS, TAGS
from kvscope.harness.reference_model.wording_composed import expand
from kvscope.harness.reference_model.wording_forms import (
    CHAIN_COPY,
    CHAIN_HEADS,
    CHAIN_SYNTAX,
    CHAIN_TAGS,
    CHAIN_VALUE,
    CHAIN_WHOLE,
    CHAIN_WHOLE_BEGIN,
)
from kvscope.tasks.draws import Draws
from kvscope.tasks.words import words

_MOST_HOPS = 6
_MOST_CHAINS = 160


def _capitals(low: int, high: int) -> Callable[[Draws], str]:
    return lambda draws: "".join(draws.pick(string.ascii_uppercase) for _ in range(draws.between(low, high)))


# How names look, in the share they have. The same look in the whole problem.
_NAMES: Kinds = (
    (_capitals(5, 5), 0.42),
    (_capitals(3, 3), 0.08),
    (_capitals(4, 7), 0.08),
    (lambda draws: draws.pick("abcdefghijkmnpqrstuvwxyz") + str(draws.between(1, 999)), 0.08),
    (lambda draws: draws.pick("ABCDEFGHKMNPQRSTUVWXYZ") + str(draws.between(10, 99)), 0.04),
    (lambda draws: draws.pick(words("train").nouns), 0.1),
    (lambda draws: fresh_word(draws).capitalize(), 0.06),
    (lambda draws: f"{draws.pick(words('train').adjectives)}_{draws.pick(words('train').nouns)}", 0.06),
    (lambda draws: "".join(draws.pick(string.ascii_lowercase) for _ in range(draws.between(4, 6))), 0.05),
    (lambda draws: "".join(draws.pick(string.ascii_letters + string.digits) for _ in range(5)), 0.03),
)


@dataclass
class ChainWording:
    """One row's wording of variable chains (see ``Wording``)."""

    draws: Draws
    head: str = field(init=False)

    def __post_init__(self) -> None:
        draws = self.draws
        self.tag = draws.pick((*TAGS, *MORE_TAGS, *CHAIN_TAGS))
        self.head = expand(draws.pick(CHAIN_HEADS), draws)
        self.syntax = draws.pick(CHAIN_SYNTAX) if draws.unit() < 0.85 else None
        self.name, self.small_name = drawn_kind(draws, _NAMES), drawn_kind(draws, _NAMES)
        if draws.unit() < 0.6:
            self.small_name = self.name
        self.digits = 5 if draws.unit() < 0.6 else draws.between(2, 8)
        self.hops = draws.between(1, _MOST_HOPS) if draws.unit() < 0.5 else None
        self.whole = self._pair()
        self.one_whole = draws.unit() < 0.7
        self.steps_share = 0.25 if draws.unit() < 0.5 else 0.0

    def _pair(self) -> tuple[str, str]:
        draws = self.draws
        begin = expand(draws.pick(CHAIN_WHOLE_BEGIN), draws)
        return expand(draws.pick(CHAIN_WHOLE), draws), begin

    def problem(self, draws: Draws, tools: Tools, *, room_tokens: int, n_questions: int, small: bool) -> Problem:
        """Return chains in noise (see ``Wording``)."""
        name = self.small_name if small else self.name
        taken: set[str] = {*TAGS, *MORE_TAGS, *CHAIN_TAGS}
        # One chain alone, or as many as questions and room allow, each order of magnitude as often.
        most = (
            1 if draws.unit() < 0.3 else round(min(_MOST_CHAINS, max(2, room_tokens / 60)) ** draws.unit() ** 0.7) + 1
        )
        if small:
            most = min(most, 3)
        groups: list[list[str]] = []
        chains: list[tuple[str, list[str]]] = []
        room = room_tokens * 0.6
        while len(chains) < most:
            value = _fresh(taken, lambda: draws.digits(self.digits))
            hops = self.hops if self.hops is not None else draws.between(1, _MOST_HOPS)
            names = [_fresh(taken, lambda: name(draws)) for _ in range(hops + 1)]
            said = self._statements(draws, names, value)
            # A chain's question costs about as much as the chain.
            room -= 2.2 * sum(tools.size("said", text) + 1 for text in said)
            if room < 0 and chains:
                break
            groups.append(said)
            chains.append((value, names))
        asked = self._asked(draws, chains, n_questions)
        body = tools.haystack(draws, groups, room_tokens - tools.asked_tokens(asked))
        return Problem(body, asked)

    def _statements(self, draws: Draws, names: list[str], value: str) -> list[str]:
        said = []
        for i, new in enumerate(names):
            give, copy = self.syntax or draws.pick(CHAIN_SYNTAX)
            said.append((copy if i else give).format(tag=self.tag, x=new, y=names[i - 1], v=value))
        return said

    def _asked(self, draws: Draws, chains: list[tuple[str, list[str]]], n_questions: int) -> list[Asked]:
        order = list(chains)
        draws.shuffle(order)
        asked = []
        for value, names in order[: max(1, int(n_questions * (1 - self.steps_share)))]:
            question, begin = self.whole if self.one_whole else self._pair()
            fill = {"v": value, "tag": self.tag, "n": str(len(names))}
            asked.append(Asked(question.format_map(fill), begin.format_map(fill), tuple(names)))
        steps: set[str] = set()
        for _ in range(int(n_questions * self.steps_share)):
            value, names = draws.pick(chains)
            copy = draws.unit() < 0.6
            at = draws.between(1, len(names) - 1) if copy else 0
            if names[at] not in steps:
                steps.add(names[at])
                question, begin = (
                    expand(part, draws).format(x=names[at]) for part in draws.pick(CHAIN_COPY if copy else CHAIN_VALUE)
                )
                asked.append(Asked(question, begin, (names[at - 1] if copy else value,)))
        draws.shuffle(asked)
        return asked


def _fresh(taken: set[str], make: Callable[[], str]) -> str:
    for _ in range(100):
        if (made := make()) not in taken:
            break
    while made in taken:  # a kind with few members (numbers of two digits) is used up: longer ones
        made += make()
    taken.add(made)
    return made
