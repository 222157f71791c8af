"""long_qa training documents: many questions of every type about one story, in training words and wording.

The story comes from the simulator of the evaluation task (kvscope.tasks.long_qa). A third of the values are made-up
words and many are plain nouns, so a model learns to copy what stands in the text, not to name a likely town.

There are two versions. In the first a few fixed sentences say each thing; it is kept because the phases p1 to p3 of the
shipped model were trained on it, byte for byte. The second composes its sentences (wording_composed), asks for steps
where one step is too hard (dates of visits before their number, the earlier date before the event), and trains dates
by themselves, too.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from kvscope.harness.reference_model.documents import Document, Question
from kvscope.harness.reference_model.documents_long_qa_templates import TRAIN_WORDING
from kvscope.harness.reference_model.wording_composed import composed_wording
from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.lexicon import CATEGORIES, category_of, chatter, date_text, lexicon
from kvscope.tasks.long_qa.plan import Asked, Author, Plan
from kvscope.tasks.long_qa.questions import PLANNERS
from kvscope.tasks.long_qa.render import line, small_talk
from kvscope.tasks.long_qa.temporal import dates_given
from kvscope.tasks.long_qa.wording import FRAME, Wording
from kvscope.tasks.long_qa.world import DAYS, World, WorldExhaustedError

# Planners of training, by kind: ``dates`` asks what ``temporal`` does, with the dates in the question.
TRAIN_PLANNERS: Mapping[str, Callable[[Author, int], Plan]] = MappingProxyType({**PLANNERS, "dates": dates_given})
# How often a question's plan is of a kind, in the first version and in the second. What takes several steps, and what
# the model got wrong after the first, comes more often.
SHARES_1: dict[str, float] = {
    "single_fact": 0.12,
    "assistant_fact": 0.07,
    "knowledge_update": 0.12,
    "temporal": 0.18,
    "multi_session": 0.12,
    "hops_2": 0.08,
    "hops_3": 0.10,
    "abstention": 0.08,
    "multiple_choice": 0.09,
    "no_context": 0.04,
}
SHARES_2: dict[str, float] = {
    "single_fact": 0.11,
    "assistant_fact": 0.09,
    "knowledge_update": 0.11,
    "temporal": 0.17,
    "dates": 0.10,
    "multi_session": 0.17,
    "hops_2": 0.06,
    "hops_3": 0.07,
    "abstention": 0.06,
    "multiple_choice": 0.04,
    "no_context": 0.02,
}
# Share of documents that hold one set of replies to repeat, where they fit. Their answers are long.
REPLY_SHARE = 0.12
REPLY_ROOM_TOKENS = 1200
# Share of plans after which their further questions are asked, too.
MORE_SHARE = 0.5
# Enough people for the questions, and about as many as an evaluation prompt of the length has.
_PEOPLE_PER_PLAN = 1.6
_TOKENS_PER_PLAN = 45
_TOKENS_PER_PERSON = 120
_HEAD_SHARE = 0.9
# So many questions may find no room before a story is taken to be full.
_MISSES = 3
_LIST_SIZE = 24
_CAPITALISED = ("person", "town")
_ONSETS = (*"bdfghjklmnprstvwyz", "br", "ch", "dr", "fl", "gr", "pr", "sh", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ee", "ia", "oo", "ou")
_CODAS = ("", "", "l", "n", "r", "s", "t", "m", "nd", "rk", "st", "x")


def made_up_word(draws: Draws) -> str:
    """Return a pronounceable word of one to three syllables."""
    return "".join(
        draws.pick(_ONSETS) + draws.pick(_VOWELS) + (draws.pick(_CODAS) if draws.unit() < 0.5 else "")
        for _ in range(draws.pick((1, 2, 2, 3)))
    )


def blended_word(draws: Draws, nouns: Sequence[str]) -> str:
    """Return the beginning of one noun and the end of another: made up, but spelled as words are."""
    one, two = draws.pick(nouns), draws.pick(nouns)
    return one[: draws.between(2, max(2, len(one) - 2))] + two[-draws.between(2, max(2, len(two) - 2)) :]


def _words_of(wording: Wording) -> set[str]:
    return {word for text in wording.strings() for word in re.findall("[a-z]+", text.lower())}


class LongQADocuments:
    """Makes long_qa documents (a ``DocumentMaker``) of one version (see the module)."""

    def __init__(self, *, version: Literal[1, 2] = 2) -> None:
        self.version = version
        self.wording = TRAIN_WORDING if version == 1 else composed_wording()
        self._shares = SHARES_1 if version == 1 else SHARES_2
        self._lexicon = lexicon("train")
        self._nouns = chatter("train")[1]
        if version == 2:  # a word of the sentences themselves is no answer
            taken = _words_of(self.wording)
            self._nouns = tuple(noun for noun in self._nouns if noun.isalpha() and noun not in taken)

    def __call__(self, draws: Draws, *, room_tokens: int, n_questions: int, count: Callable[[str], int]) -> Document:
        """Return a document (see DocumentMaker)."""
        return _Story(self, draws, room_tokens=room_tokens, n_questions=n_questions, count=count).document()

    def words(self, draws: Draws, category: str, size: int) -> list[str]:
        """Return the words of a category for one story: from the lexicon, plain nouns, and made-up ones."""
        known = self._lexicon[category]
        found: dict[str, None] = {}
        while len(found) < size:
            at = draws.unit()
            if at < 0.4:
                word = draws.pick(known)
            elif at < 0.7 and category not in _CAPITALISED:
                word = draws.pick(self._nouns)
            else:
                blend = self.version == 2 and draws.unit() < 0.5
                word = blended_word(draws, self._nouns) if blend else made_up_word(draws)
                if word in category_of():  # it could be evaluation's
                    continue
                word = word.capitalize() if category in _CAPITALISED else word
            found[word] = None
        return list(found)

    def draw_type(self, draws: Draws) -> str:
        """Draw a question type."""
        at = draws.unit() * sum(self._shares.values())
        for name, share in self._shares.items():
            at -= share
            if at < 0:
                return name
        return next(reversed(self._shares))


class _Story:
    """One document in the making."""

    def __init__(
        self,
        maker: LongQADocuments,
        draws: Draws,
        *,
        room_tokens: int,
        n_questions: int,
        count: Callable[[str], int],
    ) -> None:
        self._maker, self._draws, self._count = maker, draws, count
        self._wording = maker.wording
        self._room, self._n_questions = room_tokens, n_questions
        needed = min(n_questions, room_tokens / _TOKENS_PER_PLAN) * _PEOPLE_PER_PLAN
        usual = min(100, room_tokens / _TOKENS_PER_PERSON)
        people = 8 + int(max(needed, usual * (0.3 + 0.7 * draws.unit())) * (1 + 0.5 * draws.unit()))
        lists = {name: maker.words(draws, name, _LIST_SIZE) for name in CATEGORIES if name != "person"}
        world = World(maker.words(draws, "person", people), lists, unique=False, stepwise=maker.version == 2)
        self._author = Author(world, self._wording, draws, draws, "train")
        self._asked: list[Asked] = []
        # (time in the story, place in drawing order, text)
        self._timed: list[tuple[float, int, str]] = []
        self._session_lines = draws.between(4, 12)
        self._header_tokens = max(count(text.format(d="28 September")) for text in self._wording.sessions)

    def _say(self, lines: list[str], *, room_tokens: int) -> bool:
        """Charge for lines and the session headers they bring; False, and nothing charged, where they do not fit."""
        said = len(self._timed)
        headers = -(-(said + len(lines)) // self._session_lines) - -(-said // self._session_lines)
        tokens = sum(map(self._count, lines)) + headers * self._header_tokens
        if tokens > room_tokens:
            return False
        self._room -= tokens
        self._timed += [(0.0, said + i, text) for i, text in enumerate(lines)]
        return True

    def _plan(self, kind: str, *, room_tokens: int) -> bool:
        """Add a question and its facts; False when the room is used up."""
        draws = self._draws
        try:
            plan = TRAIN_PLANNERS[kind](self._author, draws.below(720))
        except WorldExhaustedError:
            return False
        if not self._say([line(self._wording, draws, fact) for fact in plan.facts], room_tokens=room_tokens):
            return False
        times = [draws.unit() for _ in plan.facts]
        if plan.ordered:
            times.sort()
        first = len(self._timed) - len(times)
        for i, at in enumerate(times, first):
            self._timed[i] = (at, i, self._timed[i][2])
        more = kind != "mrcr" and draws.unit() < MORE_SHARE
        self._asked += plan.asked if more else plan.asked[:1]
        return True

    def document(self) -> Document:
        draws = self._draws
        lines: list[str] = []
        if draws.unit() < _HEAD_SHARE:
            lines = [draws.pick(self._wording.heads)]
            self._room -= self._count(lines[0])
        if self._room >= REPLY_ROOM_TOKENS and draws.unit() < REPLY_SHARE:
            self._plan("mrcr", room_tokens=self._room)
        # Where many questions are wanted in a short row its lines are nearly all evidence: keep some room for filler.
        kept = int(self._room * (0.1 + 0.4 * draws.unit()))
        misses = 0
        while len(self._asked) < self._n_questions and misses < _MISSES:
            misses += not self._plan(self._maker.draw_type(draws), room_tokens=self._room - kept)
        if not self._asked:
            self._plan("no_context", room_tokens=self._room)
        self._fill()
        lines += self._in_sessions()
        questions = [
            Question(FRAME.format(q=asked.question), " " + ", ".join(asked.answer))
            for asked in self._asked[: self._n_questions]
        ]
        draws.shuffle(questions)
        return Document(lines, questions)

    def _fill(self) -> None:
        """Use up the room with filler, which keeps its order: a change stands after what it changes."""
        draws, world, first = self._draws, self._author.world, len(self._timed)
        while True:
            fact = world.filler(draws)
            text = small_talk(self._wording, draws, "train") if fact is None else line(self._wording, draws, fact)
            if not self._say([text], room_tokens=self._room):
                break
        total = len(self._timed) - first
        for i in range(first, len(self._timed)):
            self._timed[i] = ((i - first + draws.unit()) / total, i, self._timed[i][2])

    def _in_sessions(self) -> list[str]:
        draws = self._draws
        ordered = sorted(self._timed)
        lines: list[str] = []
        for i, (_, _, text) in enumerate(ordered):
            if i % self._session_lines == 0:
                day = date_text(int(DAYS * i / len(ordered)))
                lines.append(draws.pick(self._wording.sessions).format(d=day))
            lines.append(text)
        return lines
