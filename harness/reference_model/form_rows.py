"""Rows of the form families: solved examples, the real problem, and its questions, written in one row's style.

A row begins as a prompt of evaluation does, right behind the beginning-of-sequence token; what is left of its length
stands behind the last answer. Answers carry loss, those of solved examples too, but only the real problem's end with
end-of-sequence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvscope.harness.reference_model.curriculum import Row, Shape
from kvscope.harness.reference_model.form_answers import AnswerForm, draw_form
from kvscope.harness.reference_model.form_chains import ChainWording
from kvscope.harness.reference_model.form_counts import CodedWording, CommonWording
from kvscope.harness.reference_model.form_needles import NeedleWording
from kvscope.harness.reference_model.form_noise import Noise
from kvscope.harness.reference_model.form_problem import Asked, Problem, Sizes, Tools, Wording
from kvscope.harness.reference_model.pieces import Ids, Pieces
from kvscope.harness.reference_model.tokenizer import BOS_ID, EOS_ID
from kvscope.tasks.draws import Draws

FAMILIES: Mapping[str, Callable[[Draws], Wording]] = MappingProxyType(
    {"vt_forms": ChainWording, "needle_forms": NeedleWording, "cwe_forms": CommonWording, "fwe_forms": CodedWording}
)
_LABELS = (
    ("Question: ", "Answer:"), ("Question: ", "Answer:"), ("Q: ", "A:"), ("", ""), ("", ""), ("", "Answer:"),
    ("Question: ", ""), ("QUESTION: ", "ANSWER:"), ("### Question\n", "### Answer\n"), ("User: ", "Assistant:"),
    ("", "Solution:"), ("Ask: ", "Reply:"), ("", "=>"), ("Query: ", "Result:"),
)  # fmt: skip
_EXAMPLE_ENDS = ("\n\n", "\n\n", "\n\n\n\n", "\n", "\n---\n", "\n\n###\n\n", "\n\n\n")
_EXAMPLE_HEADS = ("", "", "", "Example:\n", "Here is an example.\n", "For example:\n\n", "### Example\n")
_REAL_HEADS = ("", "", "", "Now the real one:\n", "Your turn.\n", "### Task\n")
_EXAMPLE_TOKENS = (90, 700)
# A problem is made anew with less room where it came out too long for the row.
_SHRINK = (1.0, 0.9, 0.75)


@dataclass(frozen=True)
class Style:
    """How a row is written, beside its family's wording.

    Attributes:
        examples: solved examples before the real problem.
        every_head: every problem has the instruction, not the first alone.
        instruct: what asks for the answer's form, and where: in the "head" or the "question".
        begins: whether the beginning of the answer is given, beyond its label.
        places: where the question stands: "last", "first" or "both".
        joint: between question and answer's label.
        tail: behind an example's beginning of the answer.
    """

    examples: int
    every_head: bool
    labels: tuple[str, str]
    form: AnswerForm
    instruct: tuple[str, str]
    begins: bool
    places: str
    joint: str
    before_question: str
    head_joint: str
    example_head: str
    example_end: str
    real_head: str
    tail: str
    between: str

    @classmethod
    def draw(cls, draws: Draws) -> "Style":
        """Draw a style."""
        at = draws.unit()
        examples = 0 if at < 0.42 else 1 if at < 0.85 else draws.between(2, 4)
        form, instruction = draw_form(draws, shown=examples > 0)
        place = draws.unit()
        return cls(
            examples=examples,
            every_head=draws.unit() < 0.7,
            labels=draws.pick(_LABELS),
            form=form,
            instruct=(instruction, draws.pick(("head", "question"))),
            begins=draws.unit() < 0.65,
            places="last" if place < 0.86 else "first" if place < 0.93 else "both",
            joint=draws.pick((" ", " ", "\n", "\n\n")),
            before_question=draws.pick(("\n", "\n", "\n\n", " ")),
            head_joint=draws.pick(("\n", "\n", "\n\n", " ")),
            example_head=draws.pick(_EXAMPLE_HEADS),
            example_end=draws.pick(_EXAMPLE_ENDS),
            real_head=draws.pick(_REAL_HEADS),
            tail=" " if draws.unit() < 0.15 else "",
            between=draws.pick(("", "", "\n", "\n\n")),
        )

    def head(self, head: str, question: str) -> str:
        """Return what stands before a haystack; ``question`` is "" where it is asked behind it only."""
        instruction = self.instruct[0] if self.instruct[1] == "head" else ""
        parts = [part for part in (head, instruction, self.labels[0] + question if question else "") if part]
        return " ".join(parts) + self.head_joint if parts else ""

    def prompt(self, asked: Asked, *, repeat: bool) -> str:
        """Return a question up to its answer; ``repeat``: the question itself, not only the answer's label."""
        instruction = self.instruct[0] if self.instruct[1] == "question" else ""
        asks = " ".join(part for part in (asked.question if repeat else "", instruction) if part)
        begin = asked.begin if self.begins else ""
        answer = " ".join(part for part in (self.labels[1], begin) if part) if self.labels[1][-1:] != "\n" else (
            self.labels[1] + begin
        )  # fmt: skip
        question = self.labels[0] + asks if asks else ""
        return question + self.joint + answer if question and answer else (question or answer or "Answer:")


class FormRows:
    """Makes rows of the form families; deterministic in the draws it is given."""

    def __init__(self, pieces: Pieces, fillers: list[Ids]) -> None:
        self._pieces, self._fillers = pieces, fillers
        self._noise: Noise | None = None

    @property
    def noise(self) -> Noise:
        """The sentences, made on first use: phases without form families do not need them."""
        if self._noise is None:
            self._noise = Noise(lambda text: len(self._pieces.ids_of(text)))
        return self._noise

    def make(self, family: str, shape: Shape, draws: Draws) -> Row | None:
        """Return one row; None where the length does not hold a problem."""
        style = Style.draw(draws)
        wording = FAMILIES[family](draws)
        tools = Tools(self.noise, self.noise.layout(draws), Sizes(self.noise.count))
        row = _Row(self._pieces)
        n_examples = style.examples if shape.tokens > 500 else min(1, style.examples)
        most = max(_EXAMPLE_TOKENS[0], min(_EXAMPLE_TOKENS[1], shape.tokens // (3 * max(1, n_examples))))
        for i in range(n_examples):
            room = draws.between(_EXAMPLE_TOKENS[0], most)
            problem = wording.problem(draws, tools, room_tokens=room, n_questions=1, small=True)
            if problem.asked:
                row.add(style.example_head)
                _write_example(row, style, wording.head if style.every_head or i == 0 else "", problem)
        if row.ids[1:]:
            row.add(style.real_head)
        alone = style.places != "last"
        head = wording.head if style.every_head or not n_examples else ""
        overhead = len(self._pieces.ids_of(style.head(head, ""))) + 12
        n_questions = 1 if alone or draws.unit() < 0.1 else shape.questions
        # A question and its answer take 20 to 80 tokens; half of a short row at most is questions.
        n_questions = max(1, min(n_questions, shape.tokens // 110))
        left = shape.tokens - len(row.ids) - overhead
        for share in _SHRINK:
            real = row.copy()
            room = int(left * share)
            problem = wording.problem(draws, tools, room_tokens=room, n_questions=n_questions, small=False)
            if problem.asked and _write_real(real, style, head, problem, shape.tokens):
                return real.row(family, shape.tokens, draws, self._fillers)
        return None


def _write_example(row: "_Row", style: Style, head: str, problem: Problem) -> None:
    asked = problem.asked[0]
    first = asked.question if style.places != "last" else ""
    row.add(style.head(head, first) + problem.body + style.before_question)
    row.add(style.prompt(asked, repeat=style.places != "first") + style.tail)
    row.answer(style.form.write(asked.items))
    row.add(style.example_end)


def _write_real(row: "_Row", style: Style, head: str, problem: Problem, tokens: int) -> bool:
    """Write the problem and as many of its questions as fit; False where none does."""
    first = problem.asked[0].question if style.places != "last" else ""
    row.add(style.head(head, first) + problem.body)
    written = 0
    for i, asked in enumerate(problem.asked):
        ends = len(row.ids), len(row.answer_at)
        row.add((style.between if i else style.before_question) + style.prompt(asked, repeat=style.places != "first"))
        row.answer(style.form.write(asked.items), ends=True)
        if len(row.ids) > tokens:
            del row.ids[ends[0] :], row.answer_at[ends[1] :]
            break
        written += 1
    return written > 0


class _Row:
    """Ids and scored places of a row in the making."""

    def __init__(self, pieces: Pieces, ids: Ids | None = None, answer_at: list[int] | None = None) -> None:
        self._pieces = pieces
        self.ids = ids if ids is not None else [BOS_ID]
        self.answer_at = answer_at if answer_at is not None else []

    def copy(self) -> "_Row":
        return _Row(self._pieces, list(self.ids), list(self.answer_at))

    def add(self, text: str) -> None:
        if text:
            self.ids += self._pieces.ids_of(text)

    def answer(self, text: str, *, ends: bool = False) -> None:
        start = len(self.ids)
        self.ids += self._pieces.ids_of(text)
        if ends:
            self.ids.append(EOS_ID)
        self.answer_at += range(start - 1, len(self.ids) - 1)

    def row(self, family: str, tokens: int, draws: Draws, fillers: list[Ids]) -> Row:
        """Return the row, filled up to its length behind the last answer."""
        while len(self.ids) < tokens:
            self.ids += draws.pick(fillers)
        return Row(self.ids[:tokens], self.answer_at, family)
