"""The search for the longest context: where it ends, what it calls the bound, and that it goes on where it was."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from in_process import MIB, run_here

from kvscope import cli
from kvscope.harness.passes import find_max as module
from kvscope.harness.passes import process_pass
from kvscope.harness.passes.base import Left
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.deadline import Deadline
from kvscope.harness.passes.find_max import find_max, predicted_max
from kvscope.harness.passes.plan import Plan, make_plan
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.recording import run_info
from kvscope.harness.passes.sweep import failures, run
from kvscope.methods.shape import tensor_bytes
from kvscope.results.frames import load_run
from kvscope.results.store import RunStore

VALUES = {"model": "preset:tiny", "methods": ["dense"], "find_max": True, "device": "cpu", "footprint_decode_tokens": 4}
MAXIMUM = 4 * 1024 * 1024


def plan_of(**values: Any) -> Plan:
    return make_plan(make_config({**VALUES, **values}))


def fitting(limit: int, *, oom_of: str = "device") -> Callable[[int], Any]:
    """Return a measurement in which lengths up to ``limit`` fit."""

    def measure(length: int) -> Any:
        fits = length <= limit
        return SimpleNamespace(
            status="ok" if fits else "oom",
            oom_of=None if fits else oom_of,
            reason=None if fits else f"{length} is much",
        )

    return measure


@pytest.mark.parametrize("limit", [64, 100, 4096, 77_777, 1_000_000, MAXIMUM - 1])
@pytest.mark.parametrize("start", [64, 60_000, MAXIMUM])
def test_the_search_closes_in_from_any_first_guess(limit: int, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "predicted_max", lambda plan, method: start)
    plan = plan_of()
    row = find_max(plan, plan.methods[0], fitting(limit, oom_of="host"))
    assert row.shortest_failing_tokens is not None
    assert row.longest_tokens <= limit < row.shortest_failing_tokens
    assert row.shortest_failing_tokens - row.longest_tokens <= max(64, 0.03 * row.longest_tokens)
    assert row.bound == "host"
    assert row.reason == f"{row.shortest_failing_tokens} is much"
    assert len(set(row.tries)) == len(row.tries) <= 30


def test_a_good_guess_needs_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "predicted_max", lambda plan, method: 64_000)
    plan = plan_of()
    for limit in (62_500, 64_100):
        assert len(find_max(plan, plan.methods[0], fitting(limit)).tries) <= 3


def test_what_bounds_it_is_named() -> None:
    plan = plan_of(gpu_budget_bytes="2MiB")
    method = plan.methods[0]
    assert find_max(plan, method, fitting(MAXIMUM)).bound == "model_maximum"
    assert find_max(plan, method, fitting(0)).bound == "none_fits"
    assert find_max(plan, method, fitting(5000, oom_of="device_budget")).bound == "device_budget"
    limited = plan_of(find_max_limit_tokens="32k")
    row = find_max(limited, method, fitting(MAXIMUM))
    assert (row.bound, row.longest_tokens, row.shortest_failing_tokens) == ("limit", 32 * 1024, None)

    def broken(length: int) -> Any:
        return SimpleNamespace(status="failed", oom_of=None, reason="the worker was killed by SIGSEGV")

    row = find_max(plan, method, broken)
    assert (row.bound, row.reason) == ("failed", "the worker was killed by SIGSEGV")


def test_the_guess_is_what_the_formulas_say_fits() -> None:
    plan = plan_of(gpu_budget_bytes="2MiB")
    length = predicted_max(plan, plan.methods[0])
    room_bytes = 2 * MIB - (plan.facts.weights_bytes or 0)
    assert plan.facts.shape.paged_kv_bytes(length) <= room_bytes < plan.facts.shape.paged_kv_bytes(length + 64)


def test_a_budget_bounds_dense_and_not_lsa(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end: the weights and the cache against the budget, each try a row, resumed after an interrupt."""
    jobs = run_here(monkeypatch)
    lsa = "lsa:budget_tokens=512,recency_tokens=128,selection=synthetic"
    values = {**VALUES, "methods": ["dense", lsa], "gpu_budget_bytes": "1MiB", "find_max_limit_tokens": "64k"}
    real, calls = process_pass.run_worker, []

    def interrupted(job: Any, **options: Any) -> Any:
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(job, **options)

    monkeypatch.setattr(process_pass, "run_worker", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(values, out=tmp_path / "run", progress=False)
    kept = len(load_run(tmp_path / "run").footprint)
    assert kept == 2
    monkeypatch.setattr(process_pass, "run_worker", real)
    result = run(values, out=tmp_path / "run", progress=False)
    found = result.max_context.set_index("method_label")
    weights_bytes = 140_160
    budget_tokens = (MIB - weights_bytes) // 256
    assert found.loc["dense", "longest_tokens"] <= budget_tokens < found.loc["dense", "shortest_failing_tokens"]
    assert list(found["bound"]) == ["device_budget", "limit"]
    assert found.loc[lsa, "longest_tokens"] == 64 * 1024
    assert len(jobs) == len(result.footprint) == sum(len(tries) for tries in found["tries"])
    assert set(result.footprint["prefill"]) == {"synthetic"}
    assert set(result.footprint["gpu_budget_bytes"]) == {MIB}
    failed = result.footprint[result.footprint["status"] == "oom"]
    assert len(failed)
    assert set(failed["oom_of"]) == {"device_budget"}
    assert failures(result) == []
    assert cli.run_cli(["report", str(tmp_path / "run")]) == 0


def test_a_search_that_fails_is_a_failure(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    result = run({**VALUES, "gpu_budget_bytes": "1KiB"}, out=tmp_path / "run", progress=False)
    assert list(result.max_context["bound"]) == ["none_fits"]
    assert failures(result)[0].startswith("find-max: dense: load: DeviceBudgetExceeded: The model takes 140,160 bytes")


def test_a_search_counts_the_methods_that_are_left(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    config = make_config({**VALUES, "methods": ["dense", "recency"], "find_max_limit_tokens": "1k"})
    (search,) = make_plan(config).passes
    plan = make_plan(config)
    with RunStore.create(tmp_path / "run", run_info(plan)) as store:
        assert search.left(plan, store) == Left(cells=2)
        search.run(plan, store, Progress(), Deadline())
        assert search.left(plan, store) == Left()
        assert [row.bound for row in store.max_contexts()] == ["limit", "limit"]


def test_shared_pages_are_counted_once() -> None:
    plan = plan_of()
    assert tensor_bytes([]) == 0
    assert plan.cells == ()
