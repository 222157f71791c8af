"""Prefill: one layer's KV at a time, collectors, refusals, and a model left as it was found."""

import gc

import pytest
import torch
from tiny_models import PAGE_TOKENS, build_stock, loaded_model, prompt_ids

from kvscope.errors import UsageError
from kvscope.harness.engine import layer_major
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.methods.base import Collector, union_collectors
from kvscope.methods.registry import create_method


def new_storages() -> dict[int, int]:
    """Address -> bytes of every storage of a live tensor made since ``gc.freeze()``."""
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


class LiveBytes(Collector):
    """Not metadata: looks at the live tensors of the process while each chunk passes."""

    name = "live_bytes"

    def __init__(self, layer):
        self.layer, self.seen = layer, []

    def chunk(self, k_BHSD, v_BHSD, hidden_BSM, *, start_tokens):
        self.seen.append(new_storages())

    def finish(self):
        return torch.zeros(0)


@pytest.mark.parametrize(("name", "n_layers"), [("llama", 2), ("llama", 6), ("afmoe", 4)])
def test_prefill_holds_the_kv_of_one_layer(name, n_layers):
    n_tokens, chunk_tokens = 4096, 256
    loaded = wrap_model(build_stock(name, num_hidden_layers=n_layers), None, page_tokens=PAGE_TOKENS)
    managed, sliding = loaded.shape.layers, loaded.shape.sliding_layers
    watchers = [LiveBytes(layer) for layer in managed]
    gc.freeze()  # for good: thawed, what is there would slow every later collection
    prompt = prefill(loaded, prompt_ids(n_tokens), collectors=watchers, chunk_tokens=chunk_tokens)
    layer_kv_bytes = n_tokens * loaded.shape.layer_bytes_per_token
    assert prompt.host_bytes == len(managed) * layer_kv_bytes
    # A sliding layer holds its last chunk with the window before it until the prefill is over, then its window.
    stock_bytes = len(sliding) * (chunk_tokens + loaded.shape.sliding_window) * loaded.shape.layer_bytes_per_token
    host = {pages.untyped_storage().data_ptr() for pages in prompt.pages.values()}
    hidden_bytes = n_tokens * loaded.shape.hidden_size * 4
    for seen in (seen for watcher in watchers for seen in watcher.seen):
        elsewhere = sorted((n for ptr, n in seen.items() if ptr not in host), reverse=True)
        # The one buffer of K and V, the hidden states, and the rotary tables and outputs of single chunks.
        assert layer_kv_bytes in elsewhere
        elsewhere.remove(layer_kv_bytes)
        assert hidden_bytes in elsewhere
        elsewhere.remove(hidden_bytes)
        assert max(elsewhere) <= max(chunk_tokens * loaded.shape.hidden_size * 4, stock_bytes // 2)
        rotary_bytes = 2 * n_tokens * loaded.shape.head_dim * 4
        chunks_bytes = 4 * chunk_tokens * loaded.shape.hidden_size * 4
        assert sum(elsewhere) <= rotary_bytes + chunks_bytes + stock_bytes + 64 * n_tokens
    assert layer_kv_bytes <= prompt.peak_device_kv_bytes <= layer_kv_bytes + stock_bytes


@pytest.mark.gpu
def test_prefill_peak_on_a_gpu_does_not_grow_with_the_layers():
    peaks = []
    for n_layers in (2, 8):
        model = build_stock("llama", num_hidden_layers=n_layers).to("cuda")
        loaded = wrap_model(model, None)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        prompt = prefill(loaded, prompt_ids(8192))
        peaks.append(torch.cuda.max_memory_allocated() - start)
        assert prompt.pages[0].is_pinned()
        layer_kv_bytes = prompt.peak_device_kv_bytes
    assert abs(peaks[1] - peaks[0]) < 0.1 * layer_kv_bytes


class ChunkMean(Collector):
    name = "chunk_mean"

    def __init__(self, layer):
        self.layer, self.keys, self.values, self.hidden, self.starts = layer, [], [], [], []

    def chunk(self, k_BHSD, v_BHSD, hidden_BSM, *, start_tokens):
        self.keys.append(k_BHSD.clone())
        self.values.append(v_BHSD.clone())
        self.hidden.append(hidden_BSM.clone())
        self.starts.append(start_tokens)

    def finish(self):
        return torch.stack([k_BHSD.mean(2) for k_BHSD in self.keys])


@pytest.mark.parametrize("name", ["llama", "gemma3", "afmoe"])
def test_collectors_hear_k_v_and_entering_hidden_states(name):
    loaded = loaded_model(name)
    layer = loaded.shape.layers[-1]
    collector = ChunkMean(layer)
    prompt = prefill(loaded, prompt_ids(100), collectors=[collector], chunk_tokens=32)
    assert collector.starts == [0, 32, 64, 96]
    keys, values = prompt.pages[layer].permute(2, 1, 0, 3, 4).flatten(2, 3)
    torch.testing.assert_close(torch.cat(collector.keys, 2)[0], keys[:, :100], atol=0, rtol=0)
    torch.testing.assert_close(torch.cat(collector.values, 2)[0], values[:, :100], atol=0, rtol=0)
    hidden_BNM = torch.cat(collector.hidden, 1)
    assert hidden_BNM.shape == (1, 100, loaded.shape.hidden_size)
    torch.testing.assert_close(hidden_BNM[:, -1], prompt.last_hidden[layer], atol=0, rtol=0)
    assert prompt.metadata["chunk_mean"][layer].shape[0] == 4


def test_equal_collectors_of_several_methods_run_once():
    class Asking(type(create_method("dense"))):
        def collectors(self, layer):
            return [ChunkMean(layer)]

    found = union_collectors([Asking(), Asking(), create_method("recency")], [0, 2])
    assert [(collector.name, collector.layer) for collector in found] == [("chunk_mean", 0), ("chunk_mean", 2)]


def test_collectors_of_layers_nobody_manages_are_refused():
    with pytest.raises(ValueError, match="does not manage"):
        prefill(loaded_model("gemma3"), prompt_ids(20), collectors=[ChunkMean(0)])


@pytest.mark.parametrize("chunk_tokens", [0, -16, 24])
def test_chunks_are_whole_pages(chunk_tokens):
    with pytest.raises(UsageError, match="multiple of the page"):
        prefill(loaded_model("llama"), prompt_ids(50), chunk_tokens=chunk_tokens)


def test_a_prompt_longer_than_the_model_takes_is_refused():
    with pytest.raises(UsageError, match="takes 16384 tokens"):
        prefill(loaded_model("llama"), [5] * 16384)


def test_the_model_is_put_back_even_after_an_error(monkeypatch):
    loaded = loaded_model("qwen2")
    layers = loaded.model.model.layers
    prefill(loaded, prompt_ids(40))
    assert loaded.model.model.layers is layers

    def failing(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layer_major, "called_attention", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        prefill(loaded, prompt_ids(40))
    monkeypatch.setattr(loaded.model.model.embed_tokens, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        prefill(loaded, prompt_ids(40))
    assert loaded.model.model.layers is layers


def test_the_prompt_knows_its_hash_seed_and_time():
    first, again, other = (prefill(loaded_model("llama"), prompt_ids(30, seed=s), seed=s) for s in (1, 1, 2))
    assert first.prompt_sha256 == again.prompt_sha256 != other.prompt_sha256
    assert (first.seed, other.seed) == (1, 2)
    assert first.prefill_s > 0
