"""What a task is: prompts of an exact token length with known evidence, and a score in [0, 1]."""

import abc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that tasks use."""

    name_or_path: str

    def __call__(
        self, text: str | list[str], *, add_special_tokens: bool = ..., return_offsets_mapping: bool = ...
    ) -> Any: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt. Positions are token indices into ``ids``.

    Attributes:
        task: registry name of the task.
        question_type: the kind of question, for accuracy by type.
        length_tokens: ``len(ids) + max_new_tokens``.
        sample: index of the sample within its (task, length, seed) cell.
        seed: the run's seed.
        ids: the prompt's token ids, special tokens included.
        text: the same prompt as text; the tokenizer maps it to ``ids`` exactly.
        question_start: index of the question's first token (``method_from = question`` splits here).
        evidence_spans: ``(start, end)`` of every stretch the answer needs, ascending.
        depth: start of the evidence as a fraction of the haystack, 0 (oldest) to 1; a mean where there are several,
            None where the answer needs none.
        prompt_sha256: hash of ``text`` in UTF-8.
        targets: strings of the expected answer, in its order; the task's score says which must be found.
        max_new_tokens: room left for the answer.
        stop: strings that end the answer.
        truncated_tokens: tokens that a benchmark's rule left out of the prompt's middle.
    """

    task: str
    question_type: str
    length_tokens: int
    sample: int
    seed: int
    ids: tuple[int, ...]
    text: str
    question_start: int
    evidence_spans: tuple[tuple[int, int], ...]
    depth: float | None
    prompt_sha256: str
    targets: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ("\n",)
    truncated_tokens: int = 0


class Task(abc.ABC):
    """A generator of samples and their score. Its options are the keyword-only arguments of its ``__init__``.

    Attributes:
        name: what rows call it.
        max_new_tokens: room left for the answer.
        question_types: every ``Sample.question_type``.
        n_samples: prompts there are; None where any number can be built.
        own_lengths: whether its prompts have the length they have; a length asked for is then the most they may have.
        fills_length: whether such prompts are longer where the length asked for is.
        data_sha256: hash of the data its prompts come from, which a run folder keeps; None without such data.
        description: what it asks for, one clause.
        source: the citation.
    """

    name: str
    max_new_tokens: int
    question_types: tuple[str, ...]
    n_samples: int | None = None
    own_lengths: ClassVar[bool] = False
    fills_length: ClassVar[bool] = False
    data_sha256: str | None = None
    description: ClassVar[str] = ""
    source: ClassVar[str] = ""

    @abc.abstractmethod
    def min_length_tokens(self, tokenizer: Tokenizer) -> int:
        """Return a length (prompt + answer room) at which every sample can be built."""

    def least_length_tokens(self, tokenizer: Tokenizer, *, samples: int) -> int:
        """Return a length at which the first ``samples`` can be built; a task of given prompts may know a smaller one.

        Args:
            samples: at least 1.
        """
        return self.min_length_tokens(tokenizer)

    def short_samples(self, tokenizer: Tokenizer, *, samples: int) -> tuple[int, ...]:
        """Return those of the first ``samples`` that may be shortest, whole or before their question.

        Args:
            samples: at least 1.
        """
        return (0,)

    @abc.abstractmethod
    def build(self, tokenizer: Tokenizer, *, length_tokens: int, sample: int, seed: int) -> Sample:
        """Build one sample; the same arguments give the same bytes on every machine.

        Raises:
            UsageError: ``length_tokens`` is too small, or the tokenizer does not keep the prompt's text.
        """

    @abc.abstractmethod
    def score(self, sample: Sample, output: str) -> float:
        """Score an answer in [0, 1]."""

    def fill(self, tokenizer: Tokenizer, *, prompt_tokens: int, seed: int) -> tuple[tuple[int, ...], int]:
        """Return a prompt of exactly ``prompt_tokens`` for the memory passes: (ids, index where its question starts).

        Raises:
            UsageError: as ``build``.
        """
        sample = self.build(tokenizer, length_tokens=prompt_tokens + self.max_new_tokens, sample=0, seed=seed)
        return sample.ids, sample.question_start


def contains_all_score(targets: Sequence[str], output: str) -> float:
    """RULER's ``string_match_all``: the share of targets found in the output, case ignored."""
    low = output.lower()
    return sum(target.lower() in low for target in targets) / len(targets)


def text_sha256(text: str) -> str:
    """Hash a prompt's text."""
    return hashlib.sha256(text.encode()).hexdigest()
