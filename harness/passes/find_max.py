"""``--find-max``: each method's longest context, by bisection over lengths, every try a footprint cell of its own.

A try is a fresh process with synthetic KV, so memory is what a real run of that length would hold while decoding, and
one that runs out leaves nothing behind. The first length tried is the longest the byte formulas expect to fit; from
there the search gallops until one length fits and one does not, then halves what is between. Every try is a footprint
row, so an interrupted search goes on where it was.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvscope.harness.passes.base import Left
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.deadline import Deadline
from kvscope.harness.passes.facts import ModelFacts
from kvscope.harness.passes.footprint import FootprintPass, mismatch_lines
from kvscope.harness.passes.forecast import Rooms, device_rooms, longest_that_fits
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.run_plan import Plan
from kvscope.results.memory_rows import FootprintRow, MaxContextRow
from kvscope.results.schema import Bound

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod
    from kvscope.results.frames import Run
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Task


class FindMaxPass:
    """Finds each method's longest context."""

    def __init__(self) -> None:
        self._tries = FootprintPass()

    def lengths_tokens(self, config: RunConfig) -> tuple[int, ...]:
        """Return none: the search finds its own."""
        del config
        return ()

    def check(self, config: RunConfig, facts: ModelFacts, tasks: "Sequence[Task]") -> None:
        """Refuse nothing: it begins at the least length there is."""

    def cells(self, plan: Plan) -> "Sequence[CacheMethod[Any]]":
        """Return the methods."""
        return plan.methods

    def text(self, plan: Plan) -> list[str]:
        """Return its line of the plan."""
        methods = ", ".join(method.label for method in self.cells(plan))
        return [f"search   the longest context of {methods}: synthetic KV, a fresh process a try"]

    def info(self, plan: Plan) -> dict[str, Any]:
        """Return nothing: its lengths are not known before."""
        del plan
        return {}

    def reopen(self, plan: Plan, store: "RunStore") -> int:
        """Reopen the searches that a failed try ended, with that try. A try that does not fit is a result here."""
        n_reopened = 0
        for method in self.cells(plan):
            tries = [row for row in store.footprints() if row.method_label == method.label]
            failed = [row for row in tries if row.status in ("failed", "unsupported")]
            found = store.max_context_rows.get(method.label)
            stays = bool(method.unsupported(plan.facts.shape, plan.facts.device))
            if stays or not (failed or (found is not None and not found.is_result)):
                continue
            for row in failed:
                store.footprint_rows.reopen(row.key)
            if found is not None and not found.is_result:
                store.max_context_rows.reopen(method.label)
            n_reopened += 1
        return n_reopened

    def left(self, plan: Plan, store: "RunStore") -> Left:
        """Count the methods without a result; how many tries that takes, nobody knows."""
        return Left(cells=sum(not store.max_context_rows.has(method.label) for method in self.cells(plan)))

    def run(self, plan: Plan, store: "RunStore", progress: Progress, deadline: Deadline) -> None:
        """Find the longest context of every method that has no result yet."""
        for method in self.cells(plan):
            if store.max_context_rows.has(method.label):
                continue
            reasons = method.unsupported(plan.facts.shape, plan.facts.device)
            if reasons:
                row = _row(plan, method, longest=0, failing=None, tries=(), bound="failed", reason="; ".join(reasons))
            else:
                row = find_max(plan, method, self._measure(plan, method, store, progress, deadline))
            store.append_max_context(row)
            progress.note(f"{method.label}: longest context {row.longest_tokens:,} tokens, bound by {row.bound}")

    def _measure(
        self, plan: Plan, method: "CacheMethod[Any]", store: "RunStore", progress: Progress, deadline: Deadline
    ) -> Callable[[int], FootprintRow]:
        """Return a function that measures one length, or finds its row from before."""

        def measure(length_tokens: int) -> FootprintRow:
            key = (method.label, length_tokens)
            there = store.footprint_rows.get(key)
            if there is not None and store.footprint_rows.has(key):
                return there
            deadline.check()
            store.begin()
            row = self._tries.measure(plan, store, method, length_tokens, progress)
            store.append_footprint(row)
            return row

        return measure

    def failures(self, run: "Run") -> list[str]:
        """Return the searches that found nothing or ended for another reason than memory.

        A try that does not fit is what the search looks for; one that NVML does not confirm is a failure.
        """
        ended = run.max_context[run.max_context["bound"].isin(["failed", "none_fits"])]
        return [*(f"find-max: {row.method_label}: {row.reason}" for row in ended.itertuples()), *mismatch_lines(run)]


def find_max(plan: Plan, method: "CacheMethod[Any]", measure: Callable[[int], FootprintRow]) -> MaxContextRow:
    """Search one method.

    Args:
        measure: a length in tokens -> its footprint row.
    """
    unit = plan.config.page_tokens
    least = -(-(plan.config.footprint_decode_tokens + 2) // unit) * unit
    limit = plan.config.find_max_limit_tokens
    most = min(plan.facts.max_length_tokens, limit or plan.facts.max_length_tokens) // unit * unit
    resolution = plan.config.find_max_resolution
    longest, failing = 0, None
    tries: list[int] = []
    last: FootprintRow | None = None
    step = resolution  # formulas leave out workspaces, which are a few percent
    length = min(most, max(least, predicted_max(plan, method)))
    while True:
        row = measure(length)
        tries.append(length)
        if row.status == "ok":
            longest = length
            if length >= most:
                bound: Bound = "model_maximum" if limit is None or limit >= plan.facts.max_length_tokens else "limit"
                return _row(plan, method, longest=longest, failing=None, tries=tries, bound=bound)
        elif row.status == "oom":
            failing, last = length, row
            if length <= least:
                return _row(plan, method, longest=0, failing=failing, tries=tries, bound="none_fits", reason=row.reason)
        else:
            return _row(plan, method, longest=longest, failing=length, tries=tries, bound="failed", reason=row.reason)
        if failing is None:
            length = min(most, _whole(length * (1 + step), unit) + unit)
            step *= 2
        elif longest == 0:
            length = max(least, min(_whole(length / (1 + step), unit), length - unit))
            step *= 2
        else:
            if failing - longest <= max(unit, resolution * longest):
                break
            length = _whole((longest + failing) / 2, unit)
            if length <= longest:
                break
    assert last is not None
    return _row(
        plan, method, longest=longest, failing=failing, tries=tries, bound=last.oom_of or "device", reason=last.reason
    )


def predicted_max(plan: Plan, method: "CacheMethod[Any]") -> int:
    """Return the longest length that the byte formulas expect to fit, in whole pages; one page where none does."""
    config, facts = plan.config, plan.facts
    rooms: Rooms = device_rooms(config, facts)
    if config.gpu_budget_bytes is not None and facts.device == "cpu":
        # On a CPU the budget holds weights and cache alone (``DeviceBudget``).
        rooms = {"cpu": (config.gpu_budget_bytes, "the device budget")}
    return longest_that_fits(method, config=config, facts=facts, rooms=rooms) or config.page_tokens


def _whole(length: float, unit: int) -> int:
    return int(length) // unit * unit


def _row(
    plan: Plan,
    method: "CacheMethod[Any]",
    *,
    longest: int,
    failing: int | None,
    tries: "list[int] | tuple[int, ...]",
    bound: Bound,
    reason: str | None = None,
) -> MaxContextRow:
    return MaxContextRow(
        model=plan.facts.name,
        method_label=method.label,
        longest_tokens=longest,
        shortest_failing_tokens=failing,
        bound=bound,
        reason=reason,
        tries=tuple(tries),
        gpu_budget_bytes=plan.config.gpu_budget_bytes,
        resolution=plan.config.find_max_resolution,
    )
