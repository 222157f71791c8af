"""The footprint pass on a real GPU: the driver sees what the methods say."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MakeConfig

from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.footprint import FootprintPass
from kvscope.harness.passes.forked import CAN_FORK, WORKER_COMMAND
from kvscope.harness.passes.memory import host_rss_bytes
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.process import run_worker
from kvscope.harness.passes.sweep import failures, run
from kvscope.methods.pinned import empty_pinned
from kvscope.results.memory_rows import NVML_COLUMNS, TORCH_COLUMNS

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
MIB = 1024**2
LENGTH = 32 * 1024
KV_BYTES_PER_TOKEN = 8 * 2 * 8 * 128 * 2


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a random Llama of 32 KiB of KV a token: 1 GiB at 32K tokens, above what NVML can resolve."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "wide"
    tokenizer = AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=LENGTH,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_nvml_confirms_resident_and_freed(small: MakeConfig, wide_model: str, tmp_path: Path) -> None:
    config = small(
        model=wide_model,
        methods=["dense", "recency"],
        lengths_tokens=[LENGTH],
        samples=1,
        device="cuda",
        footprint=True,
    )
    result = run(config, progress=False)
    assert failures(result) == []
    frame = result.footprint.set_index("method_label")
    assert frame[list(NVML_COLUMNS)].notna().all(axis=None), frame["nvml_reason"].tolist()
    assert frame[list(TORCH_COLUMNS)].notna().all(axis=None)
    assert frame["verdict"].to_dict() == {"dense": "resident", "recency": "freed"}
    dense, recency = frame.loc["dense"], frame.loc["recency"]
    assert dense["dense_kv_bytes"] >= KV_BYTES_PER_TOKEN * LENGTH
    assert abs(dense["kv_nvml_bytes"] - dense["resident_kv_bytes"]) < 128 * MIB
    assert recency["kv_nvml_bytes"] < 128 * MIB
    for row in (dense, recency):
        assert row["context_nvml_bytes"] <= row["weights_nvml_bytes"] <= row["baseline_nvml_bytes"]
        # One layer's KV and the hidden states: far below the whole cache.
        assert row["prefill_peak_nvml_bytes"] - row["baseline_nvml_bytes"] < dense["dense_kv_bytes"] // 2
        assert row["backend"] != "none"


LSA = "lsa:budget_tokens=4096,selection=synthetic"
PRESET: dict[str, Any] = {
    "model": "preset:qwen3-0.6b",
    "device": "cuda",
    "kv": "synthetic",
    "lengths_tokens": [LENGTH],
    "footprint_decode_tokens": 8,
}


def test_synthetic_rows_of_a_preset_are_confirmed_by_the_driver(tmp_path: Path) -> None:
    """3.5 GiB of KV at 32K: dense is there, recency freed it, lsa has it in host memory at its exact size."""
    result = run({**PRESET, "methods": ["dense", "recency", LSA]}, out=tmp_path / "run", progress=False)
    assert failures(result) == []
    frame = result.footprint.set_index("method_label")
    assert frame["verdict"].to_dict() == {"dense": "resident", "recency": "freed", LSA: "offloaded"}
    assert set(frame["allocator"]) == {"expandable_segments:True"}
    lsa = frame.loc[LSA]
    assert lsa["host_kv_bytes"] == lsa["predicted_host_bytes"] == frame.loc["dense", "dense_kv_bytes"]
    assert lsa["host_rss_peak_bytes"] - frame.loc["dense", "host_rss_peak_bytes"] < 1.1 * lsa["host_kv_bytes"]


@pytest.mark.skipif(not CAN_FORK, reason="no process that has loaded torch is forked here")
def test_a_forked_worker_reads_what_a_program_of_its_own_reads() -> None:
    """It makes a context of its own; that the libraries were imported in another process is nothing NVML sees."""
    plan = make_plan(make_config({**PRESET, "methods": ["recency"]}))
    job = FootprintPass().job(plan, plan.methods[0], LENGTH)
    forked_row = run_worker(job, timeout_s=600.0)
    own_row = run_worker(job, timeout_s=600.0, command=WORKER_COMMAND)
    assert forked_row.status == own_row.status == "ok", (forked_row.reason, own_row.reason)
    for name in NVML_COLUMNS:
        assert abs(getattr(forked_row, name) - getattr(own_row, name)) <= 4 * MIB, name
    assert forked_row.other_processes == own_row.other_processes
    assert forked_row.verdict == own_row.verdict


def test_a_budget_turns_what_does_not_fit_into_an_oom_row(tmp_path: Path) -> None:
    """1.2 GiB of weights and the context leave less than 3.5 GiB of 4."""
    values = {**PRESET, "methods": ["dense", LSA], "gpu_budget_bytes": "4GiB"}
    result = run(values, out=tmp_path / "run", progress=False)
    dense, lsa = result.footprint.to_dict("records")
    assert (dense["status"], dense["failure_phase"], dense["oom_of"]) == ("oom", "decode", "device_budget")
    assert 2048 * MIB < dense["failure_device_bytes"] <= 4096 * MIB
    assert lsa["status"] == "ok"
    assert lsa["decode_peak_nvml_bytes"] <= 4096 * MIB


def test_largest_batches_fill_the_budget(tmp_path: Path) -> None:
    values = {**PRESET, "methods": ["dense", LSA], "gpu_budget_bytes": "16GiB", "throughput": True, "max_batch": 16}
    result = run(values, out=tmp_path / "run", progress=False)
    assert failures(result) == []
    dense, lsa = result.throughput.to_dict("records")
    assert (dense["largest_batch"], dense["batch_bound"]) in {(3, "device_budget"), (4, "device_budget")}
    assert lsa["largest_batch"] > dense["largest_batch"]
    assert dense["batch_peak_nvml_bytes"] <= 16 * 1024 * MIB


def test_pages_mapped_at_their_exact_size_are_pinned_and_copied_whole() -> None:
    torch.zeros(1, device="cuda").cpu()  # the context's own host memory comes first
    before_bytes = host_rss_bytes()
    pages = empty_pinned((3 * 64 * MIB + 12345,), dtype=torch.uint8)  # torch would take 256 MiB
    assert pages.is_pinned()
    pages.random_(0, 255)
    assert abs(host_rss_bytes() - before_bytes - pages.numel()) < 32 * MIB
    copied = pages.cuda(non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(copied.cpu(), pages)
    del pages
    gc.collect()
    assert host_rss_bytes() - before_bytes < 96 * MIB  # the driver keeps some staging of its own


def test_answers_have_the_same_bits_in_any_batch(tmp_path: Path) -> None:
    """Every step's forward has as many rows, and attention cuts each sequence by itself: no rounding is left."""
    methods = [
        "dense", "lsa", "lsa:indexer=landmark,share=0.3", "recency:share=0.3", "random:share=0.3", "sliding_window",
        "snapkv:share=0.3", "pyramidkv:share=0.3", "adakv:share=0.3", "tova:share=0.3", "quest:read_share=0.3",
        "moba:block_tokens=64,read_share=0.3", "msa", "dsa:read_share=0.3", "dense:kv=int4", "lsa:kv=int8",
    ]  # fmt: skip
    values: dict[str, Any] = {
        "model": "reference", "device": "cuda", "methods": methods, "tasks": ["niah_multikey_2", "vt"],
        "lengths_tokens": [2048, 4096], "samples": 3, "footprint": False,
    }  # fmt: skip
    found = {}
    for batch in (1, 5, 144):
        result = run({**values, "batch": batch}, out=tmp_path / f"{batch}", progress=False)
        assert failures(result) == []
        index = ["method_label", "task", "length_tokens", "sample"]
        found[batch] = result.samples.set_index(index).sort_index()
    for batch in (5, 144):
        assert set(found[batch]["logit_noise"].dropna()) == {0.0}
        assert found[batch]["batch"].max() > 2
        other = found[batch]["least_logit_gap"] != found[1]["least_logit_gap"]
        assert not other.any(), found[batch][other].index.tolist()
        assert (found[batch]["output"] == found[1]["output"]).all()
