"""The comparison with transformers' QuantizedCache: what is counted; and how the kernels' ratios are judged."""

from types import SimpleNamespace

import pytest
import torch
from benchmark_scripts import load_script


def test_bytes_of_a_cache_are_those_of_its_storages_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_script(monkeypatch, "quantised_against_transformers")
    packed = torch.zeros(100, dtype=torch.uint8)
    layer = SimpleNamespace(keys=torch.zeros(3, 5), packed=(packed, {"scale": torch.zeros(7, dtype=torch.half)}))
    layer.view = packed[:10]
    assert benchmark.tensor_bytes([layer, layer]) == 60 + 100 + 14


def test_divergence_is_kl_in_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_script(monkeypatch, "quantised_against_transformers")
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = float((p * (p / q).log()).sum(1).mean())
    assert benchmark.divergence(p.log() + 3, q.log()) == pytest.approx(expected)
    assert benchmark.divergence(p, p) == 0


def test_formats_are_held_against_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_script(monkeypatch, "kernels")
    shared = {"op": "packed_decode", "time_s": 1e-4, "gb_per_s": 1.0}
    rows = [
        {**shared, "case": "fp8, 1 x 128K", "speed_over_bf16": 1.8, "target_over_bf16": 1.7},
        {**shared, "case": "int4, 1 x 128K", "speed_over_bf16": 2.4, "target_over_bf16": 2.5},
        {**shared, "case": "int8, 1 x 128K", "speed_over_bf16": 1.5, "target_over_bf16": None},
    ]
    found = {each["case"]: each["target_met"] for each in kernels.judge(rows)}
    assert found == {"fp8, 1 x 128K": True, "int4, 1 x 128K": False}
    assert "1.80 x bf16" in kernels._line(rows[0])
