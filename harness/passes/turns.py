"""The prompts of the accuracy pass that lack rows, in order, and what the user is told of them."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvscope.harness.passes.answering import Prompt
from kvscope.harness.passes.base import SampleStore
from kvscope.harness.passes.builders import PromptBuilders
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.prompt_check import PromptCheck
from kvscope.harness.passes.run_plan import Plan, RunPlan
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.harness.engine.loaded import LoadedModel
    from kvscope.methods.base import CacheMethod
    from kvscope.tasks.base import Sample, Task

DECODE_WORK_TOKENS = 256

Pending = list[tuple[int, list[Any]]]


class Turns:
    """The prompts that lack rows, in order, and what the user is told of them.

    A cell of the progress is one (task, length). It ends with its last row: the next ones may have begun by then.
    """

    def __init__(
        self,
        plan: Plan,
        store: SampleStore,
        progress: Progress,
        cells: "Sequence[tuple[Task, str, int]]",
        builders: PromptBuilders,
    ) -> None:
        self._plan, self._store, self._progress = plan, store, progress
        self._check = PromptCheck(store)
        self._left: deque[tuple[Task, str, int, int, list[CacheMethod[Any]]]] = deque()
        self._in_cell: dict[tuple[str, int], int] = {}
        """Prompts of a cell that are not done."""
        self._methods: dict[Prompt, int] = {}
        for task, name, length_tokens in cells:
            pending = pending_samples(plan, store, name, length_tokens)
            self._left += [(task, name, length_tokens, index, methods) for index, methods in pending]
            if pending:
                self._in_cell[name, length_tokens] = len(pending)
        self._begun: set[tuple[str, int]] = set()
        self._builders = builders
        self._ahead: deque[Callable[[], Sample]] = deque()
        """The first of those left, being built or ready."""
        self._build_ahead()

    @property
    def next_length_tokens(self) -> int | None:
        """Length of the next prompt; None where none is left."""
        return self._left[0][2] if self._left else None

    def take(self, loaded: "LoadedModel") -> "tuple[Prompt, list[CacheMethod[Any]]]":
        """Return the next prompt and its methods without a row.

        Raises:
            UsageError: it is another than that of the rows that are there.
        """
        task, name, length_tokens, index, methods = self._left.popleft()
        ahead = self._ahead.popleft()
        if (name, length_tokens) not in self._begun:
            self._begun.add((name, length_tokens))
            self._progress.begin_cell(_cell_name(name, length_tokens), steps=self._in_cell[name, length_tokens])
        self._progress.begin_step(f"{index + 1} of {self._plan.config.samples}", parts=len(methods) + 1)
        sample = ahead()
        self._build_ahead()
        self._check.compare(sample)
        prompt = Prompt(self._plan, loaded, task, sample, self._progress)
        self._methods[prompt] = len(methods)
        return prompt, methods

    def _build_ahead(self) -> None:
        for at in range(len(self._ahead), min(self._builders.ahead, len(self._left))):
            _, name, length_tokens, index, _ = self._left[at]
            self._ahead.append(self._builders.begin(name, length_tokens, index))

    def part(self, name: str) -> None:
        """Tell what is being done."""
        self._progress.part(name)

    def note(self, text: str) -> None:
        """Tell the user something once."""
        self._progress.note(text)

    def done(self, prompt: Prompt) -> None:
        """Note that a prompt has all its rows."""
        task_name, length_tokens = prompt.sample.task, prompt.sample.length_tokens
        cell = _cell_name(task_name, length_tokens)
        work_tokens = prompt_work_tokens(length_tokens, methods=self._methods.pop(prompt))
        self._progress.end_step(work_tokens=work_tokens, cell=cell)
        self._in_cell[task_name, length_tokens] -= 1
        if not self._in_cell[task_name, length_tokens]:
            self._progress.end_cell(cell_summary(self._plan, self._store, task_name, length_tokens), cell=cell)


def _cell_name(task_name: str, length_tokens: int) -> str:
    return f"{task_name} {format_length(length_tokens)}"


def prompt_work_tokens(length_tokens: int, *, methods: int) -> int:
    """Return what a prompt costs in units of one prefilled token, roughly: for the ETA, which corrects itself."""
    return length_tokens + methods * DECODE_WORK_TOKENS


def pending_samples(plan: RunPlan, store: SampleStore, task_name: str, length_tokens: int) -> Pending:
    """Return (sample index, methods without a row) of one (task, length); prompts that are done are left out."""
    found = []
    for index in range(plan.config.samples):
        methods = [m for m in plan.methods if not store.has_sample((task_name, length_tokens, index, m.label))]
        if methods:
            found.append((index, methods))
    return found


def cell_summary(plan: RunPlan, store: SampleStore, task_name: str, length_tokens: int) -> str:
    """Return the mean pooled score of each method in one (task, length), or how many of its rows failed."""
    parts = []
    rows = [
        row
        for row in store.samples()
        if row.task == task_name
        and row.length_tokens == length_tokens
        and store.info.pools(row.task, row.question_type)
    ]
    for method in plan.methods:
        own = [row for row in rows if row.method_label == method.label]
        scores = [row.score for row in own if row.score is not None]
        text = f"{method.label} {sum(scores) / len(scores):.2f}" if scores else f"{method.label} -"
        bad = len(own) - len(scores)
        parts.append(f"{text} ({bad} not measured)" if bad else text)
    return ", ".join(parts)
