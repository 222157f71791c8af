"""Several sequences alike in one footprint cell: bytes of one, a verdict on all."""

import io
from typing import Any

import pytest
from tiny import MakeConfig

from kvscope.errors import UsageError
from kvscope.harness.passes import footprint_measurement as module
from kvscope.harness.passes.footprint import FootprintPass
from kvscope.harness.passes.footprint_measurement import FootprintMeasurement
from kvscope.harness.passes.plan import make_plan
from kvscope.results.columns import SURROUNDINGS_COLUMNS, TIME_COLUMNS
from kvscope.results.memory_rows import FootprintRow

METHODS = ["dense", "recency:recency_tokens=128", "quest:budget_tokens=192", "random:fraction=0.3"]


def measured(config: Any, method_at: int) -> FootprintRow:
    plan = make_plan(config)
    job = FootprintPass().job(plan, plan.methods[method_at], 512)
    return FootprintMeasurement(job, say=io.StringIO()).run()


@pytest.mark.parametrize("method_at", range(len(METHODS)))
def test_bytes_are_those_of_one_and_the_verdict_is_on_all(
    method_at: int, small: MakeConfig, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    asked: list[dict[str, Any]] = []
    real = module.verdict
    monkeypatch.setattr(module, "verdict", lambda **values: asked.append(values) or real(**values))
    shape = {"methods": METHODS, "footprint": True, "footprint_decode_tokens": 6}
    one, three = (measured(small(**shape, footprint_batch=n), method_at) for n in (1, 3))
    assert (one.status, three.status) == ("ok", "ok")
    assert (one.sequences, three.sequences) == (None, 3)
    dropped = {*TIME_COLUMNS, *SURROUNDINGS_COLUMNS, "sequences"}
    assert three.model_dump(exclude=dropped) == one.model_dump(exclude=dropped)
    for key in ("dense_kv_bytes", "ledger_bytes"):
        assert asked[1][key] == 3 * asked[0][key] > 0


def test_nvmls_reading_is_shared_out(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FootprintMeasurement, "samples", True)
    monkeypatch.setattr(FootprintMeasurement, "_nvml_bytes", lambda self: 700 if self.phase == "decode" else 100)
    row = measured(small(methods=["dense"], footprint=True, footprint_decode_tokens=4, footprint_batch=4), 0)
    assert (row.baseline_nvml_bytes, row.decode_peak_nvml_bytes) == (100, 700)
    assert row.kv_nvml_bytes == 150


def test_the_plan_and_the_identity_say_so(small: MakeConfig) -> None:
    config = small(footprint=True, footprint_batch=16)
    assert "16 sequences alike in each" in make_plan(config).text()
    assert config.identity()["footprint_batch"] == 16
    assert "footprint_batch" not in small(footprint=True).identity()


def test_a_cache_of_the_models_own_holds_one_sequence(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(methods=["dense"], footprint=True, footprint_batch=2)
    monkeypatch.setattr(type(make_plan(config).facts.backend), "holds_one_sequence", True)
    with pytest.raises(UsageError, match="holds one sequence: leave out --footprint-batch"):
        make_plan(config)
