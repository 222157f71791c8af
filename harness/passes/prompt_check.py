"""Whether prompts that are built again are those of the rows that a folder holds."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.harness.passes.base import SampleStore
from kvscope.harness.passes.contract import build_sample
from kvscope.harness.passes.run_plan import RunPlan

if TYPE_CHECKING:
    from kvscope.results.schema import SampleRow
    from kvscope.tasks.base import Sample, Task


def build(plan: RunPlan, task: "Task", name: str, length_tokens: int, index: int, *, tokenizer: Any = None) -> "Sample":
    """Build a prompt, with its task called as rows call it; by the plan's tokenizer, or by a copy of it.

    A model that is spoken to in its chat template ends its answers itself, and may begin with a line about them: there
    no line break ends one.
    """
    tokenizer = plan.facts.tokenizer if tokenizer is None else tokenizer
    sample = build_sample(task, tokenizer, length_tokens=length_tokens, sample=index, seed=plan.config.seed)
    return replace(sample, task=name, stop=sample.stop if plan.facts.chat_template is None else ())


class PromptCheck:
    """Compares prompts with the rows that are there."""

    def __init__(self, store: SampleStore) -> None:
        self._rows: dict[tuple[str, int, int], SampleRow] = {}
        for row in store.samples():
            self._rows.setdefault((row.task, row.length_tokens, row.sample), row)
        self._folder = store.folder

    def first(self, name: str, length_tokens: int, *, samples: int) -> int | None:
        """Return the first of a cell's prompts that has a row; None where none has."""
        return next((index for index in range(samples) if (name, length_tokens, index) in self._rows), None)

    def compare(self, sample: "Sample") -> None:
        """Compare a prompt with its row, where there is one.

        Raises:
            UsageError: it is another.
        """
        row = self._rows.get((sample.task, sample.length_tokens, sample.sample))
        if row is not None and (row.prompt_sha256, row.prompt_tokens) != (sample.prompt_sha256, len(sample.ids)):
            raise UsageError(
                f"{self._folder} holds another prompt of {sample.task} at {sample.length_tokens:,} tokens, sample "
                f"{sample.sample}: it has {row.prompt_tokens:,} tokens and hash {row.prompt_sha256[:12]} there, "
                f"{len(sample.ids):,} and {sample.prompt_sha256[:12]} now. Something its text is made of has changed: "
                "restore it, or give --out another folder."
            )


def check_first_prompts(plan: RunPlan, store: SampleStore) -> None:
    """Build a prompt of every (task, length) asked for that has rows, and compare it with them.

    Raises:
        UsageError: one is another.
    """
    check = PromptCheck(store)
    for length_tokens in plan.config.lengths_tokens:
        for task, name in zip(plan.tasks, plan.task_names, strict=True):
            index = check.first(name, length_tokens, samples=plan.config.samples)
            if index is not None:
                check.compare(build(plan, task, name, length_tokens, index))
