"""jsonl: prompts of a user's own, from a file of one JSON object a line."""

import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from kvscope.errors import UsageError, shown
from kvscope.paths import user_path
from kvscope.tasks.answers import METRICS
from kvscope.tasks.assembled import Assembled
from kvscope.tasks.base import Sample, Task, Tokenizer
from kvscope.tasks.jsonl_file import COMPRESSED, read_jsonl
from kvscope.units import Tokens

Metric = Literal["string_match_all", "string_match_any", "exact_match", "f1"]
Stop = Literal["line", "none"]
MOST_LABEL_CHARACTERS = 64
NEW_TOKENS = 64
_ENCODED_TOGETHER = 64
"""Lines that a tokenizer gets at once: a fast one then uses every core."""


class JsonlTask(Task):
    """Prompts of a file, in the file's order, each at the length it has.

    Args:
        data: file of one JSON object a line, .gz and .xz unpacked: prompt, or context and question (put together with
            an empty line between); answers (text or a list); optional id, metric and meta.
        metric: how answers are scored where a line does not say: string_match_all (the share of the answers found),
            string_match_any (one of them found), exact_match, or f1 (words in common, as SQuAD has it).
        new_tokens: room left for an answer.
        stop: what ends an answer beside the model's own end: a line break where no expected answer has one (line), or
            nothing (none).
        label: what rows call the task, after ``jsonl:``; none: the file's name without its ending.
    """

    own_lengths = True
    source = "a file of your own"

    def __init__(
        self,
        name: str,
        *,
        data: str,
        metric: Metric = "string_match_all",
        new_tokens: Tokens = NEW_TOKENS,
        stop: Stop = "line",
        label: str | None = None,
    ) -> None:
        if new_tokens < 1:
            raise UsageError(f"Task {name}: new_tokens must be at least 1, got {new_tokens}.")
        label = _stem(Path(data)) if label is None else label
        self.name = f"{name}:{re.sub(r'[^A-Za-z0-9_.-]', '_', label)[:MOST_LABEL_CHARACTERS]}"
        self.max_new_tokens = new_tokens
        self._lines, self.data_sha256 = read_jsonl(user_path(data, what="data"))
        self.n_samples = len(self._lines)
        self._stop = stop
        self._encoded: tuple[Tokenizer, list[array[int]]] | None = None
        self._metrics = [line.metric or metric for line in self._lines]
        # By question type, so that reports never add up scores of two kinds without a word.
        self.question_types = tuple(each for each in METRICS if each in self._metrics)

    def min_length_tokens(self, tokenizer: Tokenizer) -> int:
        """Return the length that every prompt of the file can be asked at."""
        return self.least_length_tokens(tokenizer, samples=len(self._lines))

    def least_length_tokens(self, tokenizer: Tokenizer, *, samples: int) -> int:
        """Return the length that holds the longest of the first prompts, and an answer."""
        return self.max_new_tokens + max(map(len, self._all_ids(tokenizer)[:samples]))

    def short_samples(self, tokenizer: Tokenizer, *, samples: int) -> tuple[int, ...]:
        """Return the shortest prompt, and the one of the shortest context."""
        whole = self._all_ids(tokenizer)[:samples]
        before = [len(line.context or line.text) for line in self._lines[:samples]]
        return tuple(sorted({whole.index(min(whole, key=len)), before.index(min(before))}))

    def build(self, tokenizer: Tokenizer, *, length_tokens: int, sample: int, seed: int) -> Sample:
        """Return the prompt of line ``sample + 1``, whatever the seed.

        Raises:
            UsageError: it does not fit: nothing is cut.
        """
        line = self._lines[sample]
        ids = tuple(self._all_ids(tokenizer)[sample])
        if len(ids) + self.max_new_tokens > length_tokens:
            raise UsageError(
                f"Line {sample + 1} of {self.name} has {len(ids):,} tokens, which with {self.max_new_tokens} for the "
                f"answer is over the length {length_tokens:,}: use a larger --length."
            )
        context_ids = _ids(tokenizer, [line.context])[0] if line.context else ids
        question_start = _question_start(ids, context_ids)
        made = Assembled(ids, line.text, line_spans=[], body_start=0, body_end=question_start)
        return made.sample(
            self,
            question_type=self._metrics[sample],
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            evidence=(),
            targets=line.answers,
            stop=() if self._stop == "none" or any("\n" in answer for answer in line.answers) else ("\n",),
        )

    def fill(self, tokenizer: Tokenizer, *, prompt_tokens: int, seed: int) -> tuple[tuple[int, ...], int]:
        """Return the file's prompts one after another, over and over, cut to ``prompt_tokens``."""
        found: list[int] = []
        while len(found) < prompt_tokens:
            for ids in self._all_ids(tokenizer):
                found += ids
                if len(found) >= prompt_tokens:
                    break
        return tuple(found[:prompt_tokens]), prompt_tokens - 1

    def score(self, sample: Sample, output: str) -> float:
        """Score an answer by its line's metric, which is the sample's question type."""
        return METRICS[sample.question_type](sample.targets, output)

    def _all_ids(self, tokenizer: Tokenizer) -> "list[array[int]]":
        """Return every prompt's token ids: a run asks for them again and again, and long ones take a while."""
        if self._encoded is None or self._encoded[0] is not tokenizer:
            texts = [line.text for line in self._lines]
            parts = (texts[at : at + _ENCODED_TOGETHER] for at in range(0, len(texts), _ENCODED_TOGETHER))
            self._encoded = tokenizer, [array("I", ids) for part in parts for ids in _ids(tokenizer, part)]
        return self._encoded[1]


def _stem(path: Path) -> str:
    """Return a file's name without its endings: one, and that of compression."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).stem


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=True)["input_ids"]
    for text, ids in zip(texts, found, strict=True):
        if not ids:
            raise UsageError(f"The tokenizer of {tokenizer.name_or_path} leaves nothing of the prompt {shown(text)}.")
    return found


def _question_start(ids: Sequence[int], context_ids: Sequence[int]) -> int:
    """Return where the prompt leaves its context; the last token where that is all there is (a whole ``prompt``)."""
    same = next((i for i, (one, other) in enumerate(zip(ids, context_ids, strict=False)) if one != other), None)
    return min(len(context_ids) if same is None else same, len(ids) - 1)
