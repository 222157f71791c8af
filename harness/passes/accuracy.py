"""The accuracy pass: one prefill per prompt, every method on it, a row as soon as it exists."""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.harness.passes.answering import Prompt, load, measured_noise, release_memory
from kvscope.harness.passes.base import Left, Plan, failed_lines, is_open
from kvscope.harness.passes.batch_plan import batch_text
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.deadline import Deadline
from kvscope.harness.passes.facts import ModelFacts
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.prompt_check import PromptCheck, build
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.harness.engine.loaded import LoadedModel
    from kvscope.methods.base import CacheMethod
    from kvscope.results.frames import Run
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Task

DECODE_WORK_TOKENS = 256

Pending = list[tuple[int, "list[CacheMethod[Any]]"]]


class AccuracyPass:
    """Answers prompts and scores them."""

    def lengths_tokens(self, config: RunConfig) -> tuple[int, ...]:
        """Return the prompts' lengths; none where nothing is scored."""
        return () if config.unscored else config.lengths_tokens

    def check(self, config: RunConfig, facts: ModelFacts, tasks: "Sequence[Task]") -> None:
        """Refuse a length at which a task cannot be built, and a task whose first prompt cannot be.

        Raises:
            UsageError: naming the length, the task and the least it takes, or what is in the way.
        """
        for task in tasks:
            least_tokens = task.min_length_tokens(facts.tokenizer)
            for length_tokens in config.lengths_tokens:
                if length_tokens < least_tokens:
                    raise UsageError(
                        f"Length {length_tokens:,} is too short for task {task.name!r}: it needs at least "
                        f"{least_tokens:,} tokens."
                    )
            task.build(facts.tokenizer, length_tokens=config.lengths_tokens[0], sample=0, seed=config.seed)

    def cells(self, plan: Plan) -> "list[tuple[Task, str, int]]":
        """Return every (task, what rows call it, length in tokens), shortest length first."""
        tasks = list(zip(plan.tasks, plan.task_names, strict=True))
        return [(task, name, length_tokens) for length_tokens in plan.config.lengths_tokens for task, name in tasks]

    def prefill_tokens(self, plan: Plan) -> int:
        """Return the tokens to prefill: one prefill a prompt, whatever the number of methods."""
        return sum(length_tokens for _, _, length_tokens in self.cells(plan)) * plan.config.samples

    def text(self, plan: Plan) -> list[str]:
        """Return its line of the plan."""
        if not plan.tasks:
            return []
        prompts = len(self.cells(plan)) * plan.config.samples
        return [
            f"accuracy   {prompts:,} prompts, each prefilled once for {len(plan.methods)} methods: "
            f"{self.prefill_tokens(plan):,} tokens to prefill, {prompts * len(plan.methods):,} rows",
            *batch_text(plan.batch, device=plan.facts.device),
        ]

    def info(self, plan: Plan) -> dict[str, Any]:
        """Return tasks, lengths and samples; nothing where nothing is scored."""
        if not plan.tasks:
            return {}
        return {
            "tasks": plan.task_names,
            "lengths_tokens": plan.config.lengths_tokens,
            "samples": plan.config.samples,
        }

    def reopen(self, plan: Plan, store: "RunStore") -> int:
        """Reopen the rows of prompts that were not answered."""
        n_reopened = 0
        for _, name, length_tokens in self.cells(plan):
            for index in range(plan.config.samples):
                for method in plan.methods:
                    key = (name, length_tokens, index, method.label)
                    if is_open(store.sample_rows.get(key), unsupported=plan.unsupported(method.label, length_tokens)):
                        store.sample_rows.reopen(key)
                        n_reopened += 1
        return n_reopened

    def left(self, plan: Plan, store: "RunStore") -> Left:
        """Count the prompts that lack a row of a method."""
        left = Left()
        for _, name, length_tokens in self.cells(plan):
            pending = pending_samples(plan, store, name, length_tokens)
            work_tokens = sum(prompt_work_tokens(length_tokens, methods=len(methods)) for _, methods in pending)
            left += Left(cells=bool(pending), prompts=len(pending), work_tokens=work_tokens)
        return left

    def run(self, plan: Plan, store: "RunStore", progress: Progress, deadline: Deadline) -> None:
        """Answer every prompt that lacks a row, shortest length first, until the deadline."""
        self._answer(plan, store, progress, deadline)
        release_memory()  # the model is gone: the processes of the next pass find the device free

    def _answer(self, plan: Plan, store: "RunStore", progress: Progress, deadline: Deadline) -> None:
        turns = Turns(plan, store, progress, self.cells(plan))
        if turns.next_length_tokens is None:
            return
        from kvscope.harness.passes.batch import Batch

        loaded = load(plan)  # only when something is to do
        store.begin()  # not before: weights that do not load leave no run behind
        Batch(plan, loaded, store, turns, noise=measured_noise(plan, loaded, progress)).run(deadline)

    def failures(self, run: "Run") -> list[str]:
        """Return one line per method and status of rows that failed."""
        return failed_lines("accuracy", run.samples)


class Turns:
    """The prompts that lack rows, in order, and what the user is told of them.

    A cell of the progress is one (task, length). It ends with its last row: the next ones may have begun by then.
    """

    def __init__(
        self, plan: Plan, store: "RunStore", progress: Progress, cells: "Sequence[tuple[Task, str, int]]"
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
        if (name, length_tokens) not in self._begun:
            self._begun.add((name, length_tokens))
            self._progress.begin_cell(_cell_name(name, length_tokens), steps=self._in_cell[name, length_tokens])
        self._progress.begin_step(f"{index + 1} of {self._plan.config.samples}", parts=len(methods) + 1)
        sample = build(self._plan, task, name, length_tokens, index)
        self._check.compare(sample)
        prompt = Prompt(self._plan, loaded, task, sample, self._progress)
        self._methods[prompt] = len(methods)
        return prompt, methods

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


def pending_samples(plan: Plan, store: "RunStore", task_name: str, length_tokens: int) -> Pending:
    """Return (sample index, methods without a row) of one (task, length); prompts that are done are left out."""
    found = []
    for index in range(plan.config.samples):
        methods = [m for m in plan.methods if not store.has_sample((task_name, length_tokens, index, m.label))]
        if methods:
            found.append((index, methods))
    return found


def cell_summary(plan: Plan, store: "RunStore", task_name: str, length_tokens: int) -> str:
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
