"""The comparison of kept tokens with kvpress: what is counted, and what is written of it."""

from types import ModuleType

import pytest
from benchmark_scripts import load_script


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(monkeypatch, "eviction_against_kvpress")


def test_agreement_is_one_for_equal_sets_alone(benchmark: ModuleType) -> None:
    assert benchmark.agreement([1, 2, 3], [3, 2, 1]) == 1
    assert benchmark.agreement([1, 2, 3, 4], [1, 2]) == benchmark.agreement([1, 2], [1, 2, 3, 4]) == 0.5
    assert benchmark.agreement([1], [2]) == 0
    assert benchmark.agreement([], []) == 0


def test_layers_and_heads_are_compared_one_by_one(benchmark: ModuleType) -> None:
    own, theirs = [[[0, 1], [2, 3]], [[4], [5, 6, 7]]], [[[0, 1], [2, 9]], [[4, 8], [5, 6, 7]]]
    found = benchmark.compare(own, theirs)
    assert found["agreement_by_layer_and_head"] == [[1.0, 0.5], [0.5, 1.0]]
    assert (found["kvscope_tokens_by_layer"], found["kvpress_tokens_by_layer"]) == ([2, 2], [2, 2.5])
    assert (found["kvscope_most_tokens"], found["kvpress_most_tokens"]) == (3, 3)


def test_both_sides_get_the_same_budget_and_window(benchmark: ModuleType) -> None:
    assert benchmark.specs(100) == {
        "snapkv": "snapkv:budget_tokens=100,window_tokens=64",
        "pyramidkv": "pyramidkv:budget_tokens=100,window_tokens=64",
        benchmark.PYRAMID_SIZES: "pyramidkv:budget_tokens=100,window_tokens=64",
        "adakv": "adakv:budget_tokens=100,window_tokens=64",
        "expected_attention": "expected_attention:budget_tokens=100",
        "knorm": "knorm:budget_tokens=100",
        "tova": "tova:budget_tokens=100",
    }
