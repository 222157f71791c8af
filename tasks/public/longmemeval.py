"""LongMemEval (arXiv 2410.10813): questions about dated chats between a user and an assistant."""

from typing import Literal

from pydantic import Field, model_validator

from kvscope.errors import UsageError
from kvscope.tasks.answers import METRICS
from kvscope.tasks.base import Sample, Task, Tokenizer
from kvscope.tasks.public.built import Parts, built, encoded
from kvscope.tasks.public.records import Record, benchmark_records
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
    question_type: str
    question: str
    answer: str | int
    question_date: str
    haystack_dates: tuple[str, ...]
    haystack_session_ids: tuple[str, ...]
    haystack_sessions: tuple[tuple[Turn, ...], ...]
    answer_session_ids: tuple[str, ...]

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


class LongMemEvalTask(Task):
    """Questions of LongMemEval, each at the length it has; nothing is cut.

    The wording around chats and question is kvscope's own. Answers are scored by words in common with the reference,
    not by the benchmark's judge, which is a model. Preferences and questions to be declined need that judge: they are
    left out.

    Args:
        data: file of the dataset (JSON list, JSON lines or Parquet); none: what ``kvscope tasks fetch`` brought.
        metric: f1 (words in common, as SQuAD has it), string_match_any or exact_match.
        new_tokens: room left for an answer.
    """

    own_lengths = True
    source = "LongMemEval, arXiv 2410.10813; wording and score of kvscope"

    def __init__(self, name: str, *, data: str | None = None, metric: Metric = "f1", new_tokens: Tokens = 128) -> None:
        if new_tokens < 1:
            raise UsageError(f"Task {name}: new_tokens must be at least 1, got {new_tokens}.")
        self.name, self.max_new_tokens, self._metric = name, new_tokens, METRICS[metric]
        records, self.data_sha256 = benchmark_records(name, data, Question)
        self._questions = tuple(each for each in records if each.is_scored)
        if not self._questions:
            raise UsageError(f"The data of {name} has no question that can be scored without a judge.")
        self.n_samples = len(self._questions)
        self.question_types = tuple(sorted({each.question_type for each in self._questions}))

    def min_length_tokens(self, tokenizer: Tokenizer) -> int:
        """Return the length that holds the longest prompt of the file, and an answer."""
        longest = max(self._questions, key=lambda each: sum(len(t.content) for s in each.haystack_sessions for t in s))
        return self.max_new_tokens + len(encoded(tokenizer, _parts(longest).text))

    def build(self, tokenizer: Tokenizer, *, length_tokens: int, sample: int, seed: int) -> Sample:
        """Return question ``sample``, whatever the seed (see Task.build)."""
        question = self._questions[sample]
        made = built(
            tokenizer,
            _parts(question),
            room_tokens=length_tokens - self.max_new_tokens,
            cuts=False,
            what=f"Question {question.question_id!r} of {self.name}",
        )
        return made.assembled.sample(
            self,
            question_type=question.question_type,
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            evidence=made.evidence,
            targets=(str(question.answer),),
        )

    def score(self, sample: Sample, output: str) -> float:
        """Score an answer by the metric asked for."""
        return self._metric(sample.targets, output)


def _parts(question: Question) -> Parts:
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
        head="These are chats between a user and an assistant, with their dates. A question about them follows.\n\n",
        context="".join(sessions),
        tail=f"It is {question.question_date}. The user asks: {question.question}\nThe answer in a few words is:",
        evidence=evidence,
    )
