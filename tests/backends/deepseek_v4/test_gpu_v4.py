"""DeepSeek-V4 on a real GPU: evicting equals masking, and the driver sees what the methods say."""

import pytest
import torch
from compressed_tiny import masked, random_model
from sessions import Single

from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.sweep import failures, run
from kvscope.methods.registry import create_method

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
MIB = 1024**2
LENGTH = 64 * 1024
N_CSA = 24
SPARSE = "lsa:selection=synthetic,budget_fraction=0.13,tau=8"


def test_evicting_equals_masking_on_the_gpu(ids):
    loaded = wrap_model(random_model().to("cuda"), None, name="tiny")
    prompt = prefill(loaded, ids[:-1], chunk_tokens=100)
    assert all(tensor.is_pinned() for tensors in prompt.host.values() for tensor in tensors.values())
    method = create_method("lsa:selection=synthetic,recency_tokens=40,budget_fraction=0.4,tau=4")
    tokens, physical, sets = ids[:12], [], []
    with Single(loaded, method, prompt, reserve_tokens=len(tokens)) as session:
        for token in tokens:
            physical.append(session.step(token))
            sets.append({layer: cache.resident.clone() for layer, cache in session.sequence.layers.items()})
    simulated = []
    with Single(loaded, create_method("dense"), prompt, reserve_tokens=len(tokens)) as session:
        for token, resident in zip(tokens, sets, strict=True):
            kept = {layer: torch.zeros(prompt.n_entries, dtype=torch.bool, device="cuda") for layer in resident}
            for layer, entries in resident.items():
                kept[layer][entries.cuda()] = True
            with masked(loaded, kept):
                simulated.append(session.step(token))
    torch.testing.assert_close(torch.stack(physical), torch.stack(simulated), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> str:
    """A random model of 15 KiB of entries and keys a token in fp32: 960 MiB at 64K, above what NVML can resolve."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "wide-v4"
    tokenizer = AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    random_model(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=N_CSA,
        layer_types=["compressed_sparse_attention"] * N_CSA,
        mlp_layer_types=["moe"] * N_CSA,
        head_dim=512,
        index_head_dim=128,
        index_n_heads=4,
        partial_rotary_factor=0.125,
        index_topk=512,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_nvml_confirms_resident_freed_and_offloaded(wide_model, tmp_path):
    config = make_config(
        {
            "model": wide_model,
            "methods": ["dense", "recency", SPARSE],
            "tasks": ["niah_single_1"],
            "lengths_tokens": [2048],
            "footprint_lengths_tokens": [LENGTH],
            "samples": 1,
            "max_new_tokens": 8,
            "device": "cuda",
            "dtype": "float32",
        }
    )
    result = run(config, out=tmp_path / "run", progress=False)
    assert failures(result) == []
    frame = result.footprint.set_index("method")
    assert frame["verdict"].to_dict() == {"dense": "resident", "recency": "freed", "lsa": "offloaded"}
    entries_bytes = N_CSA * (512 + 128) * 4 * LENGTH // 4
    assert frame.loc["dense", "dense_kv_bytes"] >= 0.99 * entries_bytes
    assert frame.loc["dense", "kv_nvml_bytes"] - frame.loc["dense", "resident_kv_bytes"] < 128 * MIB
    assert frame.loc["lsa", "host_kv_bytes"] >= 0.99 * entries_bytes
    assert frame.loc["lsa", "resident_kv_bytes"] < 0.14 * frame.loc["lsa", "dense_kv_bytes"]
