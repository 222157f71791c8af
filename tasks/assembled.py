"""What every way of building a prompt hands back."""

from collections.abc import Sequence
from typing import NamedTuple

from kvscope.tasks.base import Sample, Task, text_sha256


class Assembled(NamedTuple):
    """A finished prompt.

    Attributes:
        ids: token ids, special tokens included.
        text: the same as text.
        line_spans: ``(start, end)`` token span of every body line that was placed.
        body_start, body_end: token span of the haystack; the question starts where it ends.
    """

    ids: tuple[int, ...]
    text: str
    line_spans: list[tuple[int, int]]
    body_start: int
    body_end: int

    def depth(self, evidence: Sequence[tuple[int, int]]) -> float | None:
        """Return the mean start of the evidence as a fraction of the haystack; None without evidence."""
        if not evidence:
            return None
        tokens = self.body_end - self.body_start
        return sum(start - self.body_start for start, _ in evidence) / len(evidence) / tokens

    def sample(
        self,
        task: Task,
        *,
        question_type: str,
        length_tokens: int,
        sample: int,
        seed: int,
        evidence: Sequence[tuple[int, int]],
        targets: Sequence[str],
        stop: tuple[str, ...] = ("\n",),
        truncated_tokens: int = 0,
    ) -> Sample:
        """Return the sample that asks this prompt; every task's samples are made here.

        Args:
            task: whose name and answer room the sample takes.
            question_type, length_tokens, sample, seed, targets, stop, truncated_tokens: as in ``Sample``.
            evidence: token spans that the answer needs, ascending.
        """
        return Sample(
            task=task.name,
            question_type=question_type,
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            ids=self.ids,
            text=self.text,
            question_start=self.body_end,
            evidence_spans=tuple(evidence),
            depth=self.depth(evidence),
            prompt_sha256=text_sha256(self.text),
            targets=tuple(targets),
            max_new_tokens=task.max_new_tokens,
            stop=stop,
            truncated_tokens=truncated_tokens,
        )
