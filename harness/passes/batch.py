"""The accuracy pass's sequences: (prompt, method) pairs that enter a session in order and leave as their answers end.

Which of them share a step is decided by their order, the plan's number of rows and the lengths of answers: never by
time or by free memory. A prompt is prefilled when its first method enters, and let go when its last one has a row.

What goes wrong is one row's where that can be told. Where it cannot, every sequence of the step begins again, alone
(an error of a method's own), or with half as many beside it (memory ended).
"""

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvscope.harness.engine.batch_decode import BatchDecode
from kvscope.harness.engine.decoding import Decoding
from kvscope.harness.engine.finite import NotFinite
from kvscope.harness.engine.lanes import Lanes
from kvscope.harness.engine.oom import is_oom
from kvscope.harness.passes.answering import Prompt, release_memory, shared_graph
from kvscope.harness.passes.batch_plan import step_rows
from kvscope.harness.passes.deadline import Deadline
from kvscope.harness.passes.row_columns import failure

if TYPE_CHECKING:
    from kvscope.harness.engine.batch_noise import BatchNoise
    from kvscope.harness.engine.loaded import LoadedModel
    from kvscope.harness.passes.base import SampleStore
    from kvscope.harness.passes.run_plan import Plan
    from kvscope.harness.passes.turns import Turns
    from kvscope.methods.base import CacheMethod
    from kvscope.results.schema import SampleRow


#: Room beyond a choice whose size changes: where one outgrows it, the step of all is captured anew.
_SPARE_SHARE = 1.0


@dataclass(eq=False)
class Entry:
    """One method on one prompt.

    Attributes:
        alone: whether it shares no step any more: a step of several failed with it.
        row: where it is under way.
    """

    prompt: Prompt
    method: "CacheMethod[Any]"
    alone: bool = False
    row: Decoding | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The method's label and the length."""
        return self.method.label, self.prompt.sample.length_tokens


class Batch:
    """Answers prompts, several sequences a step."""

    def __init__(
        self, plan: "Plan", loaded: "LoadedModel", store: "SampleStore", turns: "Turns", *, noise: "BatchNoise | None"
    ) -> None:
        """Begin with nothing.

        Args:
            turns: the prompts in order, and what to tell of them.
            noise: how far logits differ between batch sizes; None where they differ by more than rounding, or that
                was not measured: then no step is shared.
        """
        self._plan, self._loaded, self._store, self._turns = plan, loaded, store, turns
        self._logit_noise = None if noise is None else noise.logit_noise
        self._shared_graph = shared_graph(plan)
        # Bytes are those of single sequences, whose steps are captured where that was asked for.
        self._step_rows = step_rows(plan.facts)
        self._options: dict[str, Any] = {
            "counts_spare": plan.config.accuracy_graph,
            "spare_share": _SPARE_SHARE,
            "step_rows": self._step_rows,
        }
        self._decode = Lanes(loaded, **self._options)
        self._waiting: deque[Entry] = deque()
        self._under_way: list[Entry] = []
        self._open: dict[Prompt, int] = {}
        """Prompts begun, and how many of their rows are still to come."""
        self._cap: int | None = 1 if noise is None else None
        """Most rows, where memory ended with more."""
        self._cap_before: int | None = None
        self._fails_in_steps: set[str] = set()
        """Labels of methods whose own errors ended a step of several: they share none any more."""
        self._too_large: set[tuple[str, int]] = set()
        """Methods that memory did not hold even alone, with the length."""
        self._over: Exception | None = None
        """Why no other prompt begins."""

    def run(self, deadline: Deadline) -> None:
        """Answer every prompt, until the deadline; then those that were begun.

        Raises:
            TimeLimitReached: there are prompts left.
            UsageError: a prompt is another than that of the rows that are there.
        """
        with self._decode:
            self._fill(deadline)
            while self._under_way:
                self._step()
                self._fill(deadline)
        if self._over is not None:
            raise self._over

    # -- entering

    def _fill(self, deadline: Deadline) -> None:
        """Let methods and prompts enter while there is room."""
        if self._decode.resting:
            # The step stays as it was captured until a new capture is worth it.
            is_more = bool(self._waiting) or self._next_length_tokens is not None
            if 2 * len(self._decode.resting) < self._decode.n_rows or not is_more:
                return
            self._decode.remove_resting()
        while True:
            if self._waiting:
                if not self._has_room_for(self._waiting[0]):
                    return
                self._enter(self._waiting.popleft())
            elif self._next_length_tokens is not None and self._has_room(self._next_length_tokens, another_prompt=True):
                self._begin(deadline)
            else:
                return

    @property
    def _next_length_tokens(self) -> int | None:
        return None if self._over is not None else self._turns.next_length_tokens

    def _has_room_for(self, entry: Entry) -> bool:
        if entry.key in self._too_large:
            return not self._under_way
        return self._has_room(entry.prompt.sample.length_tokens)

    def _has_room(self, length_tokens: int, *, another_prompt: bool = False) -> bool:
        most = self._rows_at(length_tokens)
        if max(len(self._under_way), self._decode.n_rows) >= most:
            return False
        return not (another_prompt and len(self._open) >= self._plan.batch_prompts(most))

    def _rows_at(self, length_tokens: int) -> int:
        most = self._plan.batch_rows(length_tokens)
        return most if self._cap is None else min(most, self._cap)

    def _begin(self, deadline: Deadline) -> None:
        """Take the next prompt: what cannot run on it gets its rows, the rest waits."""
        try:
            deadline.check()
            prompt, methods = self._turns.take(self._loaded)
        except Exception as error:  # noqa: BLE001 - is raised when what is under way has ended
            self._over = error
            return
        self._open[prompt] = len(methods)
        reasons = {method.label: prompt.unsupported(method) for method in methods}
        for method in methods:
            why = reasons[method.label]
            if why is None:
                self._waiting.append(Entry(prompt, method))
            else:
                self._close(prompt, prompt.unsupported_row(method, why))

    def _enter(self, entry: Entry) -> None:
        prompt = entry.prompt
        if prompt.kv is None and not self._prefill(entry):
            return
        self._turns.part(entry.method.label)
        if entry.alone or entry.method.label in self._fails_in_steps or entry.key in self._too_large:
            self._decode_alone(entry)
            return
        if not self._under_way:
            # Where answers are to be the same in any batch, single ones have the steps of shared ones.
            is_single = self._rows_at(entry.key[1]) == 1 and self._step_rows is None
            self._decode.set_graph(prompt.graph()[0] if is_single else self._shared_graph)
        try:
            entry.row = self._decode.add(prompt.request(entry.method))
        except Exception as error:  # noqa: BLE001 - becomes this method's row; the others go on
            self._fail_or_wait(entry, error)
            return
        self._under_way.append(entry)
        if self._decode.brings_cache:
            self._cap = 1

    def _prefill(self, entry: Entry) -> bool:
        """Prefill an entry's prompt for all its methods that wait; return whether it can be decoded."""
        prompt = entry.prompt
        entries = [entry, *(each for each in self._waiting if each.prompt is prompt)]
        self._turns.part("prefill")
        try:
            prompt.prefill([each.method for each in entries])
        except Exception as error:  # noqa: BLE001 - becomes a row of every method; the sweep goes on
            if is_oom(error) and self._under_way:
                self._wait_for_room(entry)
                return False
            prompt.complain(failure(error, phase="prefill")[1])
            rows = [prompt.failed(each.method, error, phase="prefill") for each in entries]
            del error
            release_memory()
            self._waiting = deque(each for each in self._waiting if each.prompt is not prompt)
            for row in rows:
                self._close(prompt, row)
            return False
        return True

    # -- steps

    def _step(self) -> None:
        n_rows = self._decode.n_rows
        try:
            ended = self._decode.step()
        except Exception as error:  # noqa: BLE001 - becomes a row, now or when it is made again alone
            self._decode.close()
            entries, self._under_way = self._under_way, []
            if len(entries) == 1:
                self._fail(entries[0], error)
                return
            if is_oom(error):
                self._halve(n_rows)
            for each in entries:
                each.row, each.alone = None, each.alone or not is_oom(error)
            del error
            release_memory()
            self._waiting.extendleft(reversed(entries))
            return
        for row in ended:
            entry = next(each for each in self._under_way if each.row is row)
            self._under_way.remove(entry)
            self._ended(entry, row)

    def _decode_alone(self, entry: Entry) -> None:
        """Decode a sequence in steps of its own, beside those of the others."""
        graph = entry.prompt.graph()[0] if self._step_rows is None else self._shared_graph
        try:
            with BatchDecode(self._loaded, decode_graph=graph, **self._options) as single:
                row = single.add(entry.prompt.request(entry.method))
                while not row.has_ended:
                    single.step()
        except Exception as error:  # noqa: BLE001 - becomes this method's row; the others go on
            if entry.alone and not is_oom(error):
                self._fails_in_steps.add(entry.method.label)
            self._fail_or_wait(entry, error)
            return
        self._ended(entry, row)

    # -- leaving

    def _ended(self, entry: Entry, row: Decoding) -> None:
        entry.row = None
        if row.result is None:
            assert row.error is not None
            if row.batch > 1 and isinstance(row.error, NotFinite):
                self._decode_alone(entry)  # which layer it came from is not found in the others' steps
            else:
                self._fail(entry, row.error)
            return
        try:
            made = entry.prompt.row(entry.method, row.result, logit_noise=self._logit_noise)
        except Exception as error:  # noqa: BLE001 - becomes this method's row; the others go on
            self._fail_or_wait(entry, error)
            return
        if row.batch > 1:
            self._cap_before = None  # so many do fit
        self._close(entry.prompt, made)

    def _fail_or_wait(self, entry: Entry, error: Exception) -> None:
        """Make the row of a failure; memory that ended beside others is no failure yet."""
        if is_oom(error) and self._under_way:
            self._wait_for_room(entry)
        else:
            self._fail(entry, error)

    def _fail(self, entry: Entry, error: Exception) -> None:
        if is_oom(error):
            self._too_large.add(entry.key)
            if self._cap_before is not None:
                # What fits nowhere says nothing of how many others do.
                self._cap, self._cap_before = self._cap_before, None
        row = entry.prompt.failed(entry.method, error, phase="decode")
        del error
        release_memory()
        self._close(entry.prompt, row)

    def _close(self, prompt: Prompt, row: "SampleRow") -> None:
        """Put a row on disk; behind a prompt's last one, let the prompt go."""
        self._store.append_sample(row)
        self._open[prompt] -= 1
        if not self._open[prompt]:
            del self._open[prompt]
            prompt.kv = None
            self._turns.done(prompt)

    def _wait_for_room(self, entry: Entry) -> None:
        """Put back a sequence that does not fit beside those under way: they go on, with fewer from now on."""
        release_memory()
        self._halve(len(self._under_way) + 1)
        self._waiting.appendleft(entry)

    def _halve(self, n_rows: int) -> None:
        if self._cap_before is None:
            self._cap_before = self._plan.most_batch_rows if self._cap is None else self._cap
        self._cap = max(1, n_rows // 2)
        self._turns.note(f"memory ran out with {n_rows} sequences in a step: {self._cap} at most from now on.")
