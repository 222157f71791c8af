"""The accuracy pass of a served model: every prompt is sent to the server, and its answer is scored and written."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvscope.errors import EnvironmentProblem, KvscopeError, shown
from kvscope.harness.passes.accuracy import AccuracyPass
from kvscope.harness.passes.contract import score_of
from kvscope.harness.passes.deadline import Deadline, TimeLimitReached
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.prompt_check import PromptCheck, build
from kvscope.harness.passes.row_columns import one_line, prompt_columns
from kvscope.harness.passes.served_facts import UNKNOWN, WHERE
from kvscope.harness.passes.served_plan import ServedPlan
from kvscope.harness.passes.server_memory import ServerMemory
from kvscope.harness.passes.timing import host_load
from kvscope.harness.passes.turns import cell_summary, pending_samples, prompt_work_tokens
from kvscope.harness.served.asking import Answer, ask
from kvscope.harness.served.client import Refused, RequestFailed, ServerGone, Unanswered
from kvscope.harness.served.probe import is_other_model
from kvscope.results.schema import SampleRow, ServedRecord
from kvscope.tasks.answers import answer_of, stop_index
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Sample, Task

MOST_UNANSWERED = 3
"""Prompts one after another that a server leaves without an answer: then it is broken, and the run ends."""
NO_LEDGER = "the model runs in a server: kvscope does not see its cache"
NO_NLL = "a server does not tell the likelihood of an answer that it did not give"


@dataclass(frozen=True, eq=False)
class _Turn:
    """One prompt on its way."""

    task: "Task"
    sample: "Sample"
    cell: str


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What became of a prompt: an answer, or why there is none; and what the server's processes held meanwhile."""

    answer: Answer | None = None
    problem: KvscopeError | None = None
    nvml_bytes: int | None = None
    nvml_reason: str | None = None


class ServedPass(AccuracyPass):
    """Has prompts answered by a server, and scores the answers."""

    def text(self, plan: ServedPlan) -> list[str]:  # type: ignore[override]  # a served plan has this pass alone
        """Return its line of the plan."""
        prompts = len(self.cells(plan)) * plan.config.samples
        return [f"accuracy   {prompts:,} prompts to send: {self.prefill_tokens(plan):,} tokens, answers included"]

    def run(  # type: ignore[override]
        self, plan: ServedPlan, store: "RunStore", progress: Progress, deadline: Deadline
    ) -> None:
        """Have every prompt answered that lacks a row, shortest length first, until the deadline.

        Raises:
            EnvironmentProblem: the server is gone, or leaves several prompts without an answer. Rows are kept.
            TimeLimitReached: there are prompts left.
            UsageError: a prompt is another than that of the rows that are there.
        """
        _Sending(plan, store, progress, deadline, self.cells(plan)).run()


class _Sending:
    """The prompts of a run on their way to a server and back."""

    def __init__(
        self,
        plan: ServedPlan,
        store: "RunStore",
        progress: Progress,
        deadline: Deadline,
        cells: "list[tuple[Task, str, int]]",
    ) -> None:
        self._plan, self._store, self._progress, self._deadline = plan, store, progress, deadline
        self._cells = [
            (task, name, length_tokens, [index for index, _ in pending_samples(plan, store, name, length_tokens)])
            for task, name, length_tokens in cells
        ]
        self._left = {_cell_name(name, length): len(indices) for _, name, length, indices in self._cells}
        self._memory = ServerMemory(plan.config.server_pid)
        self._over: KvscopeError | None = None
        """Why no other prompt is sent."""
        self._unanswered = 0

    def run(self) -> None:
        """Send all of them."""
        assert self._plan.findings is not None
        if any(self._left.values()):
            self._store.begin()
        for turn, outcome in in_order(self._turns(), self._ask, concurrency=self._plan.findings.concurrency):
            self._take(turn, outcome)
        if isinstance(self._over, ServerGone):
            raise EnvironmentProblem(
                f"{self._over}: {len(self._store.samples())} rows are kept, and the same command continues."
            )
        if self._over is not None:
            raise self._over

    def _turns(self) -> Iterator[_Turn]:
        check = PromptCheck(self._store)
        for task, name, length_tokens, indices in self._cells:
            cell = _cell_name(name, length_tokens)
            for at, index in enumerate(indices):
                try:
                    self._deadline.check()
                except TimeLimitReached as error:
                    self._over = self._over or error
                if self._over is not None:
                    return
                if at == 0:
                    self._progress.begin_cell(cell, steps=len(indices))
                self._progress.begin_step(f"{index + 1} of {self._plan.config.samples}")
                sample = build(self._plan, task, name, length_tokens, index)
                check.compare(sample)
                yield _Turn(task, sample, cell)

    def _ask(self, turn: _Turn) -> _Outcome:
        """Send a prompt; what goes wrong with it is part of the outcome, so that others' answers are kept."""
        facts, manner = self._plan.facts, self._plan.manner
        assert manner is not None
        prompt = facts.prompt(turn.sample.text, turn.sample.ids)
        with self._memory.watched() as memory:
            try:
                answer = ask(facts.client, manner, prompt, max_new_tokens=turn.sample.max_new_tokens)
            except (RequestFailed, ServerGone) as error:
                return _Outcome(problem=error)
        reason = None if memory.peak_bytes is not None else self._memory.reason
        return _Outcome(answer=answer, nvml_bytes=memory.peak_bytes, nvml_reason=reason)

    def _take(self, turn: _Turn, outcome: _Outcome) -> None:
        """Write the row of an outcome; none where the server is gone: the same command sends that prompt again."""
        if isinstance(outcome.problem, ServerGone):
            self._over = self._over or outcome.problem
            return
        sample, answer = turn.sample, outcome.answer
        problem = str(outcome.problem) if answer is None else self._unlike(sample, answer)
        if answer is None or problem is not None:
            row = self._failed(turn, outcome, str(problem))
            where = f"{sample.task} {format_length(sample.length_tokens)} sample {sample.sample}"
            self._progress.note(f"{where}: {row.reason}")
        else:
            row = self._row(turn, answer, outcome)
        self._store.append_sample(row)
        self._progress.end_step(work_tokens=prompt_work_tokens(sample.length_tokens, methods=1), cell=turn.cell)
        self._left[turn.cell] -= 1
        if not self._left[turn.cell]:
            summary = cell_summary(self._plan, self._store, sample.task, sample.length_tokens)
            self._progress.end_cell(summary, cell=turn.cell)
        self._unanswered = self._unanswered + 1 if isinstance(outcome.problem, Unanswered) else 0
        if self._unanswered >= MOST_UNANSWERED and self._over is None:
            self._over = EnvironmentProblem(
                f"The server at {self._plan.facts.server.url} left {MOST_UNANSWERED} prompts one after another without "
                f"an answer, the last with {problem}: rows are kept, and the same command sends those again."
            )

    def _unlike(self, sample: "Sample", answer: Answer) -> str | None:
        """Return why an answer is not one to this prompt, by the server's own word; None where nothing says so."""
        assert self._plan.findings is not None
        model = self._plan.facts.server.model
        if is_other_model(answer, model):
            return f"the server was asked for {shown(model)} and answers as {shown(answer.model)}"
        if answer.completion_tokens is not None and answer.completion_tokens > sample.max_new_tokens:
            return f"the server gives {answer.completion_tokens:,} tokens where {sample.max_new_tokens:,} are asked for"
        extra = self._plan.findings.extra_prompt_tokens
        if extra is None or answer.prompt_tokens is None or answer.prompt_tokens == len(sample.ids) + extra:
            return None
        return (
            f"the server counts {answer.prompt_tokens:,} tokens where the prompt has {len(sample.ids) + extra:,}: it "
            "answers another prompt (cut to its context, or another tokenizer?)"
        )

    def _row(self, turn: _Turn, answer: Answer, outcome: _Outcome) -> SampleRow:
        sample = turn.sample
        tokens = answer.completion_tokens
        if tokens is None:
            tokens = len(self._plan.facts.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
        stop = stop_index(answer.text, sample.stop)
        return SampleRow(
            **self._columns(sample),
            status="ok",
            ledger_reason=NO_LEDGER,
            output=answer.text[:stop],
            score=score_of(turn.task, sample, answer_of(answer.text, sample.stop)),
            stop_reason="stop" if stop is not None else "length" if tokens >= sample.max_new_tokens else "eos",
            answer_nll_reason=NO_NLL,
            decode_tokens=tokens,
            served=ServedRecord(
                request_s=answer.request_s,
                tries=answer.tries,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
                after_stop="" if stop is None else answer.text[stop:],
                finish_reason=answer.finish_reason,
                nvml_bytes=outcome.nvml_bytes,
                nvml_reason=outcome.nvml_reason,
            ),
            **host_load(),
        )

    def _failed(self, turn: _Turn, outcome: _Outcome, problem: str) -> SampleRow:
        what = "context overflow" if isinstance(outcome.problem, Refused) and outcome.problem.overflow else "request"
        return SampleRow(**self._columns(turn.sample), status="failed", reason=one_line(f"{what}: {problem}"))

    def _columns(self, sample: "Sample") -> dict[str, Any]:
        plan = self._plan
        assert plan.manner is not None
        method = plan.methods[0]
        return {
            "model": plan.facts.name,
            "method": method.name,
            "method_label": method.label,
            "config": {"form": plan.manner.form, **plan.manner.fields},
            "length_tokens": sample.length_tokens,
            "saving_kind": UNKNOWN,
            "noop": False,
            "dtype": UNKNOWN,
            "device": WHERE,
            "chat_template": plan.facts.chat_template,
            **prompt_columns(sample),
        }


def in_order(
    turns: Iterable[_Turn], answer: Callable[[_Turn], _Outcome], *, concurrency: int
) -> Iterator[tuple[_Turn, _Outcome]]:
    """Yield turns with their outcomes, in their order; up to ``concurrency`` are under way at a time.

    One at a time needs no thread, so that an interrupt ends it at once.
    """
    if concurrency == 1:
        for turn in turns:
            yield turn, answer(turn)
        return
    pool = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="requests")
    under_way: deque[tuple[_Turn, Future[_Outcome]]] = deque()
    try:
        for turn in turns:
            under_way.append((turn, pool.submit(answer, turn)))
            if len(under_way) == concurrency:
                first, future = under_way.popleft()
                yield first, future.result()
        while under_way:
            first, future = under_way.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _cell_name(name: str, length_tokens: int) -> str:
    return f"{name} {format_length(length_tokens)}"
