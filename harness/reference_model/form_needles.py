"""Needles in many forms: alone, inside sentences, one key of many, several values, several keys, pairs as JSON."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvscope.harness.reference_model.form_noise import Kinds, drawn_kind, fresh_word
from kvscope.harness.reference_model.form_problem import Asked, Problem, Tools
from kvscope.harness.reference_model.templates import NEEDLES, QUESTIONS_MANY, QUESTIONS_ONE, TYPES
from kvscope.harness.reference_model.wording_composed import expand
from kvscope.harness.reference_model.wording_forms import (
    NEEDLE_HEADS,
    NEEDLE_KEYED,
    NEEDLE_MANY,
    NEEDLE_ONE,
    NEEDLE_SAID,
    NEEDLE_TYPES,
)
from kvscope.tasks.draws import Draws
from kvscope.tasks.words import words

_MOST_KEYS = 200


def _key_of_words(draws: Draws) -> str:
    lists = words("train")
    return f"{draws.pick(lists.adjectives)}-{draws.pick(lists.nouns)}"


_KEYS: Kinds = (
    (_key_of_words, 0.44),
    (lambda draws: draws.uuid(), 0.18),
    (lambda draws: f"{draws.pick(words('train').adjectives)} {draws.pick(words('train').nouns)}", 0.06),
    (lambda draws: draws.pick(words("train").nouns), 0.06),
    (lambda draws: fresh_word(draws).capitalize(), 0.1),
    (lambda draws: draws.digits(draws.between(4, 8)), 0.05),
    (lambda draws: f"{fresh_word(draws)}-{fresh_word(draws)}", 0.07),
    (lambda draws: fresh_word(draws).upper() + "-" + draws.digits(2), 0.04),
)
_VALUES: Kinds = (
    (lambda draws: draws.digits(7), 0.4),
    (lambda draws: draws.digits(draws.between(2, 9)), 0.1),
    (lambda draws: draws.uuid(), 0.26),
    (lambda draws: draws.pick(words("train").nouns), 0.1),
    (_key_of_words, 0.08),
    (lambda draws: fresh_word(draws), 0.06),
)


@dataclass
class NeedleWording:
    """One row's wording of needles (see ``Wording``)."""

    draws: Draws
    head: str = field(init=False)

    def __post_init__(self) -> None:
        draws = self.draws
        self.type = draws.pick((*TYPES, *NEEDLE_TYPES))
        self.adjectives = (draws.pick(words("train").adjectives), draws.pick(words("train").adjectives))
        self.head = self._worded(draws.pick(NEEDLE_HEADS))
        self.one_form = draws.unit() < 0.75
        self.form = self._form()
        self.key, self.value = drawn_kind(draws, _KEYS), drawn_kind(draws, _VALUES)
        style = draws.unit()
        self.values = draws.between(2, 5) if style < 0.35 else 1
        if style < 0.14:
            self.values = 4
        self.queries = draws.between(2, 4) if style > 0.8 else 1
        self.keyed = self.queries > 1 and draws.unit() < 0.5
        # Needles alone, or in noise.
        self.only_needles = draws.unit() < 0.25
        self.one_question = draws.unit() < 0.7
        self.pair = self._question()

    def _worded(self, pattern: str) -> str:
        """Fill what is the same in the whole row; the other slots stay."""
        text = expand(pattern, self.draws).replace("{type}", self.type)
        return text.replace("{a}", self.adjectives[0]).replace("{b}", self.adjectives[1])

    def _form(self) -> str:
        old = self.draws.unit() < 0.4
        return self._worded(self.draws.pick(NEEDLES if old else NEEDLE_SAID)).rstrip("\n")

    def _question(self) -> tuple[str, str]:
        draws = self.draws
        many = self.values * self.queries > 1
        if draws.unit() < 0.35 and not self.queries > 1:
            pair = draws.pick(QUESTIONS_MANY if many else QUESTIONS_ONE)
            pair = (pair[0].replace("{listed}", "{key}"), pair[1].replace("{listed}", "{key}").strip())
        else:
            pair = draws.pick(NEEDLE_KEYED if self.queries > 1 else NEEDLE_MANY if many else NEEDLE_ONE)
        return self._worded(pair[0]), self._worded(pair[1])

    def problem(self, draws: Draws, tools: Tools, *, room_tokens: int, n_questions: int, small: bool) -> Problem:
        """Return needles in noise (see ``Wording``)."""
        taken: set[str] = set()
        most = max(self.queries, round(min(_MOST_KEYS, 2 * n_questions) ** draws.unit()))
        if small:
            most = min(most, self.queries + draws.below(3))
        if self.only_needles:
            most = room_tokens
        groups: list[tuple[str, list[str]]] = []
        said: list[list[str]] = []
        # Where needles are the haystack, a few questions of many keys; else a question of every key.
        room = room_tokens * (0.9 if self.only_needles else 0.55)
        room -= n_questions * 30 if self.only_needles else 0
        while len(groups) < most:
            key = _fresh(draws, self.key, taken)
            values = [_fresh(draws, self.value, taken) for _ in range(self.values)]
            lines = [(self.form if self.one_form else self._form()).format(key=key, value=value) for value in values]
            room -= sum(tools.size("said", text) + 1 for text in lines) * (1 if self.only_needles else 2)
            if room < 0 and len(groups) >= self.queries:
                break
            groups.append((key, values))
            said.append(lines)
        asked = self._asked(draws, groups, n_questions)
        if self.only_needles:
            body = self._alone(draws, tools, said)
        else:
            # Values of one key come in the order of the text: it is a learnable target.
            body = tools.haystack(draws, said, room_tokens - tools.asked_tokens(asked))
        return Problem(body, asked)

    def _alone(self, draws: Draws, tools: Tools, said: list[list[str]]) -> str:
        """Return all needles in random order, the values of one key in theirs."""
        placed = sorted((at, text) for lines in said for at, text in zip(
            sorted(draws.unit() for _ in lines), lines, strict=True))  # fmt: skip
        left, right = tools.layout.wrap
        joint = tools.layout.joints[0]
        return joint.join(left + text + right for _, text in placed)

    def _asked(self, draws: Draws, groups: list[tuple[str, list[str]]], n_questions: int) -> list[Asked]:
        asked = []
        order = list(groups)
        draws.shuffle(order)
        order = order[: n_questions * self.queries]
        for at in range(0, len(order) - self.queries + 1, self.queries):
            picked = order[at : at + self.queries]
            keys = [key for key, _ in picked]
            items = tuple(f"{key}: {value}" if self.keyed else value for key, values in picked for value in values)
            question, begin = self.pair if self.one_question else self._question()
            listed = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + draws.pick((" and ", ", and ")) + keys[-1]
            fill = {"key": listed, "n": str(len(items))}
            asked.append(Asked(question.format_map(fill), begin.format_map(fill), items))
        return asked


def _fresh(draws: Draws, make: Callable[[Draws], str], taken: set[str]) -> str:
    for _ in range(100):
        if (made := make(draws)) not in taken:
            break
    else:
        made = _key_of_words(draws)  # a kind with few members (short numbers) is used up
    taken.add(made)
    return made
