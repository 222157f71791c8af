"""dsa with an indexer on a GPU: gathering equals masking, the choice is the CPU's, bytes are as predicted."""

import pytest
import torch
from dsa_tools import random_indexer
from sequences import errors_of_evicting, prefilled
from sessions import Single
from tiny_models import build_stock, prompt_ids

from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.models import wrap_model
from kvscope.methods.fp8_keys import dequantize
from kvscope.methods.registry import create_method

pytestmark = pytest.mark.gpu


def model_on(device, family="smollm3", dtype=torch.float32):
    return wrap_model(build_stock(family).to(dtype).to(device), None, name=family, page_tokens=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt_oss", "afmoe"])
def test_gathering_equals_masking_on_the_gpu(family, dtype):
    loaded, spec = model_on("cuda", family, dtype), "dsa:selection=synthetic,budget_tokens=40"
    prompt = prefilled(loaded, prompt_ids(300), [spec], chunk_tokens=64)
    errors = errors_of_evicting(loaded, create_method(spec), prompt, prompt_ids(20, seed=8))
    assert max(errors) < (1e-5 if dtype == torch.float32 else 0.01)


def test_keys_and_bytes_are_those_of_the_cpu(tmp_path):
    stores, footprints = [], []
    for device in ("cpu", "cuda"):
        loaded = model_on(device)
        folder = tmp_path / "indexer"
        if device == "cpu":
            random_indexer(folder, loaded.shape)
        spec = {"name": "dsa", "indexer": str(folder), "budget_tokens": 4096}
        method = create_method(spec)
        prompt = prefilled(loaded, prompt_ids(150), [spec], chunk_tokens=64)
        with Single(loaded, method, prompt, reserve_tokens=4) as session:
            for token in prompt_ids(20, seed=8):  # more than was reserved: the store grows
                session.step(token)
            store = session.sequence._store
            layers = loaded.shape.layers
            stores.append([dequantize(store._keys[at], store._scales[at])[:170].cpu() for at in layers])
        result = decode(loaded, method, prompt, prompt_ids(1), max_new_tokens=3)
        assert result.footprint_last == method.predict(loaded.shape, 150, 3)
        footprints.append(result.footprint_last)
    assert footprints[0] == footprints[1]
    for one, other in zip(*stores, strict=True):
        assert (one - other).abs().max() < 0.1 * one.abs().max(), "one step of fp8 at most"
        assert (one - other).abs().mean() < 2e-3
