"""LongMemEval (arXiv 2410.10813): questions about dated chats between a user and an assistant."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from kvscope.tasks.answers import METRICS
from kvscope.tasks.base import Sample
from kvscope.tasks.public.built import Parts
from kvscope.tasks.public.records import Record, benchmark_records
from kvscope.tasks.public.task import BenchmarkTask
from kvscope.units import Tokens

Metric = Literal["f1", "string_match_any", "exact_match"]
NEEDS_JUDGE = ("single-session-preference",)
"""Question types whose reference is a rubric; questions that are to be declined (``_abs``) have one, too."""
_ABSTENTION = "_abs"


class Turn(Record):
    """One message; what is said may be nothing."""

    role: Literal["user", "assistant"]
    content: str = Field(min_length=0)


class Question(Record):
    """A record of the dataset."""

    question_id: str
    question_type: Literal[
        "single-session-user",
        "single-session-assistant",
        "single-session-preference",
        "multi-session",
        "temporal-reasoning",
        "knowledge-update",
    ]
    question: str
    answer: str
    question_date: str
    haystack_dates: tuple[str, ...]
    haystack_session_ids: tuple[str, ...]
    haystack_sessions: tuple[tuple[Turn, ...], ...]
    answer_session_ids: tuple[str, ...]

    @field_validator("answer", mode="before")
    @classmethod
    def _number_as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @property
    def identity(self) -> str:
        """The dataset's ``question_id``."""
        return self.question_id

    @model_validator(mode="after")
    def _as_many_of_each(self) -> "Question":
        counts = {len(self.haystack_dates), len(self.haystack_session_ids), len(self.haystack_sessions)}
        if len(counts) > 1:
            raise ValueError("haystack_dates, haystack_session_ids and haystack_sessions differ in length")
        return self

    @property
    def is_scored(self) -> bool:
        """Whether its reference is an answer, not a rubric for a judge."""
        return self.question_type not in NEEDS_JUDGE and not self.question_id.endswith(_ABSTENTION)


class LongMemEvalTask(BenchmarkTask[Question]):
    """Questions of LongMemEval, each at the length it has; nothing is cut.

    The wording around chats and question is kvscope's own. Answers are scored by words in common with the reference,
    not by the benchmark's judge, which is a model. Preferences and questions to be declined need that judge: they are
    left out.

    Args:
        data: file of the dataset (JSON list, JSON lines or Parquet); none: what ``kvscope tasks fetch`` brought.
        metric: f1 (words in common, as SQuAD has it), string_match_any or exact_match.
        new_tokens: room left for an answer.
    """

    source = "LongMemEval, arXiv 2410.10813; wording and score of kvscope"

    def __init__(self, name: str, *, data: str | None = None, metric: Metric = "f1", new_tokens: Tokens = 128) -> None:
        self._metric = METRICS[metric]
        records, data_sha256 = benchmark_records(name, data, Question)
        questions = tuple(each for each in records if each.is_scored)
        none = f"The data of {name} has no question that can be scored without a judge."
        super().__init__(name, questions, data_sha256=data_sha256, new_tokens=new_tokens, none=none)

    def parts(self, question: Question) -> Parts:
        """Return the chats in their order, with dates, and the question."""
        sessions, evidence, at = [], [], 0
        for date, session_id, turns in zip(
            question.haystack_dates, question.haystack_session_ids, question.haystack_sessions, strict=True
        ):
            said = "".join(f"{turn.role.capitalize()}: {turn.content}\n" for turn in turns)
            text = f"Chat of {date}\n{said}\n"
            if session_id in question.answer_session_ids:
                evidence.append((at, at + len(text)))
            sessions.append(text)
            at += len(text)
        return Parts(
            head="These are dated chats between a user and an assistant. A question about them follows.\n\n",
            context="".join(sessions),
            tail=f"It is {question.question_date}. The user asks: {question.question}\nThe answer in a few words is:",
            evidence=evidence,
        )

    def type_of(self, question: Question) -> str:
        """Return the benchmark's own type."""
        return question.question_type

    def targets_of(self, question: Question) -> tuple[str, ...]:
        """Return the reference."""
        return (question.answer,)

    def score(self, sample: Sample, output: str) -> float:
        """Score an answer by the metric asked for."""
        return self._metric(sample.targets, output)
