"""How many answers share a step: decided by the plan, from what a machine has and not from what is free."""

import dataclasses
from typing import Any

import pytest
from tiny import MakeConfig

from kvscope.harness.passes import batch_plan
from kvscope.harness.passes.batch_plan import BatchCell, batch_text, plan_batch, prompts_of, step_rows
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.run_plan import Plan

MIB = 1024**2


def planned(plan: Plan, **facts: Any) -> tuple[BatchCell, ...]:
    """Plan again with other facts of the model."""
    return plan_batch(plan.config, dataclasses.replace(plan.facts, **facts), plan.methods, plan.tasks)


def test_a_number_that_was_asked_for_is_taken(small: MakeConfig) -> None:
    plan = make_plan(small(batch=5, lengths_tokens=[512, 1024]))
    assert [(cell.length_tokens, cell.rows) for cell in plan.batch] == [(512, 5), (1024, 5)]
    assert (plan.batch_rows(1024), plan.most_batch_rows) == (5, 5)
    assert make_plan(small(batch=1)).most_batch_rows == 1


def test_auto_is_a_modest_number_on_a_cpu_and_the_plan_says_what_it_takes(small: MakeConfig) -> None:
    plan = make_plan(small(lengths_tokens=[512, 1024], samples=20))
    assert [cell.rows for cell in plan.batch] == [batch_plan.MOST_ROWS_CPU] * 2
    [line] = [line for line in plan.text().splitlines() if line.startswith("batch")]
    assert "32 at 512 (" in line
    assert "of the host" in line
    assert not any(line.startswith("batch") for line in make_plan(small(batch=1)).text().splitlines())


def test_auto_is_no_more_than_there_is_to_answer(small: MakeConfig) -> None:
    plan = make_plan(small(methods=["dense", "recency"], tasks=["niah_single_1", "vt"], samples=3))
    assert [cell.rows for cell in plan.batch] == [2 * 2 * 3]
    plan = make_plan(small(methods=["dense", "recency"], lengths_tokens=[512, 1024, 2048], samples=3))
    assert [cell.rows for cell in plan.batch] == [2 * 3 * 3] * 3  # those of all lengths share steps
    assert [cell.rows for cell in planned(plan, device="cuda:0", weights_bytes=None)] == [2 * 3] * 3
    assert make_plan(small(methods=["dense"], samples=1)).most_batch_rows == 1


def test_auto_is_less_where_the_machine_has_less(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(small(methods=["dense"], lengths_tokens=[512, 768], max_new_tokens=64, samples=20))
    whole = {cell.length_tokens: cell for cell in plan.batch}
    room_bytes = int((whole[512].host_bytes or 0) / batch_plan.HOST_SHARE)
    monkeypatch.setattr(batch_plan, "total_host_bytes", lambda: room_bytes)
    short, long = planned(plan)
    assert short.rows == batch_plan.MOST_ROWS_CPU
    assert 1 < long.rows < batch_plan.MOST_ROWS_CPU
    assert long.host_bytes is not None
    assert long.host_bytes <= room_bytes * batch_plan.HOST_SHARE
    monkeypatch.setattr(batch_plan, "total_host_bytes", lambda: 1)
    assert [cell.rows for cell in planned(plan)] == [1, 1]
    asked = dataclasses.replace(plan, config=small(methods=["dense"], batch=9))
    assert [cell.rows for cell in planned(asked)] == [9]


def test_on_a_gpu_device_and_host_both_set_bounds(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(small(methods=["dense"], lengths_tokens=[4096], samples=200))
    rooms = {"device": 80 * 1024**3, "host": 512 * 1024**3}
    monkeypatch.setattr(batch_plan, "total_device_bytes", lambda device: rooms["device"])
    monkeypatch.setattr(batch_plan, "total_host_bytes", lambda: rooms["host"])
    [cell] = planned(plan, device="cuda:0")
    assert cell.rows == batch_plan.MOST_ROWS_CUDA == 144
    dense_bytes = plan.methods[0].predict(plan.facts.shape, 4092, 4).kv_bytes
    # 144 rows have logits, and those of sequences have them twice.
    row_bytes = dense_bytes + plan.facts.vocab_size * plan.facts.shape.element_bytes
    base_bytes = (cell.device_bytes or 0) - 144 * row_bytes
    rooms["device"] = int((base_bytes + 20 * row_bytes) / batch_plan.DEVICE_SHARE) + 8
    assert [each.rows for each in planned(plan, device="cuda:0")] == [20]
    rooms["device"] = 80 * 1024**3
    page_bytes = plan.facts.shape.dense_kv_bytes(4092)
    rooms["host"] = int(7 * page_bytes / batch_plan.HOST_SHARE)
    assert [(each.rows, each.prompts) for each in planned(plan, device="cuda:0")] == [(7, 7)]
    assert "of cuda:0 and" in batch_text(planned(plan, device="cuda:0"), device="cuda:0")[0]


def test_a_cache_that_holds_one_sequence_gets_steps_of_its_own(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(small(batch=8))
    monkeypatch.setattr(type(plan.facts.backend), "holds_one_sequence", True)
    assert [cell.rows for cell in planned(plan)] == [1]
    # Its steps have one row on a GPU, too, where those of others have as many whoever shares them.
    on_gpu = dataclasses.replace(plan, facts=dataclasses.replace(plan.facts, device="cuda:0"))
    assert step_rows(on_gpu.facts) is None
    monkeypatch.setattr(type(plan.facts.backend), "holds_one_sequence", False)
    assert (step_rows(on_gpu.facts), step_rows(plan.facts)) == (144, None)


def test_unknown_weights_leave_the_number_as_it_is(small: MakeConfig) -> None:
    plan = make_plan(small(samples=20))
    [cell] = planned(plan, weights_bytes=None)
    assert (cell.rows, cell.host_bytes) == (32, None)
    assert "32 at 512 (unknown bytes)" in batch_text([cell], device="cpu")[0]


@pytest.mark.parametrize(("rows", "methods", "prompts"), [(1, 4, 1), (2, 4, 2), (4, 4, 2), (5, 4, 2), (6, 4, 3),
                                                          (3, 1, 3), (144, 9, 17)])  # fmt: skip
def test_as_many_prompts_are_begun_as_consecutive_pairs_are_of(rows: int, methods: int, prompts: int) -> None:
    assert prompts_of(rows, methods) == prompts
    most = max(len({pair // methods for pair in range(start, start + rows)}) for start in range(methods))
    assert most == prompts


def test_without_tasks_nothing_is_planned(small: MakeConfig) -> None:
    assert make_plan(small(model="preset:tiny", tasks=[], footprint=True)).batch == ()


def test_a_packed_mirror_is_held_beside_the_prompt(small: MakeConfig) -> None:
    methods = ["dense", "lsa:indexer=landmark", "lsa:indexer=landmark,kv=int4"]
    plan = make_plan(small(methods=methods, lengths_tokens=[4096], batch=6))
    [cell] = planned(plan, device="cuda:0")
    found = [method.predict(plan.facts.shape, 4092, 4) for method in plan.methods]
    assert found[2].host_bytes > 0
    prompt_bytes = plan.facts.shape.dense_kv_bytes(4092) + max(each.metadata_bytes for each in found)
    assert cell.host_bytes == prompts_of(6, 3) * (prompt_bytes + found[2].host_bytes)
