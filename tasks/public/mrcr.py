"""MRCR as OpenAI published it: repeat the i-th of several replies that answer the same request."""

from difflib import SequenceMatcher
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from kvscope.tasks.base import Sample
from kvscope.tasks.public.built import Parts
from kvscope.tasks.public.records import Record, benchmark_records
from kvscope.tasks.public.task import BenchmarkTask
from kvscope.units import Tokens


class Message(Record):
    """One turn of the conversation; what is said may be nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str = Field(min_length=0)


_MESSAGES: TypeAdapter[tuple[Message, ...]] = TypeAdapter(tuple[Message, ...])


class Question(Record):
    """A record of the dataset; ``prompt`` is a JSON list of messages."""

    prompt: tuple[Message, ...] = Field(min_length=1)
    answer: str
    random_string_to_prepend: str
    n_needles: int
    n_chars: int

    @field_validator("prompt", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        try:
            return _MESSAGES.validate_json(value) if isinstance(value, str) else value
        except ValidationError as error:
            raise ValueError("prompt is no JSON list of messages with role and content") from error

    @model_validator(mode="after")
    def _can_be_asked(self) -> "Question":
        if self.prompt[-1].role != "user":
            raise ValueError("the last message of prompt is not the user's")
        if not self.answer.startswith(self.random_string_to_prepend):
            raise ValueError("answer does not begin with random_string_to_prepend")
        return self


class MrcrTask(BenchmarkTask[Question]):
    """Conversations of MRCR, each at the length it has, as a transcript that the answer continues; nothing is cut.

    The score is the dataset's own: 0 unless the answer begins with the random text asked for, else the ratio of
    ``difflib.SequenceMatcher`` to the reply that was to be repeated.

    Args:
        data: file of the dataset (Parquet, JSON list or JSON lines); none: what ``kvscope tasks fetch`` brought.
        needles: keep conversations with so many alike requests (2, 4 or 8); none: all.
        most_chars: keep those of at most so many characters; none: all.
        new_tokens: room left for an answer.
    """

    stop = ("\n\nUser:",)
    source = "openai/mrcr, after Michelangelo, arXiv 2409.12640"

    def __init__(
        self,
        name: str,
        *,
        data: str | None = None,
        needles: int | None = None,
        most_chars: int | None = None,
        new_tokens: Tokens = 1024,
    ) -> None:
        records, data_sha256 = benchmark_records(name, data, Question)
        questions = tuple(
            each
            for each in records
            if needles in (None, each.n_needles) and (most_chars is None or each.n_chars <= most_chars)
        )
        none = f"No conversation of {name} has needles={needles} and most_chars={most_chars}."
        super().__init__(name, questions, data_sha256=data_sha256, new_tokens=new_tokens, none=none)

    def parts(self, question: Question) -> Parts:
        """Return the conversation as a transcript; its evidence is the reply that is to be repeated."""
        texts, evidence, at = [], [], 0
        wanted = question.answer.removeprefix(question.random_string_to_prepend)
        for message in question.prompt[:-1]:
            text = f"{message.role.capitalize()}: {message.content}\n\n"
            if message.role == "assistant" and message.content.strip() == wanted.strip():
                evidence.append((at, at + len(text)))
            texts.append(text)
            at += len(text)
        last = question.prompt[-1]
        return Parts(
            head="",
            context="".join(texts),
            tail=f"{last.role.capitalize()}: {last.content}\n\nAssistant:",
            evidence=evidence,
        )

    def type_of(self, question: Question) -> str:
        """Return how many requests are alike."""
        return f"{question.n_needles}_needles"

    def targets_of(self, question: Question) -> tuple[str, ...]:
        """Return the whole answer, and the text that it has to begin with."""
        return question.answer, question.random_string_to_prepend

    def score(self, sample: Sample, output: str) -> float:
        """Score an answer as the dataset does."""
        answer, begin = sample.targets
        said = output.lstrip()
        if not said.startswith(begin):
            return 0.0
        return SequenceMatcher(None, said.removeprefix(begin), answer.removeprefix(begin)).ratio()
