"""A model over two GPUs: the answers and bytes of one GPU, and NVML's readings of both added up."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.self_check import random_ids, self_check
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.facts import describe_model
from kvscope.harness.passes.sweep import failures, run
from kvscope.harness.passes.verdict import AGREEMENT_BYTES, AGREEMENT_SHARE
from kvscope.methods.base import union_collectors
from kvscope.methods.registry import create_method
from kvscope.specs import parse_spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
METHODS = [
    "dense",
    "recency:recency_tokens=1k",
    "sliding_window:window=1k",
    "snapkv:budget_tokens=512",
    "adakv:budget_tokens=512",
    "expected_attention:budget_tokens=512",
    "h2o:budget_tokens=512",
    "quest:budget_tokens=512",
    "msa:budget_tokens=512",
    "dsa:budget_tokens=512",
    "dense:kv=int8",
    "quest:budget_tokens=512,kv=fp8",
    "lsa:tau=4",
    "lsa:tau=4,refresh=stale1",
    "lsa:indexer=landmark,budget_fraction=0.2,tau=4",
]
BALANCED = {"device_map": "balanced"}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The reference model on one GPU and on two."""
    facts = describe_model("reference", dtype="bfloat16", **BALANCED)
    assert facts.device_map is not None
    assert facts.devices == ("cuda:0", "cuda:1")
    options = {"device": "cuda:0", "dtype": "bfloat16", "page_tokens": facts.shape.page_tokens}
    two = load_model("reference", modules=facts.device_map.modules, **options)
    assert two.shape.devices == facts.shape.devices == facts.device_map.layers
    return load_model("reference", **options), two


def test_the_model_is_what_it_is_on_two_gpus(models: tuple[Any, Any]) -> None:
    assert self_check(models[1]).passed


@pytest.mark.parametrize("spec", METHODS)
def test_answers_and_bytes_are_those_of_one_gpu(models: tuple[Any, Any], spec: str) -> None:
    found = []
    for loaded in models:
        method = create_method(parse_spec(spec, kind="method"))
        assert method.unsupported(loaded.shape, loaded.device) == []
        ids = random_ids(loaded, 8192)
        kv = prefill(loaded, ids[:-1], collectors=union_collectors([method], loaded.shape.layers))
        assert all(pages.is_pinned() for pages in kv.pages.values())
        found.append(decode(loaded, method, kv, ids[-1:], max_new_tokens=17, stop_at_eos=False))
        assert torch.cuda.current_device() == 0  # kernels are launched beside their layers, and leave it as it was
    one, two = found
    assert two.ids == one.ids
    assert (two.footprint_peak, two.bytes_recalled, two.residency) == (
        one.footprint_peak,
        one.bytes_recalled,
        one.residency,
    )
    assert two.backends == one.backends


def test_nvml_is_read_of_both_and_agrees_with_the_ledger(tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "model": "preset:qwen3-0.6b",
        "methods": ["dense", "recency:recency_tokens=1k"],
        "lengths_tokens": ["32k"],
        "kv": "synthetic",
        "dtype": "bfloat16",
    }
    rows = {}
    for key, where in (("one", {"device": "cuda:0", "methods": ["dense"]}), ("two", BALANCED)):
        result = run(make_config({**asked, **where}), out=tmp_path / key, progress=False)
        assert failures(result) == []
        rows[key] = result.footprint.set_index("method_label")
    one, two = rows["one"].loc["dense"], rows["two"].loc["dense"]
    assert rows["two"]["verdict"].to_list() == ["resident", "freed"]
    assert (one["device"], two["device"]) == ("cuda:0", "cuda:0, cuda:1")
    assert two["resident_kv_bytes"] == one["resident_kv_bytes"]
    allowed_bytes = AGREEMENT_SHARE * one["resident_kv_bytes"] + AGREEMENT_BYTES
    assert abs(two["kv_nvml_bytes"] - one["kv_nvml_bytes"]) <= allowed_bytes
    # A context on each GPU, and the same weights in all.
    assert two["context_nvml_bytes"] > 1.5 * one["context_nvml_bytes"]
    weights = [row["weights_torch_bytes"] for row in (one, two)]
    assert abs(weights[1] - weights[0]) < 32 * 1024**2
    assert "a graph is of one" in two["step_backend"]
