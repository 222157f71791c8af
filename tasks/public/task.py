"""What the tasks of public benchmarks share: each question at the length it has."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from kvscope.errors import UsageError
from kvscope.tasks.base import Sample, Task, Tokenizer
from kvscope.tasks.public.built import Parts, built, encoded

QuestionT = TypeVar("QuestionT")


class BenchmarkTask(Task, Generic[QuestionT]):
    """Questions of a benchmark, in its order.

    Attributes:
        cuts: whether a prompt that is too long loses the middle of its context; else it is refused.
        stop: strings that end an answer.
    """

    own_lengths = True
    cuts: ClassVar[bool] = False
    stop: ClassVar[tuple[str, ...]] = ("\n",)

    def __init__(
        self, name: str, questions: Sequence[QuestionT], *, data_sha256: str, new_tokens: int, none: str
    ) -> None:
        """Keep the questions.

        Args:
            none: what to say where there are none.

        Raises:
            UsageError: there are none, or an answer has no room.
        """
        if new_tokens < 1:
            raise UsageError(f"Task {name}: new_tokens must be at least 1, got {new_tokens}.")
        if not questions:
            raise UsageError(none)
        self.name, self.max_new_tokens, self.data_sha256 = name, new_tokens, data_sha256
        self._questions = questions
        self.n_samples = len(questions)
        self.question_types = tuple(sorted({self.type_of(each) for each in questions}))

    @abstractmethod
    def parts(self, question: QuestionT) -> Parts:
        """Return a question's prompt as text."""

    @abstractmethod
    def type_of(self, question: QuestionT) -> str:
        """Return the kind of a question."""

    @abstractmethod
    def targets_of(self, question: QuestionT) -> tuple[str, ...]:
        """Return what its score needs."""

    def min_length_tokens(self, tokenizer: Tokenizer) -> int:
        """Return the length that every question can be asked at."""
        return self.least_length_tokens(tokenizer, samples=len(self._questions))

    def least_length_tokens(self, tokenizer: Tokenizer, *, samples: int) -> int:
        """Return the length that holds the longest of the first prompts, and an answer."""
        longest = max(map(self.parts, self._questions[:samples]), key=lambda parts: len(parts.text))
        return self.max_new_tokens + len(encoded(tokenizer, longest.text))

    def short_samples(self, tokenizer: Tokenizer, *, samples: int) -> tuple[int, ...]:
        """Return the prompt of the fewest characters, and the one with the fewest before its question."""
        asked = [self.parts(question) for question in self._questions[:samples]]
        whole, tails = [len(parts.text) for parts in asked], [len(parts.tail) for parts in asked]
        before = [each - tail for each, tail in zip(whole, tails, strict=True)]
        return tuple(sorted({whole.index(min(whole)), before.index(min(before))}))

    def build(self, tokenizer: Tokenizer, *, length_tokens: int, sample: int, seed: int) -> Sample:
        """Return question ``sample``, whatever the seed (see Task.build)."""
        question = self._questions[sample]
        made = built(
            tokenizer,
            self.parts(question),
            room_tokens=length_tokens - self.max_new_tokens,
            cuts=self.cuts,
            what=f"Question {sample + 1} of {self.name}",
        )
        return made.assembled.sample(
            self,
            question_type=self.type_of(question),
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            evidence=made.evidence,
            targets=self.targets_of(question),
            stop=self.stop,
            truncated_tokens=made.truncated_tokens,
        )

    def fill(self, tokenizer: Tokenizer, *, prompt_tokens: int, seed: int) -> tuple[tuple[int, ...], int]:
        """Return the first prompt; one that is shorter has its beginning over and over before its question."""
        ids, question_start = super().fill(tokenizer, prompt_tokens=prompt_tokens, seed=seed)
        missing_tokens = prompt_tokens - len(ids)
        before = ids[:question_start] or ids
        again = (before * (missing_tokens // len(before) + 1))[:missing_tokens]
        return (*ids[:question_start], *again, *ids[question_start:]), question_start + missing_tokens
