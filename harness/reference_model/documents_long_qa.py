"""long_qa training documents: many questions of every type about one story, in training words and wording.

The story comes from the simulator of the evaluation task (kvscope.tasks.long_qa). A third of the values are made-up
words and many are plain nouns, so a model learns to copy what stands in the text, not to name a likely town.
"""

from collections.abc import Callable

from kvscope.harness.reference_model.documents import Document, Question
from kvscope.harness.reference_model.documents_long_qa_templates import TRAIN_WORDING
from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.lexicon import CATEGORIES, category_of, chatter, date_text, lexicon
from kvscope.tasks.long_qa.plan import Asked, Author
from kvscope.tasks.long_qa.questions import PLANNERS
from kvscope.tasks.long_qa.render import line, small_talk
from kvscope.tasks.long_qa.wording import FRAME
from kvscope.tasks.long_qa.world import DAYS, World, WorldExhaustedError

# How often a question's plan is of a type; what takes several steps comes more often.
SHARES: dict[str, float] = {
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


class LongQADocuments:
    """Makes long_qa documents (a ``DocumentMaker``)."""

    def __init__(self) -> None:
        self._lexicon = lexicon("train")
        self._nouns = chatter("train")[1]
        self._types = tuple(SHARES)

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
                word = made_up_word(draws)
                if word in category_of():  # it could be evaluation's
                    continue
                word = word.capitalize() if category in _CAPITALISED else word
            found[word] = None
        return list(found)

    def draw_type(self, draws: Draws) -> str:
        """Draw a question type."""
        at = draws.unit() * sum(SHARES.values())
        for name, share in SHARES.items():
            at -= share
            if at < 0:
                return name
        return self._types[-1]


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
        self._room, self._n_questions = room_tokens, n_questions
        needed = min(n_questions, room_tokens / _TOKENS_PER_PLAN) * _PEOPLE_PER_PLAN
        usual = min(100, room_tokens / _TOKENS_PER_PERSON)
        people = 8 + int(max(needed, usual * (0.3 + 0.7 * draws.unit())) * (1 + 0.5 * draws.unit()))
        lists = {name: maker.words(draws, name, _LIST_SIZE) for name in CATEGORIES if name != "person"}
        world = World(maker.words(draws, "person", people), lists, unique=False)
        self._author = Author(world, TRAIN_WORDING, draws, draws, "train")
        self._asked: list[Asked] = []
        # (time in the story, place in drawing order, text)
        self._timed: list[tuple[float, int, str]] = []
        self._session_lines = draws.between(4, 12)
        self._header_tokens = max(count(text.format(d="28 September")) for text in TRAIN_WORDING.sessions)

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
            plan = PLANNERS[kind](self._author, draws.below(720))
        except WorldExhaustedError:
            return False
        if not self._say([line(TRAIN_WORDING, draws, fact) for fact in plan.facts], room_tokens=room_tokens):
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
            lines = [draws.pick(TRAIN_WORDING.heads)]
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
            text = small_talk(TRAIN_WORDING, draws, "train") if fact is None else line(TRAIN_WORDING, draws, fact)
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
                lines.append(draws.pick(TRAIN_WORDING.sessions).format(d=day))
            lines.append(text)
        return lines
