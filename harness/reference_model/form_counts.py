"""Common words and frequent code words in many forms; besides the list, comparisons of two words are asked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvscope.harness.reference_model.form_noise import fresh_word
from kvscope.harness.reference_model.form_problem import Asked, Problem, Tools
from kvscope.harness.reference_model.templates_ruler import coded_word
from kvscope.harness.reference_model.wording_composed import expand
from kvscope.harness.reference_model.wording_forms import (
    CODED_ASKED,
    CODED_HEADS,
    COMMON_ASKED,
    COMMON_HEADS,
    COMPARED,
)
from kvscope.tasks.draws import Draws
from kvscope.tasks.words import words

# Lists of more different words than this take pairs, too.
_WORDS = 1500
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# (before an entry's word, between entries, entries a line; 0 for a single line)
_LISTS = (
    ("{i}. ", " ", 0), ("{i}. ", " ", 0), ("{i}. ", " ", 10), ("{i}. ", "", 1), ("{i}) ", " ", 0), ("{i}: ", ", ", 0),
    ("({i}) ", " ", 12), ("{i} ", " ", 0), ("#{i} ", " ", 8), ("- ", "", 1), ("", " ", 0), ("", ", ", 0), ("", "\n", 0),
    ("", " | ", 0), ("", "; ", 15), ("* ", " ", 0),
)  # fmt: skip


def _compared(draws: Draws, pairs: list[tuple[str, str]], pattern: tuple[str, str]) -> list[Asked]:
    question, begin = (expand(part, draws) for part in pattern)
    asked = []
    for more, less in pairs:
        x, y = (more, less) if draws.unit() < 0.5 else (less, more)
        asked.append(Asked(question.format(x=x, y=y), begin, (more,)))
    return asked


def _listed(flat: Sequence[str], form: tuple[str, str, int]) -> str:
    before, between, a_line = form
    entries = [before.format(i=i) + word for i, word in enumerate(flat, 1)] if before else list(flat)
    if not a_line:
        return between.join(entries)
    return "\n".join(between.join(entries[i : i + a_line]) for i in range(0, len(entries), a_line))


def _number(draws: Draws, n: int) -> str:
    return str(n) if draws.unit() < 0.6 else _NUMBERS[n]


@dataclass
class CommonWording:
    """One row's wording of common words (see ``Wording``)."""

    draws: Draws
    head: str = field(init=False)

    def __post_init__(self) -> None:
        draws = self.draws
        self.head = expand(draws.pick(COMMON_HEADS), draws)
        question, begin = draws.pick(COMMON_ASKED)
        self.pair = expand(question, draws), expand(begin, draws)
        self.form = draws.pick(_LISTS)
        self.n_common = 10 if draws.unit() < 0.5 else draws.between(2, 10)
        self.seldom, self.often = draws.pick(((1, 6), (3, 30), (3, 10), (2, 12), (1, 4), (2, 20)))
        self.made_up = draws.unit() < 0.2

    def _word(self, draws: Draws, paired: float) -> str:
        """Return a word; with the chance ``paired`` two with a dash, as long lists need more words than there are."""
        lists = words("train")
        if draws.unit() < paired:
            return f"{draws.pick(lists.adjectives)}-{draws.pick(lists.nouns)}"
        return fresh_word(draws) + fresh_word(draws) if self.made_up else draws.pick(draws.pick(lists))

    def _different(self, draws: Draws, n: int, paired: float) -> list[str]:
        found: dict[str, None] = {}
        tries = 0
        while len(found) < n:
            tries += 1
            found[self._word(draws, paired if tries < 20 * n else 1.0)] = None
        return list(found)

    def problem(self, draws: Draws, tools: Tools, *, room_tokens: int, n_questions: int, small: bool) -> Problem:
        """Return a list with some words repeated (see ``Wording``)."""
        room = room_tokens - 45 - 4 * self.n_common
        compared = min(n_questions - 1, 8) if draws.unit() < 0.5 and not small else 0
        room -= 22 * max(0, compared)
        seldom, often = (1, draws.between(2, 4)) if small and self.often > 4 else (self.seldom, self.often)
        paired = 0.7 if room / (5 * seldom) > _WORDS else 0.0
        sample = [
            f"{self.form[0].format(i=draws.between(1, 1 + room // 5))}{self._word(draws, paired)}" for _ in range(60)
        ]
        entries = int(0.96 * 60 * room / tools.size("entries", self.form[1].join(sample)))
        # Half of the entries at least are uncommon words; in a short list the common ones are fewer or repeated less.
        n_common = max(2, min(self.n_common, entries // (4 * seldom)))
        often = max(seldom + 1, min(often, entries // (2 * n_common)))
        n_rest = max(n_common, entries - n_common * often)
        pool = self._different(draws, n_common + n_rest // seldom + 1, paired)
        common, rest = pool[:n_common], pool[n_common:]
        flat = [word for word in common for _ in range(often)]
        flat += [rest[i // seldom] for i in range(n_rest)]
        draws.shuffle(flat)
        text = _listed(flat, self.form)
        chosen = set(common)
        spoken = tuple(dict.fromkeys(word for word in flat if word in chosen))
        fill = {"n": _number(draws, n_common)}
        asked = [Asked(self.pair[0].format_map(fill), self.pair[1].format_map(fill), spoken)]
        pairs = [(draws.pick(common), draws.pick(rest[: max(1, n_rest // seldom)])) for _ in range(compared)]
        return Problem(text, asked + _compared(draws, list(dict.fromkeys(pairs)), draws.pick(COMPARED)))


@dataclass
class CodedWording:
    """One row's wording of frequent code words (see ``Wording``)."""

    draws: Draws
    head: str = field(init=False)

    def __post_init__(self) -> None:
        draws = self.draws
        self.head = expand(draws.pick(CODED_HEADS), draws)
        question, begin = draws.pick(CODED_ASKED)
        self.pair = expand(question, draws), expand(begin, draws)
        self.letters = 6 if draws.unit() < 0.6 else draws.between(3, 8)
        self.alpha = 2.0 if draws.unit() < 0.5 else 1.4 + draws.unit()
        self.gap = "..." if draws.unit() < 0.6 else draws.pick(("--", "***", "..", "____", "~", "......", "#", "<>"))
        self.asked = 3 if draws.unit() < 0.6 else draws.between(1, 5)
        self.between, self.a_line = draws.pick(
            ((" ", 0), (" ", 0), (" ", 0), (" ", 20), (", ", 0), ("\n", 0), (" | ", 9))
        )
        self.capital = draws.unit() < 0.12

    def _word(self, draws: Draws) -> str:
        word = coded_word(draws, self.letters)
        return word.upper() if self.capital else word

    def problem(self, draws: Draws, tools: Tools, *, room_tokens: int, n_questions: int, small: bool) -> Problem:
        """Return code words whose counts fall by a power law (see ``Wording``)."""
        compared = min(n_questions - 1, 6) if draws.unit() < 0.5 and not small else 0
        room = room_tokens - 55 - 8 * self.asked - 22 * max(0, compared)
        ranked = [self.gap, *dict.fromkeys(self._word(draws) for _ in range(min(2000, 20 + room_tokens // 20)))]
        # Tokens of a text by the law of its counts: the first ranks counted, the rest as long as the mean of theirs.
        marks = tools.size("mark", self.between.strip() or " ") if self.between.strip() or self.between == "\n" else 0
        gap, mean = tools.size("gap", self.gap), tools.size("coded", " ".join(ranked[1:25])) / 24
        weights = [1 / rank**self.alpha for rank in range(1, len(ranked) + 1)]
        per_draw = (weights[0] * (gap + marks) + sum(weights[1:]) * (mean + marks)) / 1.645
        size = max(12, 0.98 * room / per_draw)
        flat = [word for word, weight in zip(ranked, weights, strict=True) for _ in range(int(size * weight / 1.645))]
        draws.shuffle(flat)
        text = _listed(flat, ("", self.between, self.a_line))
        tally = Counter(flat)
        order = sorted(((tally[word], word) for word in ranked[1 : self.asked + 2]), reverse=True)
        clear = 0  # only as many as can be told apart by their counts
        while clear < self.asked and clear + 1 < len(order) and order[clear][0] > order[clear + 1][0]:
            clear += 1
        if not clear:
            return Problem(text, [])
        fill = {"n": _number(draws, clear), "gap": self.gap}
        items = tuple(word for _, word in order[:clear])
        asked = [Asked(self.pair[0].format_map(fill), self.pair[1].format_map(fill), items)]
        known = [word for word in ranked[1:40] if tally[word]]
        pairs = []
        for _ in range(max(0, compared)):
            one, two = draws.pick(known), draws.pick(known)
            if tally[one] > 1.5 * tally[two]:
                pairs.append((one, two))
        return Problem(text, asked + _compared(draws, list(dict.fromkeys(pairs)), draws.pick(COMPARED)))
