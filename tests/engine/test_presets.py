"""``preset:NAME``: public shapes, random weights, and nothing that could be taken for an answer."""

from typing import Any

import pytest
import torch
from in_process import run_here

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.names import known_models
from kvscope.harness.passes.accuracy import AccuracyPass
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.facts import describe_model
from kvscope.harness.passes.footprint import FootprintPass
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.sweep import failures, run
from kvscope.methods.registry import create_method

LSA = "lsa:budget_tokens=512,recency_tokens=128,selection=synthetic"


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes_per_token", "q_heads"),
    [
        ("llama-2-7b", 6_738_415_616, 524_288, 32),
        ("llama-3.1-8b", 8_030_261_248, 131_072, 32),
        ("qwen3-0.6b", 596_049_920, 114_688, 16),
        ("qwen3-8b", 8_190_735_360, 147_456, 32),
    ],
)
def test_shapes_are_the_published_ones(name: str, parameters: int, kv_bytes_per_token: int, q_heads: int) -> None:
    facts = describe_model(f"preset:{name}", device="cpu", dtype="bfloat16")
    assert facts.weights_bytes == 2 * parameters
    assert facts.shape.kv_bytes_per_token == kv_bytes_per_token
    assert (facts.shape.n_q_heads, facts.shape.head_dim) == (q_heads, 128)
    assert facts.max_length_tokens >= 1024 * 1024
    assert facts.tokenizer is None


def test_weights_are_drawn_from_a_seed_in_the_dtype_asked_for() -> None:
    first, second = (load_model("preset:tiny", device="cpu", dtype="bfloat16") for _ in range(2))
    assert first.dtype == torch.bfloat16
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)
    assert (first.tokenizer, first.eos_ids) == (None, frozenset())
    assert first.revision == "random weights, seed 0"


def test_the_list_of_models_has_the_public_presets_alone() -> None:
    presets = [name for name in known_models() if name.startswith("preset:")]
    assert presets == [
        "preset:llama-2-7b",
        "preset:llama-3.1-8b",
        "preset:qwen3-0.6b",
        "preset:qwen3-8b",
        "preset:deepseek-v4-flash",
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "preset:lama-3.1-8b"], "Did you mean 'preset:llama-3.1-8b'?"),
        (["--model", "preset:deepseek-v4-flash"], "kvscope plan alone takes it"),
        (["--model", "preset:tiny", "--task", "vt"], "a preset has random weights, so its answers mean nothing"),
        (["--model", "preset:tiny", "--no-footprint"], "footprint is off, so this run would measure no memory"),
        (["--model", "preset:tiny", "--length", "32"], "too short for 32 decode steps: it needs at least 34"),
        (["--find-max", "--throughput"], "ask for one of them"),
        (["--find-max", "--task", "vt"], "find_max measures memory with synthetic KV: leave the tasks out"),
        (["--gpu-budget", "24 gigs"], "write bytes, or 24GiB (1024-based) or 24GB"),
        (["--kv", "magic"], "kv in the options is 'magic', expected 'prefill' or 'synthetic'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    assert cli.run_cli(["run", "--device", "cpu", "--out", str(tmp_path / "run"), *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


def test_a_preset_is_measured_without_a_task(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real prefill of random tokens: the same ones for every method."""
    jobs = run_here(monkeypatch)
    values = {"model": "preset:tiny", "methods": ["dense", LSA], "lengths_tokens": ["2k"], "device": "cpu"}
    result = run({**values, "footprint_decode_tokens": 4}, out=tmp_path / "run", progress=False)
    assert failures(result) == []
    frame = result.footprint.set_index("method_label")
    assert list(frame["prefill"]) == ["dense", "dense"]
    assert list(frame["selection"]) == ["free", "synthetic"]
    assert list(frame["status"]) == ["ok", "ok"]
    assert (frame["resident_kv_bytes"] == frame["predicted_kv_bytes"]).all()
    assert frame.loc[LSA, "resident_kv_bytes"] < 0.3 * frame.loc["dense", "resident_kv_bytes"]
    assert jobs[0].context_ids == jobs[1].context_ids
    assert len(jobs[0].context_ids) + len(jobs[0].forced_ids) + 4 == 2048
    assert len(result.samples) == 0
    assert result.info.samples == 0


def test_the_plan_of_a_preset_scores_nothing() -> None:
    config = make_config({"model": "preset:llama-3.1-8b", "methods": ["dense"], "lengths_tokens": ["128k"]})
    plan = make_plan(config.model_copy(update={"device": "cpu", "dtype": "bfloat16"}))
    text = plan.text()
    assert "nothing is scored" in text
    assert "15.0 GiB of weights" in text
    assert AccuracyPass().prefill_tokens(plan) == 0
    assert FootprintPass().prefill_tokens(plan) == 128 * 1024
    assert plan.cell("dense", 128 * 1024).predicted_kv_bytes == 16 * 1024**3
    assert plan.cell("dense", 128 * 1024).forecast in ("fits", "oom")


def test_a_synthetic_indexer_reads_three_layers_as_the_papers_does() -> None:
    """One on every layer would take gigabytes of weights beside an 8B model."""
    shape = describe_model("preset:qwen3-8b", device="cpu", dtype="bfloat16").shape
    method = create_method("lsa:budget_tokens=16384,selection=synthetic")
    assert method.unsupported(shape, "cpu") == []
    assert method.observed_layers(shape) == (9, 10, 18)
    assert [layer for layer in shape.layers if method.collectors(layer)] == [9, 10, 18]


def test_collecting_needs_a_tokenizer(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["lsa", "collect", "--model", "preset:tiny", "--task", "vt", "-l", "1k", "-n", "1", "--device", "cpu"]
    assert cli.run_cli([*command, "--out", str(tmp_path / "data")]) == 2
    assert "random weights" in capsys.readouterr().err


def test_an_unknown_model_is_told_of_presets() -> None:
    with pytest.raises(UsageError, match="Did you mean 'preset:qwen3-8b'"):
        describe_model("preset:qwen-8b")


def test_the_example_of_llama_2_7b_from_40_to_5_4_gib() -> None:
    """524,288 B a token: 40 GiB are 80K tokens, and 13.5 % of them 5.4 GiB and the pages' rounding."""
    methods = ["dense", "recency:budget_fraction=0.135"]
    config = make_config({"model": "preset:llama-2-7b", "methods": methods, "lengths_tokens": ["80k"]})
    plan = make_plan(config.model_copy(update={"device": "cpu", "dtype": "bfloat16"}))
    assert plan.facts.shape.kv_bytes_per_token == 2 * 32 * 32 * 128 * 2 == 524_288
    dense, kept = (plan.cell(label, 80 * 1024).predicted_kv_bytes for label in methods)
    assert dense == 40 * 2**30
    assert kept is not None
    assert kept / 2**30 == pytest.approx(5.4, abs=0.05)
