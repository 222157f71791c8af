"""LongBench v2 (arXiv 2412.15204): four-way multiple choice about long documents, code and dialogues."""

import re
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from kvscope.tasks.base import Sample, Tokenizer
from kvscope.tasks.public.built import Parts, encoded
from kvscope.tasks.public.lm_eval_files import lm_eval_text, no_prompt
from kvscope.tasks.public.records import Record, benchmark_records
from kvscope.tasks.public.task import BenchmarkTask
from kvscope.units import Tokens

LETTERS = ("A", "B", "C", "D")
_PROMPT_FILE = Path("tasks", "longbench2", "_longbench_common_yaml")
_MARK = "\0context\0"
_SENTENCE = re.compile(r"correct answer is[:\s]*\(?([A-D])\b")
_ALONE = re.compile(r"^\W*([A-D])(?=[ \t]*$|[).:,])", re.MULTILINE)
"""A letter at the beginning of a line; what follows tells it from the article of ``A man``."""


class Question(Record):
    """A record of the dataset: choices one by one (``choice_A`` ...) or as a list."""

    id: str | None = Field(default=None, alias="_id")
    domain: str
    difficulty: Literal["easy", "hard"]
    question: str
    answer: Literal["A", "B", "C", "D"]
    context: str
    choices: tuple[str, str, str, str] = Field(default=("", "", "", ""))

    @property
    def identity(self) -> str | None:
        """The dataset's ``_id``."""
        return self.id

    @model_validator(mode="before")
    @classmethod
    def _choices(cls, values: object) -> object:
        if isinstance(values, dict) and "choices" not in values:
            absent = [f"choice_{letter}" for letter in LETTERS if not isinstance(values.get(f"choice_{letter}"), str)]
            if absent:
                raise ValueError(f"{absent[0]} is missing or no text")
            return {**values, "choices": [values[f"choice_{letter}"] for letter in LETTERS]}
        return values


class LongBenchV2Task(BenchmarkTask[Question]):
    """Questions of LongBench v2, each at the length it has; the middle of a longer prompt is cut out.

    The prompt is that of the installed lm-eval (its task ``longbench2``). An answer counts by the letter it names.

    Args:
        data: file of the dataset (JSON list, JSON lines or Parquet); none: what ``kvscope tasks fetch`` brought.
        new_tokens: room left for an answer.
    """

    cuts = fills_length = True
    stop = ()
    source = "LongBench v2, arXiv 2412.15204; prompt of lm-eval"

    def __init__(self, name: str, *, data: str | None = None, new_tokens: Tokens = 128) -> None:
        questions, data_sha256 = benchmark_records(name, data, Question)
        none = f"The data of {name} has no question."
        super().__init__(name, questions, data_sha256=data_sha256, new_tokens=new_tokens, none=none)

    def parts(self, question: Question) -> Parts:
        """Return lm-eval's prompt."""
        import jinja2

        # A prompt is no HTML: nothing is escaped.
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # nosec B701
        text = environment.from_string(_prompt()).render(
            context=_MARK, question=question.question, choices=list(question.choices)
        )
        head, _, tail = text.partition(_MARK)
        return Parts(head=head, context=question.context, tail=tail)

    def type_of(self, question: Question) -> str:
        """Return easy or hard."""
        return question.difficulty

    def targets_of(self, question: Question) -> tuple[str, ...]:
        """Return the right letter."""
        return (question.answer,)

    def least_length_tokens(self, tokenizer: Tokenizer, *, samples: int) -> int:
        """Return the answer room and twice the longest question: as much again for context."""
        asked = (parts.head + parts.tail for parts in map(self.parts, self._questions[:samples]))
        return self.max_new_tokens + 2 * max(len(encoded(tokenizer, text)) for text in asked)

    def score(self, sample: Sample, output: str) -> float:
        """Return 1 where the answer names the right letter first, as ``The correct answer is (B)``, or else as ``B``.

        Asterisks (bold) are left out, as in LongBench's own code.
        """
        output = output.replace("*", "")
        found = _SENTENCE.search(output) or _ALONE.search(output)
        return float(found is not None and found[1] == sample.targets[0])


@cache
def _prompt() -> str:
    """Return lm-eval's template of a prompt."""
    import yaml

    text = lm_eval_text(_PROMPT_FILE)
    said = None if text is None else yaml.safe_load(text).get("doc_to_text")
    if not isinstance(said, str) or "{{context}}" not in said:
        raise no_prompt("longbench2")
    return said
