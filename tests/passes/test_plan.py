"""The plan: predictions, forecasts, counts and refusals, before any weight is loaded."""

import dataclasses
from typing import Any

import pytest
import stand_ins
import torch
from tiny import MakeConfig

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.engine import models
from kvscope.harness.passes import forecast
from kvscope.harness.passes import plan as module
from kvscope.harness.passes.accuracy import AccuracyPass
from kvscope.harness.passes.facts import describe_model
from kvscope.harness.passes.footprint import FootprintPass
from kvscope.harness.passes.plan import make_plan
from kvscope.methods import registry
from kvscope.tasks.needle import NeedleTask


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that loads weights fails here."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("the plan loaded weights")

    monkeypatch.setattr(models, "load_model", refuse)


def test_facts_come_from_files_alone(tiny_model: str) -> None:
    facts = describe_model(tiny_model, device="cpu")
    loaded_bytes = sum(p.numel() * 4 for p in _weights(tiny_model))
    assert (facts.name, facts.device, facts.dtype) == ("tiny", "cpu", "float32")
    assert facts.max_length_tokens == 4096
    assert facts.weights_bytes == loaded_bytes
    assert facts.shape.kv_bytes_per_token == 2 * 2 * 16 * 4
    assert describe_model(tiny_model, device="cpu", dtype="bfloat16").weights_bytes == loaded_bytes // 2


def _weights(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return list(AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_cells_carry_the_methods_own_prediction(small: MakeConfig) -> None:
    plan = make_plan(small(lengths_tokens=[512, 1024], footprint_decode_tokens=32))
    assert [(cell.method_label, cell.length_tokens, cell.forecast) for cell in plan.cells] == [
        ("dense", 512, "fits"),
        ("dense", 1024, "fits"),
        ("recency:recency_tokens=128", 512, "fits"),
        ("recency:recency_tokens=128", 1024, "fits"),
    ]
    for method in plan.methods:
        predicted = method.predict(plan.facts.shape, 1024 - 33, 32)
        assert plan.cell(method.label, 1024).predicted_kv_bytes == predicted.kv_bytes


def test_a_cell_that_does_not_fit_is_forecast_with_both_numbers(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "free_device_bytes", lambda device: (1_000_000, "host memory"))
    plan = make_plan(small(lengths_tokens=[512, 4096], footprint_decode_tokens=32))
    assert plan.cell("dense", 4096).forecast == "oom"
    assert "host memory, 976.6 KiB is free" in (plan.cell("dense", 4096).reason or "")
    assert "OOM" in plan.text()


def test_without_a_reading_the_forecast_is_unknown(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "free_device_bytes", lambda device: (None, "GPU"))
    assert {cell.forecast for cell in make_plan(small()).cells} == {"unknown"}


def test_unsupported_methods_are_named_with_every_reason(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS, "picky", stand_ins.METHODS["picky"])
    plan = make_plan(small(methods=["dense", "picky"]))
    assert plan.unsupported("picky", 512) == "it needs a moon; and a sun"
    assert plan.unsupported("dense", 512) is None
    assert "picky at 512: it needs a moon; and a sun" in plan.text()


def test_tokens_to_prefill_do_not_grow_with_methods_in_the_accuracy_pass(small: MakeConfig) -> None:
    one = make_plan(small(methods=["dense"], lengths_tokens=[512, 1024], samples=3, footprint=True))
    two = make_plan(small(lengths_tokens=[512, 1024], samples=3, footprint=True))
    accuracy, footprint = AccuracyPass(), FootprintPass()
    assert accuracy.prefill_tokens(one) == accuracy.prefill_tokens(two) == 3 * (512 + 1024)
    assert footprint.prefill_tokens(two) == 2 * footprint.prefill_tokens(one) == 2 * (512 + 1024)


def test_the_text_says_what_will_happen(small: MakeConfig) -> None:
    text = make_plan(small(lengths_tokens=[512, 1024], samples=3, footprint=True)).text()
    assert "256 B of KV a token, at most 4,096 tokens" in text
    assert "6 prompts, each prefilled once for 2 methods: 4,608 tokens to prefill, 12 rows" in text
    assert "footprint  4 cells, each a fresh process" in text


@pytest.mark.parametrize(
    ("values", "kinds", "lengths_tokens"),
    [
        ({}, ["AccuracyPass", "FootprintPass"], (1024, 2048)),
        ({"footprint_lengths_tokens": [4096]}, ["AccuracyPass", "FootprintPass"], (1024, 2048, 4096)),
        ({"throughput": True, "tasks": []}, ["ThroughputPass"], (1024, 2048)),
        ({"find_max": True, "tasks": []}, ["FindMaxPass"], ()),
    ],
)
def test_a_configuration_has_its_passes_and_they_their_lengths(
    small: MakeConfig, values: dict[str, Any], kinds: list[str], lengths_tokens: tuple[int, ...]
) -> None:
    plan = make_plan(small(lengths_tokens=[1024, 2048], **{"footprint": True, **values}))
    assert [type(each).__name__ for each in plan.passes] == kinds
    assert plan.lengths_tokens == lengths_tokens


def test_searches_are_planned_without_tasks(small: MakeConfig) -> None:
    common = {"model": "preset:tiny", "tasks": [], "footprint": True, "lengths_tokens": [1024, 2048]}
    text = make_plan(small(**common, find_max=True, gpu_budget_bytes="2MiB")).text()
    assert "budget   2.0 MiB of device memory a process, weights included" in text
    assert "search   the longest context of dense, recency:recency_tokens=128" in text
    plan = make_plan(small(**common, throughput=True))
    assert "throughput 4 cells, each a fresh process, at 1K, 2K tokens: the largest batch up to 64" in plan.text()
    plan = make_plan(small(**common, kv="synthetic"))
    assert "footprint  4 cells, each a fresh process, at 1K, 2K tokens: synthetic KV" in plan.text()
    assert FootprintPass().prefill_tokens(plan) == 0


def test_a_budget_is_what_a_gpu_has_free(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense at 128K of an 8B shape does not fit 24 GiB, and on a host of 8 GiB a synthetic prompt still fits."""
    facts = describe_model("preset:llama-3.1-8b", device="cpu", dtype="bfloat16")
    monkeypatch.setattr(module, "describe_model", lambda *a, **k: dataclasses.replace(facts, device="cuda:0"))
    free = {"cuda:0": (79 * 1024**3, "GPU"), "cpu": (8 * 1024**3, "host memory")}
    monkeypatch.setattr(forecast, "free_device_bytes", lambda device: free[device])
    common = {"model": "preset:llama-3.1-8b", "tasks": [], "footprint": True, "kv": "synthetic"}
    values = {**common, "methods": ["dense", "lsa:budget_tokens=16384,selection=synthetic"]}
    plan = make_plan(small(**values, lengths_tokens=["32k", "128k"], gpu_budget_bytes="24GiB"))
    found = {(cell.method_label.partition(":")[0], cell.length_tokens // 1024): cell for cell in plan.cells}
    assert {key: cell.forecast for key, cell in found.items()} == {
        ("dense", 32): "fits", ("dense", 128): "oom", ("lsa", 32): "fits", ("lsa", 128): "oom",
    }  # fmt: skip
    assert "of the device budget, 24.0 GiB is free" in str(found["dense", 128].reason)
    assert "of host memory, 8.0 GiB is free" in str(found["lsa", 128].reason)


def test_a_method_that_decodes_twice_is_said_to(small: MakeConfig) -> None:
    text = make_plan(small(methods=["dense", "lsa:indexer=hindsight"])).text()
    assert "lsa:indexer=hindsight: each prompt is decoded twice, first densely" in text
    assert "twice" not in make_plan(small(methods=["dense", "lsa:indexer=attention"])).text()


def test_what_will_surprise_is_said_before(small: MakeConfig) -> None:
    plan = make_plan(small(methods=["recency:recency_tokens=600"], lengths_tokens=[512, 1024]))
    missing, noop = plan.warnings
    assert "dense is not among the methods" in missing
    assert noop == "recency:recency_tokens=600 leaves nothing out at 512 tokens: there it is dense by another name."
    assert "dense is not among" in make_plan(small(methods=["dense:kv=int8"], lengths_tokens=[512])).warnings[0]
    packed = make_plan(small(methods=["dense", "recency:recency_tokens=600,kv=int8"], lengths_tokens=[512]))
    assert [line.partition(": ")[2] for line in packed.warnings] == ["there it is dense:kv=int8 by another name."]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lengths_tokens": [8192]}, "Length 8,192 is over the 4,096 tokens that model"),
        ({"footprint": True, "footprint_lengths_tokens": [8192]}, "Length 8,192 is over the 4,096 tokens"),
        ({"lengths_tokens": [64]}, "Length 64 is too short for task 'niah_single_1': it needs at least"),
        (
            {"footprint": True, "footprint_lengths_tokens": [100]},
            "Footprint length 100 is too short for a prompt of 'niah_single_1' and 32 decode steps",
        ),
        (
            {"methods": ["lsa:indexer=hindsight"], "footprint": True},
            "its answers mean something: ask for it with --no-footprint.",
        ),
        ({"methods": ["lsa:indexer=hindsight"], "tasks": [], "find_max": True, "footprint": True}, "so leave it out"),
        ({"methods": ["lsa:indexer=hindsight"], "tasks": [], "throughput": True, "footprint": True}, "so leave it out"),
        ({"methods": ["lsa:indexer=hindsight,refresh=stale1"]}, "one interval late; leave it out"),
        ({"methods": ["dence"]}, "Did you mean 'dense'?"),
        ({"methods": ["random:fractoin=0.1"]}, "Did you mean 'fraction'?"),
        ({"methods": ["random:fraction=lots"]}, "option 'fraction' expects a number, got 'lots'"),
        ({"methods": ["random:fraction=3"]}, "fraction"),
        ({"tasks": ["niah_singel_1"]}, "Did you mean 'niah_single_1'?"),
        ({"tasks": ["niah_single_1:date=x"]}, "has no option 'date'"),
        ({"tasks": ["niah_single_2:data=/no/essays.txt"]}, "/no/essays.txt"),
        ({"tasks": ["niah_single_2"]}, "data=PATH"),
        ({"model": "reference", "kv": "synthetic", "footprint": True}, "has sliding-window layers, whose stock cache"),
        ({"model": "referense"}, "Did you mean 'reference'?"),
        ({"model": "/no/model"}, "There is no model folder '/no/model'"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(small: MakeConfig, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(small(**values))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_an_environment_problem(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="--device cpu"):
        make_plan(small(device="cuda"))


def test_what_cannot_be_built_at_any_length_is_said_by_the_plan(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the least length more prompts than the first: one with longer words may not fit."""
    tried: list[tuple[int, int]] = []
    build = NeedleTask.build

    def recorded(self: NeedleTask, tokenizer: Any, *, length_tokens: int, sample: int, seed: int) -> Any:
        tried.append((length_tokens, sample))
        if length_tokens == 2048:
            raise UsageError("this one cannot be built")
        return build(self, tokenizer, length_tokens=length_tokens, sample=sample, seed=seed)

    monkeypatch.setattr(NeedleTask, "build", recorded)
    with pytest.raises(UsageError, match="this one cannot be built"):
        make_plan(small(lengths_tokens=[320, 1024, 2048], samples=5))
    assert tried == [*((320, index) for index in range(5)), (1024, 0), (2048, 0)]
