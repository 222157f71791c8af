"""The row schema: what it refuses, and that every field says what it is."""

import json
import math

import pytest
from pydantic import BaseModel, ValidationError
from synthetic_rows import CPU, H100, KINDS, demo_rows, footprint_row, sample_row

from kvscope.results.memory_rows import NVML_COLUMNS, TORCH_COLUMNS, FootprintRow
from kvscope.results.run_schema import MethodInfo, PlannedCell, Resumption, RunInfo
from kvscope.results.schema import SampleRow, ServedRecord

SAMPLE = sample_row(KINDS["recency"], task="niah_single_1", length=2048, sample=3)
ON_CPU = footprint_row(KINDS["recency"], machine=CPU, length=2048)
ON_GPU = footprint_row(KINDS["recency"], machine=H100, length=131_072)

DESIGN_SAMPLE_FIELDS = """model method config task question_type length_tokens sample seed depth prompt_sha256 targets
output score answer_nll method_from noop prefill_s decode_s decode_tokens resident_kv_bytes metadata_bytes host_kv_bytes
dense_kv_bytes bytes_read_per_step attention_flops_per_step selection"""
DESIGN_FOOTPRINT_FIELDS = """model method config length_tokens status reason verdict backend context_nvml_bytes
weights_nvml_bytes prefill_peak_nvml_bytes decode_peak_nvml_bytes weights_torch_bytes prefill_peak_torch_bytes
decode_peak_torch_bytes host_rss_peak_bytes resident_kv_bytes metadata_bytes host_kv_bytes dense_kv_bytes
bytes_read_per_step bytes_recalled ttft_s tpot_s"""


def changed(row: BaseModel, **updates: object) -> dict[str, object]:
    return {**row.model_dump(), **updates}


@pytest.mark.parametrize("kind", [SampleRow, ServedRecord, FootprintRow, RunInfo, MethodInfo, PlannedCell, Resumption])
def test_every_field_is_described(kind: type[BaseModel]) -> None:
    silent = [name for name, field in kind.model_fields.items() if not field.description]
    assert silent == []


def test_rows_hold_the_fields_others_build_on() -> None:
    assert set(DESIGN_SAMPLE_FIELDS.split()) <= set(SampleRow.model_fields)
    assert set(DESIGN_FOOTPRINT_FIELDS.split()) <= set(FootprintRow.model_fields)
    assert set(NVML_COLUMNS) | set(TORCH_COLUMNS) <= set(FootprintRow.model_fields)


@pytest.mark.parametrize("row", [SAMPLE, ON_CPU, ON_GPU])
def test_round_trip_through_json(row: SampleRow | FootprintRow) -> None:
    text = row.model_dump_json()
    assert "NaN" not in text
    assert type(row).model_validate(json.loads(text)) == row


def test_sample_rows_from_before_steps_were_recorded_load() -> None:
    values = SAMPLE.model_dump(mode="json")
    later = ("step_backend", "step_p10_s", "step_p90_s", "load_1min", "cpu_cores")
    for name in later:
        del values[name]
    row = SampleRow.model_validate(values)
    assert [getattr(row, name) for name in later] == [None] * len(later)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_row_holds_nan_or_infinity(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        SampleRow.model_validate(changed(SAMPLE, decode_s=value))
    with pytest.raises(ValidationError, match=r"config\.threshold[\s\S]*finite"):
        SampleRow.model_validate(changed(SAMPLE, config={"threshold": value}))
    with pytest.raises(ValidationError, match=r"config\.budgets\S*1"):
        SampleRow.model_validate(changed(SAMPLE, config={"budgets": [1.0, value]}))


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"typo": 1}, "typo"),
        ({"score": 1.5}, "score"),
        ({"step_p10_s": 2.0, "step_p90_s": 1.0}, "step_p10_s <= step_p90_s"),
        ({"prompt_sha256": "abc"}, "prompt_sha256"),
        ({"schema_version": 2}, "schema_version"),
        ({"score": None}, "score must not be null in an ok row"),
        ({"resident_kv_bytes": None}, "resident_kv_bytes must not be null"),
        ({"answer_nll_reason": None}, "answer_nll_reason must say why"),
        ({"reason": "because"}, "reason must be null when status is ok"),
        ({"status": "failed"}, "reason must say why"),
        ({"status": "oom", "reason": "out of memory"}, "score and output must be null"),
        ({"host_kv_bytes": -1}, "host_kv_bytes"),
    ],
)
def test_bad_sample_rows_are_refused(updates: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SampleRow.model_validate(changed(SAMPLE, **updates))


@pytest.mark.parametrize(
    ("row", "updates", "message"),
    [
        (ON_CPU, {"nvml_reason": None}, "nvml_reason must say why"),
        (ON_CPU, {"torch_reason": None}, "torch_reason must say why"),
        (ON_CPU, {"verdict": "freed"}, "kv_nvml_bytes was not measured"),
        (ON_CPU, {"tpot_s": None}, "tpot_s must not be null"),
        (ON_GPU, {"decode_peak_nvml_bytes": None}, "nvml_reason must say why"),
        (ON_GPU, {"status": "oom", "reason": "out of memory"}, "verdict cannot be freed"),
    ],
)
def test_bad_footprint_rows_are_refused(row: FootprintRow, updates: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FootprintRow.model_validate(changed(row, **updates))


def test_a_failed_cell_needs_no_measurement_but_a_reason() -> None:
    row = sample_row(KINDS["dense"], task="niah_single_1", length=2048, sample=0, oom=True)
    assert (row.status, row.score, row.resident_kv_bytes) == ("oom", None, None)
    assert row.reason is not None
    assert "out of memory" in row.reason


def served_row(**updates: object) -> dict[str, object]:
    """Return the values of an answer by a server: no ledger, no times of steps."""
    unknown = dict.fromkeys(
        ("resident_kv_bytes", "metadata_bytes", "host_kv_bytes", "dense_kv_bytes", "bytes_read_per_step",
         "attention_flops_per_step", "bytes_recalled", "prefill_s", "decode_s", "step_p10_s", "step_p90_s")
    )  # fmt: skip
    served = {"request_s": 0.5, "tries": 1, "nvml_reason": "no --server-pid"}
    return changed(SAMPLE, **unknown, saving_kind="unknown", ledger_reason="a server", served=served) | updates


def test_an_answer_of_a_server_has_no_ledger_and_says_why() -> None:
    row = SampleRow.model_validate(served_row())
    assert SampleRow.model_validate_json(row.model_dump_json()) == row


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"ledger_reason": None}, "must not be null in an ok row without a ledger_reason"),
        ({"resident_kv_bytes": 1}, "ledger_reason says why an ok row has no ledger"),
        ({"status": "failed", "reason": "HTTP 500", "output": None, "score": None}, "ledger_reason says why"),
        ({"served": None}, "prefill_s, decode_s must not be null"),
        ({"served": {"request_s": 0.5, "tries": 1}}, "exactly one of nvml_bytes and nvml_reason"),
        ({"served": {"request_s": 0.5, "tries": 0, "nvml_bytes": 1}}, "greater than or equal to 1"),
        ({"decode_tokens": None}, "decode_tokens must not be null"),
    ],
)
def test_bad_answers_of_servers_are_refused(updates: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SampleRow.model_validate(served_row(**updates))


def test_two_methods_may_not_share_a_label() -> None:
    info = demo_rows()[2]
    with pytest.raises(ValidationError, match="share the label dense"):
        RunInfo.model_validate({**info.model_dump(), "methods": [info.methods[0], info.methods[0]]})
