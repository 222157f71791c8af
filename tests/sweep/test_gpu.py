"""The footprint pass on a real GPU: the driver sees what the methods say."""

from pathlib import Path

import pytest
import torch
from tiny import MakeConfig

from kvscope.harness.models import REFERENCE_MODEL_FOLDER
from kvscope.harness.sweep import failures, run
from kvscope.results.schema import NVML_COLUMNS, TORCH_COLUMNS

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
