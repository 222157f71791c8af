"""The engine on a CUDA GPU: the same numbers as transformers on the CPU, and bytes the allocator agrees with."""

import copy

import pytest
import torch
from masked import masking
from sequences import assert_predicted, errors_of_evicting, prefilled
from sessions import Single
from tiny_models import ARCHITECTURES, build_stock, prompt_ids, runnable_methods, save_tiny, stock_model

from kvscope.harness.engine.decode import answer_nll, decode
from kvscope.harness.engine.models import load_model, wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.methods.registry import create_method

pytestmark = pytest.mark.gpu
SPECS = [*runnable_methods(), "sliding_window:window=20", "random:chunk_tokens=5,recency_tokens=7,fraction=0.3"]


def run_steps(loaded, method, prompt, tokens, **options):
    with Single(loaded, method, prompt, reserve_tokens=len(tokens), **options) as session:
        return torch.stack([session.step(token) for token in tokens]).cpu()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fp32_logits_equal_the_stock_forward_on_the_cpu(name):
    ids = prompt_ids(211)
    loaded = wrap_model(copy.deepcopy(stock_model(name)).cuda(), None, page_tokens=16)
    prompt = prefill(loaded, ids[:203], chunk_tokens=64)
    assert all(pages.is_pinned() for pages in prompt.pages.values())
    with torch.no_grad():
        stock = stock_model(name)(torch.tensor([ids])).logits[0, 203:]
    torch.testing.assert_close(run_steps(loaded, create_method("dense"), prompt, ids[203:]), stock, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("spec", SPECS)
def test_evicting_equals_masking(name, spec):
    loaded = wrap_model(build_stock(name).to("cuda"), None, page_tokens=16)
    prompt = prefilled(loaded, prompt_ids(300), [spec], chunk_tokens=128)
    tokens = prompt_ids(26, seed=8)
    method = create_method(spec)
    evicted, masked = (run_steps(loaded, each, prompt, tokens) for each in (method, masking(method)))
    torch.testing.assert_close(evicted, masked, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("spec", SPECS)
def test_evicting_equals_masking_in_bf16(name, spec):
    loaded = wrap_model(build_stock(name).to("cuda", torch.bfloat16), None, page_tokens=16)
    prompt = prefilled(loaded, prompt_ids(300), [spec], chunk_tokens=128)
    assert max(errors_of_evicting(loaded, create_method(spec), prompt, prompt_ids(26, seed=8))) < 0.02


@pytest.mark.parametrize("spec", [*SPECS, "dense:kv=int4", "recency:budget_fraction=0.5,kv=fp8"])
def test_the_allocator_sees_the_predicted_bytes(spec):
    loaded = wrap_model(build_stock("llama").to("cuda", torch.bfloat16), None)
    method, prompt = create_method(spec), prefilled(loaded, prompt_ids(4000), [spec])
    run_steps(loaded, method, prompt, [3])
    torch.cuda.synchronize()
    before_bytes = torch.cuda.memory_allocated()
    with Single(loaded, method, prompt, reserve_tokens=9) as session:
        for token in prompt_ids(9):
            session.step(token)
        footprint = session.sequence.footprint()
        held_bytes = torch.cuda.memory_allocated() - before_bytes
    assert_predicted(footprint, method, method.predict(loaded.shape, 4000, 9))
    # The allocator rounds every tensor up to 512 bytes; a step leaves small change behind.
    assert footprint.device_bytes <= held_bytes <= footprint.device_bytes + 64 * 1024
    assert torch.cuda.memory_allocated() - before_bytes <= 64 * 1024


@pytest.mark.parametrize("architecture", ["smollm3", "afmoe"])
def test_a_folder_loads_in_bf16_and_decodes(tmp_path, architecture):
    loaded = load_model(str(save_tiny(tmp_path / "tiny", architecture)))
    assert (loaded.device.type, loaded.dtype, loaded.shape.element_bytes) == ("cuda", torch.bfloat16, 2)
    ids = prompt_ids(500)
    prompt = prefilled(loaded, ids[:-1], runnable_methods())
    for name in runnable_methods():
        method = create_method(name)
        result = decode(loaded, method, prompt, ids[-1:], max_new_tokens=8, stop_at_eos=False)
        assert len(result.ids) == 8
        assert answer_nll(loaded, method, prompt, ids[-1:], [5, 6]) > 0
