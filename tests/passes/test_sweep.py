"""The run path on a real engine: shared prefill, rows as they come, resume, failures as rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import stand_ins
from notes import Notes
from tiny import MakeConfig

import kvscope
from kvscope.errors import UsageError
from kvscope.harness.engine import batch_noise, self_check  # noqa: F401 - take their prefill before it is counted
from kvscope.harness.engine import prefill as prefill_module
from kvscope.harness.passes.sweep import failures, run
from kvscope.methods import registry

SAMPLES = "samples.jsonl"


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the lengths of the prefills that ran, in order; the self-check's does not count."""
    import kvscope.harness.engine.self_check  # noqa: F401 - binds the real prefill before it is replaced

    seen: list[int] = []
    real = prefill_module.prefill

    def counting(loaded: Any, ids: Any, **options: Any) -> Any:
        seen.append(len(ids))
        return real(loaded, ids, **options)

    monkeypatch.setattr(prefill_module, "prefill", counting)
    return seen


@pytest.fixture
def odd_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the methods that misbehave."""
    for name, place in stand_ins.METHODS.items():
        monkeypatch.setitem(registry.METHODS, name, place)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]


def test_one_prefill_a_prompt_serves_all_methods(small: MakeConfig, prefills: list[int]) -> None:
    config = small(methods=["dense", "sliding_window", "recency", "random"], lengths_tokens=[512, 640])
    result = run(config, progress=False)
    assert prefills == [507, 507, 635, 635]
    assert len(result.samples) == 2 * 2 * 4
    assert set(result.samples["status"]) == {"ok"}


def test_a_run_reads_its_tokenizer_once(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    read: list[str] = []
    real = AutoTokenizer.from_pretrained

    def counting(where: str, **options: Any) -> Any:
        read.append(where)
        return real(where, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counting)
    config = small(samples=1)
    run(config, progress=False)
    assert read == [config.model]


def test_rows_say_what_was_measured(small: MakeConfig) -> None:
    frame = run(small(), progress=False).samples
    row = frame[frame["method_label"] == "recency:recency_tokens=128"].iloc[0]
    assert row["model"] == "tiny"
    assert row["prompt_tokens"] == 508
    assert row["config"]["recency_tokens"] == 128
    assert not row["noop"]
    # 128 kept + 4 steps: three pages of 64 tokens; dense 507 + 4: eight. 256 bytes a token.
    assert row["resident_kv_bytes"] == 3 * 64 * 256
    assert row["dense_kv_bytes"] == 8 * 64 * 256
    assert row["answer_nll_reason"] == "not requested"
    dense = frame[frame["method_label"] == "dense"].iloc[0]
    assert dense["resident_kv_bytes"] == dense["dense_kv_bytes"]
    assert dense["prompt_sha256"] == row["prompt_sha256"]
    assert dense["prefill_s"] == row["prefill_s"]


def test_times_of_answers_say_their_spread_and_how_busy_the_host_was(small: MakeConfig) -> None:
    frame = run(small(), progress=False).samples
    assert (frame["step_p10_s"] > 0).all()
    assert (frame["step_p10_s"] <= frame["step_p90_s"]).all()
    assert (frame["step_p10_s"] <= frame["decode_s"]).all()
    assert (frame["cpu_cores"] >= 1).all()
    assert (frame["load_1min"] >= 0).all()


def test_a_mapping_with_out_runs_from_python(small: MakeConfig) -> None:
    config = small(samples=1)
    result = kvscope.run(config.model_dump(), progress=False)
    assert str(result.folder) == config.out
    assert len(result.samples) == 2
    assert len(kvscope.load_run(result.folder).samples) == 2


def test_without_a_folder_nothing_starts(small: MakeConfig, prefills: list[int]) -> None:
    with pytest.raises(UsageError, match="--out DIR"):
        run(small(out=None), progress=False)
    assert prefills == []


def test_the_same_command_again_measures_nothing_twice(small: MakeConfig, prefills: list[int]) -> None:
    first = run(small(), progress=False)
    before = (first.folder / SAMPLES).read_bytes()
    notes = Notes()
    again = run(small(), progress=notes)
    assert len(prefills) == 2
    assert (first.folder / SAMPLES).read_bytes() == before
    assert len(again.samples) == 4
    assert notes.said[-1] == "All 4 rows are there already: nothing left to measure."


def test_a_missing_row_is_measured_and_only_that(small: MakeConfig, prefills: list[int]) -> None:
    folder = run(small(), progress=False).folder
    kept = (folder / SAMPLES).read_text().splitlines(keepends=True)
    (folder / SAMPLES).write_text("".join(kept[:1] + kept[2:]))
    notes = Notes()
    again = run(small(), progress=notes)
    assert len(prefills) == 3
    assert sorted(again.samples["sample"]) == [0, 0, 1, 1]
    assert json.loads(kept[1])["output"] == lines(folder)[-1]["output"]
    assert "3 rows are there already: continuing with 1 prompt and 0 footprint cells." in notes.said


def test_a_torn_last_line_is_dropped_with_a_message_and_measured_again(small: MakeConfig) -> None:
    folder = run(small(), progress=False).folder
    whole = (folder / SAMPLES).read_bytes()
    (folder / SAMPLES).write_bytes(whole[:-40])
    notes = Notes()
    again = run(small(), progress=notes)
    assert len(again.samples) == 4
    assert any("cut short" in text and SAMPLES in text for text in notes.said)
    assert lines(folder)[-1]["output"] == json.loads(whole.splitlines()[-1])["output"]


@pytest.mark.usefixtures("odd_methods")
def test_a_failing_method_is_a_row_and_the_others_go_on(small: MakeConfig) -> None:
    notes = Notes()
    result = run(small(methods=["failing", "dense"], samples=1), progress=notes)
    bad, good = result.samples.to_dict("records")
    assert (bad["status"], bad["reason"]) == ("failed", "decode: RuntimeError: the page table is torn")
    assert good["status"] == "ok"
    assert failures(result) == ["accuracy: failing: 1 failed: decode: RuntimeError: the page table is torn"]
    assert any("niah_single_1 512 sample 0: failing" in text for text in notes.said)
    assert notes.cells == ["failing - (1 not measured), dense 0.00"]


@pytest.mark.usefixtures("odd_methods")
def test_out_of_memory_is_a_row_of_its_own_kind(small: MakeConfig) -> None:
    result = run(small(methods=["hungry", "dense"], samples=1), progress=False)
    assert list(result.samples["status"]) == ["oom", "ok"]
    assert "3.00 GiB" in result.samples["reason"].iloc[0]
    assert failures(result)


@pytest.mark.usefixtures("odd_methods")
def test_an_unsupported_method_gives_rows_with_every_reason_and_is_no_failure(
    small: MakeConfig, prefills: list[int]
) -> None:
    result = run(small(methods=["picky"], samples=1), progress=False)
    assert prefills == []
    assert list(result.samples["status"]) == ["unsupported"]
    assert result.samples["reason"].iloc[0] == "it needs a moon; and a sun"
    assert failures(result) == []


def test_a_failing_prefill_is_a_row_of_every_method(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(prefill_module, "prefill", broken)
    result = run(small(samples=1), progress=False)
    assert list(result.samples["status"]) == ["oom", "oom"]
    assert set(result.samples["reason"]) == {"prefill: MemoryError: no room"}


@pytest.mark.usefixtures("odd_methods")
def test_an_interrupt_keeps_every_finished_row(small: MakeConfig) -> None:
    stand_ins.Interrupting.opened = 0
    config = small(methods=["dense", "interrupting"], batch=1)
    with pytest.raises(KeyboardInterrupt):
        run(config, progress=False)
    assert config.out is not None
    assert [(row["sample"], row["method"]) for row in lines(Path(config.out))] == [
        (0, "dense"),
        (0, "interrupting"),
        (1, "dense"),
    ]
    assert len(run(config, progress=False).samples) == 4


def test_another_configuration_is_refused_and_named(small: MakeConfig) -> None:
    run(small(samples=1), progress=False)
    with pytest.raises(UsageError, match=r"seed \(there: 0, asked: 7\)"):
        run(small(samples=1, seed=7), progress=False)


def test_options_equal_to_the_defaults_are_the_same_run(small: MakeConfig) -> None:
    run(small(methods=["dense", "random"], samples=1), progress=False)
    again = run(small(methods=["dense", "random:fraction=0.1"], samples=1), progress=False)
    assert list(again.samples["method_label"]) == ["dense", "random"]


def test_the_same_method_twice_is_refused(small: MakeConfig) -> None:
    with pytest.raises(UsageError, match="asked for twice"):
        run(small(methods=["random", "random:fraction=0.1"]), progress=False)


def test_the_question_can_be_fed_under_the_method(small: MakeConfig, prefills: list[int]) -> None:
    result = run(small(samples=1, method_from="question"), progress=False)
    row = result.samples.iloc[0]
    assert prefills[0] < row["prompt_tokens"] - 10
    assert row["method_from"] == "question"


def test_answer_nll_is_measured_when_asked_for(small: MakeConfig) -> None:
    frame = run(small(samples=1, answer_nll=True), progress=False).samples
    assert frame["answer_nll"].between(0.1, 20.0).all()
    assert frame["answer_nll_reason"].isna().all()


def test_run_json_tells_what_was_asked_and_where(small: MakeConfig) -> None:
    info = run(small(samples=1), progress=False).info
    assert [method.label for method in info.methods] == ["dense", "recency:recency_tokens=128"]
    assert info.environment["device"] == "cpu"
    assert "paged decode in torch operations" in str(info.environment["attention_backend"])
    assert info.identity["dtype"] == "float32"
    assert {cell.method_label for cell in info.plan} == {method.label for method in info.methods}
    assert info.model == "tiny"
